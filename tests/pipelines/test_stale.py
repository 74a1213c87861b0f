"""Raw data that change between two calls of `prepare`: neither shards nor complete data of the old state are kept."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perceiver.config import UserError
from perceiver.storage import open_folder
from pipelines import fingerprints
from pipelines import prepare as preparing
from pipelines.index import index
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.listing import check_listing
from pipelines.shards.manifest import content_digest, file_versions, load_manifest, save_manifest
from pipelines.shards.reader import Reader
from pipelines.sources import Unit
from tests.pipelines.raw import tar, write
from tests.pipelines.toys import digits_archive, png, read_shard

PICTURES = [png(np.full((6, 6, 3), 100 + value, np.uint8)) for value in range(30)]
CONFIG = PrepareConfig(shard_rows=4, parallel="off")


def folder(src: Path) -> None:
    write(src, {f"{'ab'[number % 2]}/{number}.png": PICTURES[number] for number in range(20)})


def table(src: Path, relabelled: bool = False) -> None:
    """Write a CSV whose rows name pictures."""
    labels = ["b" if number % 3 == 0 else "a" for number in range(20)]
    labels[0] = "a" if relabelled else labels[0]
    rows = "".join(f"images/{number}.png,{label}\n" for number, label in enumerate(labels))
    pictures = {f"images/{number}.png": PICTURES[number] for number in range(20)}
    write(src, {"t.csv": b"image,label\n" + rows.encode(), **({} if relabelled else pictures)})


def tars(src: Path, first: int = 0, count: int = 4) -> None:
    """Write tars of two samples each."""
    for number in range(count):
        picture, other = PICTURES[first + 2 * number : first + 2 * number + 2]
        content = tar({"0.png": picture, "0.cls": b"0", "1.png": other, "1.cls": b"1"})
        write(src, {f"train-{number}.tar": content})


def parquet(src: Path, first: int = 0, paths: bool = False) -> None:
    """Write a Parquet file of five row groups; with `paths` the pictures are files next to it."""
    src.mkdir(exist_ok=True)
    pictures = [PICTURES[first + number] for number in range(20)]
    column = pa.array(pictures, pa.binary())
    if paths:
        write(src, {f"{number}.png": picture for number, picture in enumerate(pictures)})
        fields = [pa.array([None] * 20, pa.binary()), pa.array([f"{number}.png" for number in range(20)])]
        column = pa.StructArray.from_arrays(fields, ["bytes", "path"])
    pq.write_table(
        pa.table({"image": column, "label": ["ab"[n % 2] for n in range(20)]}), src / "t.parquet", row_group_size=4
    )


def text(src: Path, word: bytes = b"first ") -> None:
    write(src, {f"{number}.txt": word * (1000 + number) for number in range(12)})


def swap(src: Path, names: Sequence[str]) -> None:
    """Replace pictures by other ones of the same size."""
    for number, name in enumerate(names):
        other = PICTURES[20 + number % 10]
        assert len(other) == (src / name).stat().st_size and other != (src / name).read_bytes()
        (src / name).write_bytes(other)


Change = Callable[[Path], object]
CASES: dict[str, tuple[str, Change, Change]] = {
    "image_folder, a file added": ("image_folder", folder, lambda src: write(src, {"a/new.png": PICTURES[29]})),
    "image_folder, a file removed": ("image_folder", folder, lambda src: (src / "a" / "2.png").unlink()),
    "image_folder, relabelled": ("image_folder", folder, lambda src: (src / "a/2.png").rename(src / "b/2.png")),
    "image_folder, other content": (
        "image_folder",
        folder,
        lambda src: swap(src, [f"a/{n}.png" for n in (4, 8)]),
    ),
    "csv, a row relabelled": ("csv", table, lambda src: table(src, relabelled=True)),
    "csv, other content of pictures": (
        "csv",
        table,
        lambda src: swap(src, [f"images/{n}.png" for n in range(20)]),
    ),
    "webdataset, other content": ("webdataset", tars, lambda src: tars(src, first=5)),
    "webdataset, a tar removed": ("webdataset", tars, lambda src: (src / "train-0.tar").unlink()),
    "table, other content": ("table", parquet, lambda src: parquet(src, first=3)),
    "table, other files that it names": (
        "table",
        lambda src: parquet(src, paths=True),
        lambda src: swap(src, [f"{n}.png" for n in range(20)]),
    ),
    "text, other content": ("text", text, lambda src: text(src, b"other ")),
}


def stop_after(shards: int) -> Callable[[int, str], None]:
    done: list[str] = []

    def progress(rows: int, name: str) -> None:
        done.append(name)
        if len(done) == shards:
            raise KeyboardInterrupt

    return progress


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of a folder's files by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_changed_raw_data_are_prepared_as_if_for_the_first_time(case: str, tmp_path: Path) -> None:
    source, make, change = CASES[case]
    src, out = tmp_path / "src", tmp_path / "out"
    make(src)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, str(src), str(out), CONFIG, progress=stop_after(3))
    whole = prepare(source, str(src), str(tmp_path / "whole"), CONFIG)
    change(src)
    found = prepare(source, str(src), str(out), CONFIG)
    fresh = prepare(source, str(src), str(tmp_path / "fresh"), CONFIG)
    assert found == fresh != whole
    assert files(out) == files(tmp_path / "fresh")
    with pytest.raises(UserError, match="src has changed since"):
        prepare(source, str(src), str(tmp_path / "whole"), CONFIG)
    assert prepare(source, str(src), str(out), CONFIG) == found


def test_a_package_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    src, out = tmp_path / "digits.whl", tmp_path / "out"
    digits_archive(src)
    with pytest.raises(KeyboardInterrupt):
        prepare("digits", str(src), str(out), CONFIG, progress=stop_after(3))
    digits_archive(src, per_class=21)
    found = prepare("digits", str(src), str(out), CONFIG)
    assert found == prepare("digits", str(src), str(tmp_path / "fresh"), CONFIG)
    assert sum(split.samples for split in found.splits.values()) == 210, "not those that this process read before"
    digits_archive(src)
    with pytest.raises(UserError, match="has changed since"):
        prepare("digits", str(src), str(out), CONFIG)


@pytest.mark.parametrize("kept", [True, False])
def test_only_shards_of_changed_files_are_written_again(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    folder(src)
    with pytest.raises(KeyboardInterrupt):
        prepare("image_folder", str(src), str(out), CONFIG, progress=stop_after(3))
    written = read_shard(out / "train-000001.arrow")["key"].to_pylist()[0]
    swap(src, [written])
    if not kept:
        monkeypatch.setattr(fingerprints, "installed_version", lambda name: "another")
    done: list[str] = []
    original = preparing.ShardWriter
    monkeypatch.setattr(
        preparing, "ShardWriter", lambda folder, name, *rest: (done.append(name), original(folder, name, *rest))[1]
    )
    prepare("image_folder", str(src), str(out), CONFIG)
    assert len(done) == (2 + 1 if kept else 5), "two that were missing, and the one with the file"


def test_a_stop_between_shard_and_receipt_does_not_join_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    text(src)
    with pytest.raises(KeyboardInterrupt):
        prepare("text", str(src), str(out), CONFIG, progress=stop_after(1))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in src.iterdir()}
    text(src, b"other ")

    def stop(receipt: preparing.Receipt) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing.Receipt, "model_dump_json", stop)
        prepare("text", str(src), str(out), CONFIG)
    for path, (content, time) in before.items():
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
    prepare("text", str(src), str(out), CONFIG)
    prepare("text", str(src), str(tmp_path / "fresh"), CONFIG)
    assert files(out) == files(tmp_path / "fresh")


def test_a_source_that_states_no_versions_is_compared_as_a_whole(tmp_path: Path) -> None:
    """Sources of installed packages may not know of versions."""
    src, unit = tmp_path / "src", Unit("train", {"name": "a"})
    write(src, {"a": b"1", "b": b"2"})

    def digests(place: str | None) -> tuple[str, str]:
        raw = fingerprints.RawFiles(None, place)
        return raw.digest(), raw.unit_digest(unit)

    before = digests(str(src))
    write(src, {"out/manifest.json": b"{}", "out/train-000000.arrow": b"", "out/_receipts/fingerprint": b""})
    assert all(before) and before == digests(str(src)) and all(digests(None)), "DST may be below SRC"
    (src / "b").write_bytes(b"23")
    assert not {*before} & {*digests(str(src))}
    assert digests("hub:unknown") == ("", ""), "such a shard is never used again"


def test_data_of_earlier_versions_and_without_their_source_are_kept(tmp_path: Path) -> None:
    src, out, notes = tmp_path / "src", tmp_path / "out", []
    text(src)
    found = prepare("text", str(src), str(out), CONFIG)
    src.rename(tmp_path / "moved")
    assert prepare("text", str(src), str(out), CONFIG, note=notes.append) == found
    assert "not compared with its source" in notes[0] and "does not exist" in notes[0]
    text(src, b"other ")
    old = found.model_copy(update={"raw": ""})
    save_manifest(old, open_folder(str(out)))
    assert prepare("text", str(src), str(out), CONFIG) == old == load_manifest(str(out))


def test_an_unfinished_preparation_of_an_earlier_version_is_made_again(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    text(src)
    with pytest.raises(KeyboardInterrupt):
        prepare("text", str(src), str(out), CONFIG, progress=stop_after(2))
    mark = preparing.fingerprint("text", str(src), CONFIG)
    for file in (out / "_receipts").glob("*.json"):
        receipt = preparing.Receipt.model_validate_json(file.read_text())
        file.write_text(receipt.model_copy(update={"fingerprint": mark}).model_dump_json())
    text(src, b"other ")
    assert prepare("text", str(src), str(out), CONFIG) == prepare("text", str(src), str(tmp_path / "fresh"), CONFIG)


@pytest.mark.parametrize("linked", [False, True])
def test_an_index_of_files_that_were_replaced(linked: bool, tmp_path: Path) -> None:
    """Also in one process, which keeps footers and row groups; the files have the same size."""
    src, out = tmp_path / "src", tmp_path / "out"
    config = PrepareConfig(options={"classes": "a,b"})
    found = []
    src.mkdir()
    file = tmp_path / "a.parquet" if linked else src / "a.parquet"
    if linked:
        (src / "a.parquet").symlink_to(file)
    for first in (0, 1):
        pq.write_table(pa.table({"image": PICTURES[:8], "label": [(n + first) % 2 for n in range(8)]}), file)
        os.utime(file, (first, first))
        if first:
            with pytest.raises(UserError, match="differ from"):
                check_listing(str(out), load_manifest(str(out)).split("train"))
        if first:
            with pytest.raises(UserError, match="has changed since"):
                index("table", str(src), str(out), config)
            shutil.rmtree(out)
        manifest = index("table", str(src), str(out), config)
        assert index("table", str(src), str(out), config) == manifest
        reader = Reader.of(str(out), manifest, manifest.split("train"), cache_bytes=1 << 20)
        group = reader.row_groups({(0, 0)})[0, 0]
        digest = content_digest(manifest, ["train"]), file_versions(manifest, ["train"])
        found.append(([group.value("label", row) for row in range(8)], digest))
    (labels, before), (others, after) = found
    assert labels == [0, 1] * 4 and others == [1, 0] * 4
    assert before[0] == after[0] and before[1] != after[1], "only the versions of the files tell them apart"
