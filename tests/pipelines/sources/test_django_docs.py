"""English text with its topic: pieces of whole lines, labels by the part of the manual, whole documents held out."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from perceiver.config import UserError
from pipelines.packages import Package
from pipelines.prepare import PrepareConfig, prepare
from pipelines.sources import django_docs
from tests.pipelines.test_prepare import rows_of

WORDS = "Some words of the manual, which say a little about queries.\n"


def archive(folder: Path, monkeypatch: pytest.MonkeyPatch, documents: dict[str, bytes]) -> Path:
    """Write an archive in the layout of the package, and make it the pinned one."""
    path = folder / "docs.tar.gz"
    with tarfile.open(path, "w:gz") as target:
        for name, content in documents.items():
            member = tarfile.TarInfo(f"django-1/{name}")
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(django_docs, "PACKAGE", Package("django==1", path.name, digest))
    return path


def manual(count: int = 40) -> dict[str, bytes]:
    """Return documents of every part of the manual, and files that belong to none."""
    folders = ["faq", "howto", "internals", "intro", "ref", "ref/contrib/gis", "ref/models", "releases", "topics/db"]
    found = {f"docs/{folders[n % 9]}/page{n}.txt": (f"Page {n}\n======\n\n" + n * WORDS).encode() for n in range(count)}
    return found | {"docs/index.txt": b"x", "docs/misc/a.txt": b"x", "docs/ref/a.py": b"x", "ref/topics/b.txt": b"x"}


def test_pieces_are_whole_lines_with_the_part_of_the_manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path, monkeypatch, manual())
    config = PrepareConfig(parallel="off", options={"length": "130"})
    manifest = prepare("django_docs", str(path), str(tmp_path / "out"), config)
    assert manifest.classes == django_docs.PARTS
    rows = {split: rows_of(tmp_path / "out", manifest, split) for split in ("train", "test")}
    documents = {split: {row["key"].split("#")[0] for row in found} for split, found in rows.items()}
    assert not documents["train"] & documents["test"] and 1 <= len(documents["test"]) < 12
    assert len(documents["train"] | documents["test"]) == 40
    whole: dict[str, dict[int, str]] = {}
    for row in (*rows["train"], *rows["test"]):
        name, number = row["key"].split("#")
        whole.setdefault(name, {})[int(number)] = row["text"]
        assert 0 < len(row["text"].encode()) <= 130
        wanted = {"contrib": "ref/contrib/", "models": "ref/models/"}.get(manifest.classes[row["label"]])
        assert name.startswith(wanted or manifest.classes[row["label"]] + "/")
    for name, pieces in whole.items():
        text = "\n".join(pieces[number] for number in range(len(pieces)))
        n = int(name.rpartition("page")[2])
        assert f"Page {n}\n======\n\n{n * WORDS}".startswith(text)
        assert text.count("queries") == n


def test_long_lines_are_cut_and_blank_ones_do_not_begin_a_piece() -> None:
    text = "a" * 25 + "\n\n\nbb\n" + "ü" * 7
    assert list(django_docs.pieces(text, 10)) == ["a" * 10, "a" * 10, "aaaaa\n\n\nbb", "ü" * 5, "ü" * 2]
    assert list(django_docs.pieces("", 10)) == list(django_docs.pieces("\n\n", 10)) == []


def test_a_share_of_the_training_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test split stays as it is."""
    path = archive(tmp_path, monkeypatch, manual())
    made = {}
    for share in (None, "0.3"):
        options = {"length": "64"} | ({"share": share} if share else {})
        folder = str(tmp_path / f"out{share}")
        made[share] = prepare("django_docs", str(path), folder, PrepareConfig(parallel="off", options=options))
    whole, part = (made[share].splits for share in (None, "0.3"))
    assert part["test"].samples == whole["test"].samples
    assert 0.2 < part["train"].samples / whole["train"].samples < 0.4
    for share in ("0", "1", "x", "0.00001"):
        with pytest.raises(UserError, match="share"):
            prepare("django_docs", str(path), str(tmp_path / "no"), PrepareConfig(options={"share": share}))


def test_another_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path, monkeypatch, {"docs/index.txt": b"x"})
    with pytest.raises(UserError, match="no documentation"):
        prepare("django_docs", str(path), str(tmp_path / "out"), PrepareConfig(parallel="off"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="another checksum"):
        prepare("django_docs", str(path), str(tmp_path / "out"), PrepareConfig(parallel="off"))
