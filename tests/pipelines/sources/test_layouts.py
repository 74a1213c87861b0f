"""Raw data as people have them: names of splits and classes, links, system files, encodings, kinds of labels."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from perceiver.config import UserError
from pipelines.features import ImageFeature
from pipelines.index import index
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import Manifest, utf8_name
from pipelines.sources._layout import split_words
from pipelines.transforms import BadSample
from pipelines.transforms.decode import decode_image
from tests.pipelines.raw import off, tar, write
from tests.pipelines.test_prepare import rows_of
from tests.pipelines.toys import png

PICTURES = [png(np.full((4, 4, 3), value, np.uint8)) for value in range(120)]


class Prepared:
    """A prepared data set of a test: manifest, notes, rows by key, and rejected keys."""

    def __init__(self, root: Path, source: str, bad: float, options: dict[str, str]) -> None:
        self.notes: list[str] = []
        config = PrepareConfig(parallel="off", options=options, max_bad_fraction=bad)
        self.manifest: Manifest = prepare(source, str(root / "src"), str(root / "out"), config, note=self.notes.append)
        self.samples = {name: split.samples for name, split in self.manifest.splits.items()}
        self.rows = {
            split: {row["key"]: row for row in rows_of(root / "out", self.manifest, split)} for split in self.samples
        }
        listed = root / "out" / "quarantine.parquet"
        found = pq.read_table(listed).to_pylist() if listed.exists() else []
        self.rejected = {row["key"]: row["reason"] for row in found}


def prepared(root: Path, source: str, bad: float = 0.5, **options: str) -> Prepared:
    return Prepared(root, source, bad, options)


def pictures(root: Path, *names: str) -> Path:
    return write(root / "src", {name: PICTURES[number] for number, name in enumerate(names)})


def table(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: column if isinstance(column, pa.Array) else pa.array(column) for name, column in columns.items()}
    pq.write_table(pa.table(arrays), path)


def images(count: int, first: int = 0) -> pa.Array:
    return pa.array(PICTURES[first : first + count], pa.binary())


@pytest.mark.parametrize(
    "name, words",
    [
        ("train", ["train"]),
        ("TRAINING", ["train"]),
        ("mydata_test", ["test"]),
        ("imagenet1k-validation-00", ["val"]),
        ("TestImages", ["test"]),
        ("val2017", ["val"]),
        ("partial-dev", ["dev"]),
        ("x.eval", ["eval"]),
        ("latest", []),
        ("attestation", []),
        ("trained", []),
        ("éval", []),
        ("train_test", ["train", "test"]),
    ],
)
def test_words_of_splits(name: str, words: list[str]) -> None:
    assert split_words(name) == words


FOLDERS: dict[str, tuple[list[str], list[str], dict[str, int]]] = {
    "train, valid and test": (
        [f"{s}/{c}/{i}.png" for s in ("train", "valid", "test") for c in "ab" for i in range(2)],
        ["a", "b"],
        {"train": 4, "val": 4, "test": 4},
    ),
    "capitals": ([f"{s}/{c}/0.png" for s in ("Train", "TEST") for c in "ab"], ["a", "b"], {"train": 2, "test": 2}),
    "with a year": (
        [f"{s}/{c}/0.png" for s in ("train2017", "val2017") for c in "ab"],
        ["a", "b"],
        {"train": 2, "val": 2},
    ),
    "two words": (
        [f"{s}/{c}/0.png" for s in ("training_set", "test_set") for c in "ab"],
        ["a", "b"],
        {"train": 2, "test": 2},
    ),
    "archives in folders of their names": (
        [f"{s}/{s}/{c}/0.png" for s in ("seg_train", "seg_test") for c in "ab"],
        ["a", "b"],
        {"train": 2, "test": 2},
    ),
    "below one folder": (
        [f"data/{s}/{c}/0.png" for s in ("train", "eval") for c in "ab"],
        ["a", "b"],
        {"train": 2, "test": 2},
    ),
    "classes first": ([f"{c}/{s}/0.png" for s in ("train", "test") for c in "ab"], ["a", "b"], {"train": 2, "test": 2}),
    "classes below one folder": (
        [f"Categories/{c}/{i}.png" for c in "ab" for i in range(5)],
        ["a", "b"],
        {"train": 8, "test": 2},
    ),
    "deep below a class": ([f"{c}/x/y/{i}.png" for c in "ab" for i in range(5)], ["a", "b"], {"train": 8, "test": 2}),
    "a flat test folder": (
        [*(f"train/{c}/{i}.png" for c in "ab" for i in range(2)), "test/0.png"],
        ["a", "b"],
        {"train": 4},
    ),
    "a stray picture": (
        [f"{s}/{c}/0.png" for s in ("train", "test") for c in "ab"] + ["x.png"],
        ["a", "b"],
        {"train": 2, "test": 2},
    ),
    "a training file named after a split": (
        ["train/a/0.png", "train/b/0.png", "train/a/1_test.png", "test/a/2.png", "test/b/train_3.png"],
        ["a", "b"],
        {"train": 2, "test": 2},
    ),
    "classes of two words": (
        [f"{c}/{i}.png" for c in ("train station", "test tube", "bus") for i in range(5)],
        ["bus", "test tube", "train station"],
        {"train": 12, "test": 3},
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_splits_and_classes(tmp_path: Path, name: str) -> None:
    files, classes, splits = FOLDERS[name]
    pictures(tmp_path, *files)
    found = prepared(tmp_path, "image_folder")
    assert (list(found.manifest.classes), found.samples, found.rejected) == (classes, splits, {})
    left_out = len(files) - sum(splits.values())
    assert any("left out" in note for note in found.notes) == bool(left_out)


REFUSED = {
    "splits next to classes": (["train/a/0.png", "test/a/0.png", "bus/0.png"], "next to others"),
    "a class that is called train": (["train/0.png", "bus/0.png", "car/0.png"], "next to others .*splits=none"),
    "a class without training files": (
        ["train/a/0.png", "train/b/0.png", "val/images/0.png"],
        "no training files: images",
    ),
    "only held-out files": (["test/a/0.png", "test/b/0.png"], "test only"),
    "no classes": (["train/0.png", "test/0.png"], "none in the folder of a class"),
    "one file": (["0.png"], "none in the folder of a class"),
    "two spellings of a split": (["train/a/0.png", "test/a/1.png", "eval/a/2.png"], "eval .*and test"),
    "a class partly in splits": (["a/train/0.png", "a/test/1.png", "b/2.png"], "next to others"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unclear_folders_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    files, message = REFUSED[name]
    pictures(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, "image_folder")


def test_names_of_splits_can_be_taken_as_classes(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{c}/test {i}.png" for c in ("train", "bus") for i in range(5)))
    found = prepared(tmp_path, "image_folder", splits="none")
    assert found.manifest.classes == ("bus", "train") and found.samples == {"train": 8, "test": 2}


def test_hidden_and_system_files_are_no_data(tmp_path: Path) -> None:
    junk = [".ipynb_checkpoints/0-checkpoint.png", "a/.ipynb_checkpoints/1.png", "__MACOSX/a/._0.png", "a/._0.png"]
    junk += ["a/@eaDir/0.png", "a/Thumbs.db", "desktop.ini", "b/.DS_Store", ".hidden/0.png"]
    pictures(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(5)), *junk)
    found = prepared(tmp_path, "image_folder")
    assert (found.manifest.classes, found.samples, found.rejected) == (("a", "b"), {"train": 8, "test": 2}, {})
    members = {"__MACOSX/._0.jpg": b"x", "._0.jpg": b"x", ".DS_Store": b"x"}
    members |= {f"{i}{end}": content for i in range(2) for end, content in ((".jpg", PICTURES[i]), (".cls", b"0"))}
    write(tmp_path / "tars" / "src", {"train-0.tar": tar(members)})
    found = prepared(tmp_path / "tars", "webdataset")
    assert found.samples == {"train": 2} and not found.rejected


def test_links_are_followed_and_dead_ones_and_loops_are_quarantined(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"a/{i}.png" for i in range(5)))
    write(tmp_path / "real", {f"b/{i}.png": PICTURES[50 + i] for i in range(5)})
    src = tmp_path / "src"
    (src / "b").symlink_to("../real/b")
    (src / "a" / "loop").symlink_to("..")
    (src / "a" / "gone.png").symlink_to("nowhere.png")
    (src / "c").symlink_to("nowhere")
    (src / "a" / "linked.png").symlink_to("0.png")
    found = prepared(tmp_path, "image_folder")
    assert found.manifest.classes == ("a", "b") and sum(found.samples.values()) == 11
    assert found.rejected.keys() == {"a/loop", "a/gone.png", "c"}
    assert found.manifest.rejected == 3


def test_a_tree_of_links_that_branches_is_refused(tmp_path: Path) -> None:
    for level in range(12):
        folder = tmp_path / "src" / f"{level}"
        folder.mkdir(parents=True)
        for name in "ab":
            (folder / name).symlink_to(tmp_path / "src" / f"{level + 1}")
    write(tmp_path / "src" / "12", {"0.png": PICTURES[0]})
    with pytest.raises(UserError, match="links"):
        prepared(tmp_path, "image_folder")


NAMES = ["100%.png", "%41.png", "%E9.png", "%25E9.png", "a?b.png", "a#b.png", "a;b.png", " .png", "-rf.png", "😀.png"]
NAMES += ["x.y.z.png", "[*].png", "~.png", "a\nb.png", "n" * 246 + ".png", "::.png", "{a}.png", "'\".png"]


def test_any_name_is_a_unique_key(tmp_path: Path) -> None:
    names = [os.fsencode(name) for name in NAMES] + [b"caf\xe9.png", b"caf\xc3\xa9.png", b"\xff\xfe.png"]
    for kind in "ab":
        (tmp_path / "src" / kind).mkdir(parents=True)
        for number, name in enumerate(names):
            Path(os.fsdecode(os.fsencode(tmp_path / "src" / kind) + b"/" + name)).write_bytes(PICTURES[number])
    found = prepared(tmp_path, "image_folder", held_out="none")
    assert found.samples == {"train": 2 * len(names)} and not found.rejected
    rows = found.rows["train"]
    assert rows["a/caf%E9.png"]["image"] != rows["a/café.png"]["image"]
    assert rows["a/%25E9.png"]["image"] == PICTURES[NAMES.index("%E9.png")]
    assert all(rows[f"a/{name}"]["image"] == PICTURES[i] for i, name in enumerate(NAMES) if "E9" not in name)


def test_keys_of_names_that_are_not_utf8_can_be_reversed() -> None:
    names = [b"a%b", b"%25", b"%e9", b"%E9", b"\xe9", b"%25\xe9", b"%2525", b"%7F\x80%"]
    keys = [utf8_name(os.fsdecode(name)) for name in names]
    assert len(set(keys)) == len(names)
    for name, key in zip(names, keys, strict=True):
        raw = key.encode()
        for code in range(255, 127, -1):
            raw = raw.replace(b"%%%02X" % code, bytes([code]))
        assert raw.replace(b"%25", b"%") == name


def test_a_class_that_is_not_utf8(tmp_path: Path) -> None:
    for kind in (b"a", b"\xe9"):
        folder = Path(os.fsdecode(os.fsencode(tmp_path / "src") + b"/" + kind))
        write(folder, {f"{i}.png": PICTURES[i] for i in range(5)})
    assert prepared(tmp_path, "image_folder").manifest.classes == ("a", "%E9")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train.txt", "one\n\ntwo\n".encode("utf-16"), r"train\.txt is UTF-16"),
        ("train.jsonl", '{"text": "one"}\n'.encode("utf-16-le"), r"train\.jsonl is UTF-16"),
        ("train.txt", "one".encode("utf-32"), "UTF-32"),
    ],
)
def test_other_encodings_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write(tmp_path / "src", {name: content})
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, "text")


def test_byte_order_marks_and_line_ends_of_windows(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    texts = {"train.txt": bom + b"one\r\n\r\ntwo\r\n", "test.jsonl": bom + b'{"text": "three"}\r\n{"text": "four"}\r\n'}
    write(tmp_path / "src", texts)
    found = prepared(tmp_path, "text")
    assert {row["text"] for rows in found.rows.values() for row in rows.values()} == {"one", "two", "three", "four"}
    mesh = bom + off().replace(b"\n", b"\r\n")
    points = bom + b"0,0,0\r\n1,0,0\r\n"
    write(tmp_path / "m" / "src", {f"{c}/{s}/0.off": mesh for c in "ab" for s in ("train", "test")})
    assert prepared(tmp_path / "m", "modelnet40").samples == {"train": 2, "test": 2}
    write(tmp_path / "p" / "src", {f"{c}/{i}.txt": points for c in "ab" for i in range(5)})
    found = prepared(tmp_path / "p", "modelnet40")
    assert found.samples == {"train": 8, "test": 2} and "own data" in found.manifest.licence


@pytest.mark.parametrize(("stem", "licence"), [("{}_000{}", "ModelNet"), ("{}-{}", "own data"), ("{1}", "own data")])
def test_own_clouds_of_ordinary_things_do_not_get_modelnets_licence(tmp_path: Path, stem: str, licence: str) -> None:
    names = [f"{c}/{stem.format(c, i)}.off" for c in ("chair", "table") for i in range(5)]
    write(tmp_path / "src", dict.fromkeys(names, off()))
    assert licence in prepared(tmp_path, "modelnet40").manifest.licence


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str = "", **options: Any) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def flat(value: float, kind: Any) -> np.ndarray:
    return np.full((2, 2), value, kind)


@pytest.mark.parametrize(
    "content, wanted",
    [
        (encoded(flat(200, np.uint16)), 1),
        (encoded(flat(300, np.uint16)), 1),
        (encoded(flat(65535, np.uint16)), 255),
        (encoded(flat(200, np.uint16), "TIFF"), 1),
        (encoded(flat(32768, ">u2"), "TIFF"), 128),
        (b"P5\n2 2\n65535\n" + flat(200, ">u2").tobytes(), 1),
        (b"P5\n2 2\n1023\n" + flat(1023, ">u2").tobytes(), 255),
        (encoded(flat(0.5, np.float32), "TIFF"), 128),
        (encoded(flat(0.001, np.float32), "TIFF"), 0),
        (encoded(flat(255, np.uint8), mode="1"), 255),
        (encoded(flat(7, np.uint8), mode="P", transparency=7), 255),
        (encoded(np.dstack([flat(0, np.uint8)] * 4)), 255),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_scaled_by_the_range_of_their_type(content: bytes, wanted: int, channels: int) -> None:
    assert decode_image(content, channels).ravel().tolist() == [wanted] * 4 * channels


@pytest.mark.parametrize("pixels", [flat(200, np.int32), flat(200, np.float32), flat(np.nan, np.float32)])
def test_pixels_without_a_range_are_quarantined(pixels: np.ndarray) -> None:
    with pytest.raises(BadSample, match="usual white|outside 0 to 1"):
        decode_image(encoded(pixels, "TIFF"), 1)


LABELS: dict[str, tuple[pa.Array, list[str], list[int]]] = {
    "dictionary": (pa.array(["dog", "cat", "dog"]).dictionary_encode(), ["cat", "dog"], [1, 0, 1]),
    "dictionary of numbers": (pa.array([2, 0, 2]).dictionary_encode(), ["0", "1", "2"], [2, 0, 2]),
    "boolean": (pa.array([True, False, True]), ["false", "true"], [1, 0, 1]),
    "small numbers": (pa.array([1, 0, 1], pa.uint8()), ["0", "1"], [1, 0, 1]),
    "large numbers": (pa.array([1, 0, 1], pa.uint64()), ["0", "1"], [1, 0, 1]),
    "large strings": (pa.array(["b", "a", "b"], pa.large_string()), ["a", "b"], [1, 0, 1]),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_any_type_that_can_be_classes(tmp_path: Path, name: str) -> None:
    column, classes, numbers = LABELS[name]
    table(tmp_path / "src" / "train-0.parquet", image=images(3), label=column)
    found = prepared(tmp_path, "table")
    assert list(found.manifest.classes) == classes
    assert [found.rows["train"][f"train-0.parquet#0.{row}"]["label"] for row in range(3)] == numbers


@pytest.mark.parametrize(
    "column, message",
    [
        (pa.array([0.0, 1.0, 2.0]), "label is double, wanted .*label="),
        (pa.array([[0], [0, 1], []]), "label is list"),
        (pa.array([90_000_000_000, 1, 2]), "wanted class numbers below"),
        (pa.array([-1, 0, 1]), "label -1"),
        (pa.array([None] * 3), "label is null"),
    ],
)
def test_labels_that_cannot_be_classes_are_refused(tmp_path: Path, column: pa.Array, message: str) -> None:
    table(tmp_path / "src" / "train-0.parquet", image=images(3), label=column)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, "table")
    assert prepared(tmp_path, "table", label="").manifest.classes == ()


def test_missing_and_unknown_labels_are_quarantined(tmp_path: Path) -> None:
    table(tmp_path / "src" / "train-0.parquet", image=images(4), label=["a", None, "b", "c"])
    found = prepared(tmp_path, "table", classes="b,a")
    assert [row["label"] for _, row in sorted(found.rows["train"].items())] == [1, 0]
    assert found.rejected == {"train-0.parquet#0.1": "no label", "train-0.parquet#0.3": "an unknown label"}


def test_files_that_mix_numbers_and_texts_as_labels_are_refused(tmp_path: Path) -> None:
    table(tmp_path / "src" / "train-0.parquet", image=images(2), label=["a", "b"])
    table(tmp_path / "src" / "train-1.parquet", image=images(2), label=[0, 1])
    with pytest.raises(UserError, match="texts and numbers"):
        prepared(tmp_path, "table")


def test_class_names_in_another_order_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        facts = f'{{"info": {{"features": {{"label": {{"names": ["{names[0]}", "{names[1]}"]}}}}}}}}'
        (tmp_path / "src").mkdir(exist_ok=True)
        made = pa.table({"image": images(2, 2 * number), "label": [0, 1]}).replace_schema_metadata(
            {"huggingface": facts}
        )
        pq.write_table(made, tmp_path / "src" / f"train-{number}.parquet")
    with pytest.raises(UserError, match=r"train-1\.parquet class 0 is 'dog', in train-0\.parquet 'cat'"):
        prepared(tmp_path, "table")


def test_a_share_of_a_table_is_held_out_exactly(tmp_path: Path) -> None:
    for number in range(4):
        table(tmp_path / "src" / f"{number}.parquet", image=images(25, 25 * number), label=[0, 1, 2, 3, 4] * 5)
    found = prepared(tmp_path, "table", held_out="0.3")
    assert found.samples == {"train": 70, "test": 30}
    assert not found.rows["train"].keys() & found.rows["test"].keys()


def test_held_out_is_refused_where_a_split_is_there(tmp_path: Path) -> None:
    table(tmp_path / "src" / "mydata_train.parquet", image=images(2), label=[0, 1])
    table(tmp_path / "src" / "default" / "partial-test" / "0000.parquet", image=images(2, 2), label=[0, 1])
    with pytest.raises(UserError, match=r"held_out=0\.2.*train, test"):
        prepared(tmp_path, "table", held_out="0.2")
    assert prepared(tmp_path, "table").samples == {"train": 2, "test": 2}


@pytest.mark.parametrize("name", ["train_test.parquet", "test/train-0.parquet", "train/my_val.parquet"])
def test_files_that_name_two_splits_are_refused(tmp_path: Path, name: str) -> None:
    table(tmp_path / "src" / name, image=images(2), label=[0, 1])
    with pytest.raises(UserError, match="more than one split"):
        prepared(tmp_path, "table")


def test_a_table_s_images_are_looked_at(tmp_path: Path) -> None:
    grey = pa.array([png(np.full((4, 6), value, np.uint8)) for value in range(3)], pa.binary())
    table(tmp_path / "src" / "train-0.parquet", image=grey)
    assert prepared(tmp_path, "table").manifest.features["image"] == ImageFeature(channels=1, size=(4, 6))
    table(tmp_path / "b" / "src" / "train-0.parquet", image=[*images(2).to_pylist(), png(np.zeros((5, 5), np.uint8))])
    assert prepared(tmp_path / "b", "table").manifest.features["image"] == ImageFeature(channels=3, size=None)


def test_a_share_of_the_samples_of_tars_is_held_out(tmp_path: Path) -> None:
    for number in range(2):
        members = {
            f"{i:03d}{end}": content
            for i in range(50 * number, 50 * number + 50)
            for end, content in ((".JPG", PICTURES[i]), (".cls", b"%d" % (i % 3)))
        }
        write(tmp_path / "src", {f"{number:05d}.tar": tar(members)})
    found = prepared(tmp_path, "webdataset", held_out="0.4")
    assert sum(found.samples.values()) == 100 and 20 <= found.samples["test"] <= 60
    assert found.manifest.features["image"] == ImageFeature(channels=3, size=(4, 4))


DOTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "the last dot": (["22.05.jpg", "22.05.cls", "22.06.jpg", "22.06.cls"], ["22.05", "22.06"], []),
    "one without a label": (["22.05.jpg", "22.05.cls", "22.06.jpg"], ["22.05"], ["22.06"]),
    "suffixes of two parts": (["x.img.jpg", "x.lbl.cls"], ["x"], []),
    "another picture of a sample": (["x.jpg", "x.cls", "x.mask.png"], ["x"], []),
    "another picture first": (["x.mask.png", "x.jpg", "x.cls"], ["x"], []),
    "two pictures": (["x.left.jpg", "x.right.jpg", "x.cls"], [], ["x.left", "x.right", "x"]),
    "a second picture": (["x.jpg", "x.png", "x.cls"], ["x"], ["x.png"]),
}


@pytest.mark.parametrize("name", DOTS)
def test_dots_in_names_of_a_tar(tmp_path: Path, name: str) -> None:
    files, kept, rejected = DOTS[name]
    members = {file: b"0" if file.endswith("cls") else PICTURES[number] for number, file in enumerate(files)}
    write(tmp_path / "src", {"train-0.tar": tar({"a.jpg": PICTURES[9], "a.cls": b"0", **members})})
    found = prepared(tmp_path, "webdataset", bad=1.0)
    assert found.rows["train"].keys() == {f"train-0.tar/{key}" for key in ["a", *kept]}
    assert found.rejected.keys() == {f"train-0.tar/{key}" for key in rejected}


def test_an_index_takes_whole_files(tmp_path: Path) -> None:
    table(tmp_path / "src" / "pets.parquet", image=images(10), label=[0, 1] * 5)
    assert index("table", str(tmp_path / "src"), str(tmp_path / "out")).split("train").samples == 10
    with pytest.raises(UserError, match="held_out"):
        index("table", str(tmp_path / "src"), str(tmp_path / "b"), PrepareConfig(options={"held_out": "0.2"}))


def test_class_names_that_repeat_keep_their_numbers(tmp_path: Path) -> None:
    """ImageNet has two classes called crane; a label after them was once rejected."""
    (tmp_path / "src").mkdir()
    facts = '{"info": {"features": {"label": {"names": ["crane", "crane", "heron"]}}}}'
    made = pa.table({"image": images(3), "label": [0, 1, 2]}).replace_schema_metadata({"huggingface": facts})
    pq.write_table(made, tmp_path / "src" / "train-0.parquet")
    found = prepared(tmp_path, "table")
    assert sorted(row["label"] for row in found.rows["train"].values()) == [0, 1, 2] and not found.rejected
