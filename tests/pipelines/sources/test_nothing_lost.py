"""What goes into a source comes out: as a sample, in the quarantine, or in a line about what was left out."""

import io
import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from perceiver.config import UserError
from pipelines.index import index
from pipelines.prepare import PrepareConfig, prepare
from pipelines.transforms.decode import decode_image
from tests.pipelines.raw import off, tar, write
from tests.pipelines.sources.test_layouts import PICTURES, Prepared, pictures, prepared, table

CLOUD = b"".join(b"%d,%d,%d\n" % (i, i * i % 7, i % 3) for i in range(20))


def csv_rows(root: Path, header: str, *rows: str) -> None:
    write(root / "src", {"a.csv": "\n".join([header, *rows]).encode()})


def left_out(found: Prepared) -> str:
    return next((note for note in found.notes if note.startswith("left out")), "")


def test_json_lines_have_any_separator_in_strings_and_may_lack_a_column(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d", "label": "x"}, {"text": "e", "label": "y"}]
    write(tmp_path / "src", {"a.jsonl": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()})
    found = prepared(tmp_path, "csv", held_out="none")
    assert found.manifest.classes == ("x", "y")
    assert found.rejected == {"a.jsonl#1": "no label"}
    write(tmp_path / "b" / "src", {"0.png": PICTURES[0], "1.png": PICTURES[1]})
    lines = b'{"file_name": "0.png"}\n{"file_name": "1.png", "label": "x"}'
    write(tmp_path / "b" / "src", {"metadata.jsonl": lines})
    assert prepared(tmp_path / "b", "image_folder", held_out="none").rejected == {"0.png": "no label"}


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    csv_rows(tmp_path, "text,label", "z" * 200_000 + ",a", "w,b")
    assert prepared(tmp_path, "csv", held_out="none").samples == {"train": 2}


def test_files_in_tables_may_have_any_name(tmp_path: Path) -> None:
    names = ["10:30.png", "a\\b.png", "x%20#?;.png"]
    write(tmp_path / "src", {name: PICTURES[i] for i, name in enumerate(names)})
    csv_rows(tmp_path, "image,label", *(f"{name},c" for name in names))
    assert prepared(tmp_path, "csv", held_out="none").samples == {"train": 3}
    write(tmp_path / "b" / "src", {name: PICTURES[i] for i, name in enumerate(names)})
    rows = "\n".join(["file_name,label", *(f"{name},c" for name in names)])
    write(tmp_path / "b" / "src", {"metadata.csv": rows.encode()})
    assert prepared(tmp_path / "b", "image_folder", held_out="none").rows["train"].keys() == set(names)


def test_the_column_of_splits_follows_the_rules_of_names(tmp_path: Path) -> None:
    csv_rows(tmp_path, "text,split", "a,train", "b,val", "c,dev")
    with pytest.raises(UserError, match=r"val \(a.csv#2\) and dev \(a.csv#3\)"):
        prepared(tmp_path, "csv")


def test_a_group_in_two_splits_is_refused(tmp_path: Path) -> None:
    csv_rows(tmp_path, "text,split,group", "a,train,1", "b,test,1")
    with pytest.raises(UserError, match=r"group 1 is in train \(a.csv#1\) and in test \(a.csv#2\)"):
        prepared(tmp_path, "csv")


@pytest.mark.parametrize(
    "groups, test",
    [
        ([0] * 90 + list(range(1, 11)), 10),  # one is larger than the share: it is trained on
        ([i // 10 for i in range(100)], 20),
        ([""] * 100, 20),  # rows without a group are their own
        ([i // 50 for i in range(100)], 50),  # the smallest that is possible
        ([0] * 100, 0),
    ],
)
def test_groups_are_held_out_up_to_the_share(tmp_path: Path, groups: list[int | str], test: int) -> None:
    csv_rows(tmp_path, "text,group", *(f"t{i},{group}" for i, group in enumerate(groups)))
    found = prepared(tmp_path, "csv")
    assert found.samples.get("test", 0) == test
    assert any("held out" in note for note in found.notes) == bool(test)


def test_lines_about_splits_count_what_they_name(tmp_path: Path) -> None:
    csv_rows(tmp_path, "text,split", "a,train", "b,train", "c,test")
    assert "splits: train 2 rows (a.csv#1), test 1 row (a.csv#3)" in prepared(tmp_path, "csv").notes


def test_a_share_leaves_each_class_a_file_to_train_on(tmp_path: Path) -> None:
    pictures(tmp_path, "cat/0.png", "dog/1.png", "dog/2.png")
    assert prepared(tmp_path, "image_folder", held_out="0.9").samples == {"train": 2, "test": 1}
    pictures(tmp_path / "b", "cat/0.png", "dog/1.png")
    found = prepared(tmp_path / "b", "image_folder")
    assert found.samples == {"train": 2}
    assert not any("held out:" in note for note in found.notes)
    table(tmp_path / "c" / "src" / "a.parquet", text=["a", "b", "c"])
    assert prepared(tmp_path / "c", "table", held_out="0.999").samples == {"train": 1, "test": 2}


def test_a_tar_with_a_name_twice_or_other_members_loses_nothing(tmp_path: Path) -> None:
    members = {"a.png": PICTURES[0], "b.gif": b"x", "c.png": PICTURES[1], "./a.png": PICTURES[2]}
    archive = tar(members).replace(b"./a.png", b"a.png\0\0")
    # The checksum of the header that was changed.
    at = archive.rindex(b"a.png\0\0")
    header = archive[at : at + 148] + b" " * 8 + archive[at + 156 : at + 512]
    archive = archive[: at + 148] + b"%06o\0 " % sum(header) + archive[at + 156 :]
    write(tmp_path / "src", {"x.tar": archive})
    found = prepared(tmp_path, "webdataset", held_out="none")
    assert found.rows["train"].keys() == {"x.tar/a", "x.tar/c"}
    assert found.rejected == {
        "x.tar/b": "a sample without image",
        "x.tar/a": "a second sample of this name in the tar",
    }


def test_a_tar_with_texts_and_numbers_as_labels_is_refused(tmp_path: Path) -> None:
    labels = {"a.cls": b"cat", "b.cls": b"1", "c.cls": b"dog"}
    members = {name: content for n in "abc" for name, content in ((f"{n}.png", PICTURES[0]), (f"{n}.cls", b""))}
    write(tmp_path / "src", {"x.tar": tar({**members, **labels})})
    with pytest.raises(UserError, match=r"texts \(cat\) and numbers \(1\)"):
        prepared(tmp_path, "webdataset")


def test_lists_of_objects(tmp_path: Path) -> None:
    files = dict.fromkeys(("night stand/n 1.txt", "night stand/2.txt", "dog/2.txt", "dog/3.txt", "dog/4.txt"), CLOUD)
    lists = {"x_train.txt": b"\xef\xbb\xbfn 1\r\ndog/2\r\n2\r\n", "x_test.txt": b"dog/3.txt\n"}
    write(tmp_path / "src", files | lists)
    found = prepared(tmp_path, "modelnet40")
    assert {split: set(rows) for split, rows in found.rows.items()} == {
        "train": {"night stand/n 1.txt", "dog/2.txt"},
        "test": {"dog/3.txt"},
    }
    assert found.rejected.keys() == {"2"}
    assert "objects in no list: 2 (dog/4.txt)" in left_out(found)
    write(tmp_path / "b" / "src", files | lists | {"x_test.txt": b"n 1"})
    with pytest.raises(UserError, match="n 1 is in the lists of train and test"):
        prepared(tmp_path / "b", "modelnet40")


def test_names_of_shapes_are_lines(tmp_path: Path) -> None:
    write(tmp_path / "src", {"shape_names.txt": b"night stand\r\ntv\r\n", "x.off": off()})
    for name, rows in {"a_train.h5": 4, "a_test.h5": 2}.items():
        with h5py.File(tmp_path / "src" / name, "w") as file:
            file["data"] = np.random.default_rng(0).random((rows, 16, 3), np.float32)
            file["label"] = np.arange(rows)[:, None] % 2
    found = prepared(tmp_path, "modelnet40")
    assert found.manifest.classes == ("night stand", "tv")
    assert "splits: train 4 objects (a_train.h5#0), test 2 objects (a_test.h5#0)" in found.notes
    assert "files next to HDF5 files: 1 (x.off)" in left_out(found)


def test_imagenet_takes_validation_images_of_any_name_and_shows_the_rest(tmp_path: Path) -> None:
    names = ["train/n01440764/0.JPEG", "val/n01440764/n01440764_9.JPEG", "train/dogs/1.JPEG", "test/2.JPEG"]
    found = Prepared(pictures(tmp_path, *names).parent, "imagenet", 0.5, {})
    assert found.samples == {"train": 1, "val": 1}
    assert "images outside train/SYNSET/ and val/: 2 (test/2.JPEG)" in left_out(found)
    pictures(tmp_path / "b", "a/train/n01440764/0.JPEG", "b/train/n01440764/0.JPEG")
    with pytest.raises(UserError, match=r"has train/n01440764/0.JPEG twice"):
        prepared(tmp_path / "b", "imagenet")


def test_point_files_in_utf16_are_named_so(tmp_path: Path) -> None:
    texts = {"a/0.off": off(), "a/1.txt": CLOUD, "a/2.ply": b"ply\n"}
    good = {f"b/{i}.txt": CLOUD for i in range(5)}
    write(tmp_path / "src", good | {name: text.decode().encode("utf-16") for name, text in texts.items()})
    found = prepared(tmp_path, "points_folder", held_out="none")
    assert found.rejected == dict.fromkeys(texts, "UTF-16, wanted UTF-8")


def test_rows_of_tables_without_an_input_are_rejected(tmp_path: Path) -> None:
    table(tmp_path / "src" / "a.parquet", text=pa.array(["a", None, "c"]))
    found = prepared(tmp_path, "table", held_out="none")
    assert found.rejected == {"a.parquet#0.1": "no text"}


@pytest.mark.parametrize("option", [{}, {"index": True}])
def test_a_column_without_any_label_is_refused(tmp_path: Path, option: dict[str, bool]) -> None:
    table(tmp_path / "src" / "a.parquet", text=["a", "b"], label=pa.array([None, None], pa.int64()))
    with pytest.raises(UserError, match="has no labels"):
        if option:
            index("table", str(tmp_path / "src"), str(tmp_path / "out"))
        else:
            prepared(tmp_path, "table")


@pytest.mark.parametrize("kind", [pa.bool_(), pa.string_view(), pa.uint8()])
def test_labels_of_any_type_are_indexed(tmp_path: Path, kind: pa.DataType) -> None:
    values = [True, False] if kind == pa.bool_() else ["b", "a"] if kind == pa.string_view() else [1, 0]
    table(tmp_path / "src" / "a.parquet", text=["x", "y"], label=pa.array(values, kind))
    assert len(index("table", str(tmp_path / "src"), str(tmp_path / "out"), PrepareConfig()).classes) == 2


def test_a_file_of_a_name_that_a_manifest_cannot_have_is_not_indexed(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "src" / "a.parquet")
    (tmp_path / "src" / "a.parquet").rename(os.fsdecode(os.fsencode(tmp_path / "src") + b"/\xe9.parquet"))
    with pytest.raises(UserError, match="rename the file"):
        index("table", str(tmp_path / "src"), str(tmp_path / "out"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode, clear", [("L", 10), ("RGB", (10, 10, 10)), ("P", 10), ("1", 0)])
def test_a_transparent_colour_is_white(mode: str, clear: Any, channels: int) -> None:
    image = Image.new(mode, (2, 2), clear if mode != "P" else 10)
    if mode == "P":
        image.putpalette([10, 10, 10] * 256)
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=clear)
    assert (decode_image(stream.getvalue(), channels) == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_in_lab_are_converted(channels: int) -> None:
    stream = io.BytesIO()
    Image.new("LAB", (2, 2), (128, 128, 128)).save(stream, "TIFF")
    assert decode_image(stream.getvalue(), channels).shape == (2, 2, channels)


def test_a_data_set_is_named_after_its_table_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv_rows(tmp_path, "text", "a", "b")
    monkeypatch.chdir(tmp_path / "src")
    config = PrepareConfig(parallel="off")
    assert prepare("csv", "a.csv", str(tmp_path / "1"), config).name == "a"
    assert prepare("csv", ".", str(tmp_path / "2"), config).name == "src"
