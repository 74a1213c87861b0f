"""Columns of Parquet tables: media as hubs store them, numbers, and rows divided by columns."""

import io
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from perceiver.config import UserError
from pipelines.features import AudioFeature, PointsFeature, SeriesFeature, TargetFeature
from pipelines.index import index
from pipelines.prepare import PrepareConfig, prepare
from tests.pipelines.raw import write
from tests.pipelines.recordings import sound_file
from tests.pipelines.sources.test_layouts import prepared, table


def sound(number: int) -> bytes:
    return sound_file(np.full(400, 100 * number, np.int16), 8000)


def test_sound_as_hubs_store_it(tmp_path: Path) -> None:
    """Bytes, or only the path of a file next to the table; a path that leaves the folder is quarantined."""
    write(tmp_path / "src" / "data", {"wav/2.flac": sound(2)})
    cells = [
        {"bytes": sound(1), "path": "elsewhere.flac"},
        {"bytes": None, "path": "wav/2.flac"},
        {"bytes": None, "path": "../secret"},
        {"bytes": None, "path": "gone.flac"},
        {"bytes": None, "path": None},
    ]
    table(tmp_path / "src" / "data" / "train.parquet", speech=cells, label=["a", "b", "a", "b", "a"])
    found = prepared(tmp_path, "table", bad=1.0, audio="speech")
    assert found.manifest.features["audio"] == AudioFeature()
    assert [found.rows["train"][f"data/train.parquet#0.{row}"]["audio"] for row in (0, 1)] == [sound(1), sound(2)]
    reasons = [found.rejected[f"data/train.parquet#0.{row}"] for row in (2, 3, 4)]
    assert reasons[0].startswith("got file name") and reasons[1:] == ["unreadable file: FileNotFoundError", "no audio"]


def test_numbers_lists_and_points(tmp_path: Path) -> None:
    rows = 12
    clouds = [[[float(i), 0.0, 1.0, 0.5]] * 3 for i in range(rows - 1)] + [[[1.0, float("nan"), 0.0, 0.0]]]
    columns: dict[str, Any] = {
        "a": list(range(rows)),
        "b": [None if i == 3 else i / 2 for i in range(rows)],
        "kind": ["x", "y"] * 6,
        "cloud": clouds,
        "wave": [[float(i), i + 1.0] for i in range(rows)],
    }
    table(tmp_path / "src" / "train.parquet", **columns)
    found = prepared(tmp_path, "table", label="kind", series="all", points="cloud", features="1")
    assert found.manifest.features["series"] == SeriesFeature(channels=2, length=1, names=("a", "b"))
    assert found.manifest.features["points"] == PointsFeature(features=1)
    row = found.rows["train"]["train.parquet#0.4"]
    assert np.frombuffer(row["series"], "<f4").tolist() == [4, 2] and len(row["points"]) == 3 * 4 * 4
    assert found.rejected == {
        "train.parquet#0.3": "no number in b",
        "train.parquet#0.11": "NaN or infinite points",
    }
    options = PrepareConfig(options={"series": "wave", "label": "kind"})
    other = prepare("table", str(tmp_path / "src"), str(tmp_path / "waves"), options)
    assert other.features["series"] == SeriesFeature(channels=1, length=2, names=("wave",))


def test_a_column_of_splits_divides_the_rows(tmp_path: Path) -> None:
    parts = ["train", "train", "Validation", "train", "test", "train"]
    for name in ("a", "b"):
        table(tmp_path / "src" / f"{name}.parquet", text=[f"{name}{i}" for i in range(6)], part=parts)
    found = prepared(tmp_path, "table", split="part")
    assert {split: sorted(row["text"] for row in rows.values()) for split, rows in found.rows.items()} == {
        "train": ["a0", "a1", "a3", "a5", "b0", "b1", "b3", "b5"],
        "val": ["a2", "b2"],
        "test": ["a4", "b4"],
    }
    assert "train 8 rows, val 2 rows, test 2 rows, by column part" in "".join(found.notes)


def test_groups_stay_together(tmp_path: Path) -> None:
    who = [None if i % 50 == 7 else i // 5 for i in range(400)]
    for name, first in (("a", 0), ("b", 200)):
        rows = range(first, first + 200)
        table(tmp_path / "src" / f"{name}.parquet", text=[f"t{i}" for i in rows], who=who[first : first + 200])
    found = prepared(tmp_path, "table", group="who", held_out="0.3")
    groups = {
        split: {who[int(row["text"][1:])] for row in rows.values()} - {None} for split, rows in found.rows.items()
    }
    assert not groups["train"] & groups["test"] and sum(found.samples.values()) == 400
    assert 60 < found.samples["test"] < 180


@pytest.mark.parametrize(
    "columns, options, message",
    [
        ({"text": ["a", "b"], "split": ["train", "nowhere"]}, {}, "column split has 'nowhere'.*--option split="),
        ({"text": ["a", "b"], "split": ["train", None]}, {}, "'None', wanted train"),
        ({"text": ["a", "b"], "split": ["train", "test"], "group": [1, 1]}, {}, "group 1 is in train and in test"),
        ({"text": ["a", "b"], "split": ["val", "dev"]}, {}, "would both be the split val"),
        ({"x": ["a", "b"], "y": [1, 2]}, {}, "--option series=all"),
        ({"text": ["a", "b"], "y": [[1], [2]]}, {"points": "y"}, "column y is list.*wanted a list of lists"),
        ({"text": ["a", "b"], "y": ["q", "r"]}, {"series": "y"}, "no numbers for the feature series in y"),
        ({"text": ["a", "b"], "y": [1, 2]}, {"audio": "y"}, "column y is int64, wanted binary"),
    ],
)
def test_unusable_columns_are_refused(tmp_path: Path, columns: Any, options: dict[str, str], message: str) -> None:
    table(tmp_path / "src" / "t.parquet", **columns)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, "table", **options)


def test_an_index_leaves_out_columns_that_must_be_converted(tmp_path: Path) -> None:
    table(tmp_path / "src" / "train.parquet", text=["a", "b"], split=["x", "y"], series=[1.0, 2.0], labels=[["a"], []])
    assert list(index("table", str(tmp_path / "src"), str(tmp_path / "out")).features) == ["text"]


@pytest.mark.parametrize("option", ["target", "labels", "split", "group", "series", "points"])
def test_an_index_refuses_them_by_name(tmp_path: Path, option: str) -> None:
    table(tmp_path / "src" / "train.parquet", text=["a", "b"], column=[1.0, 2.0])
    with pytest.raises(UserError, match=f"--index cannot take the option {option}"):
        index("table", str(tmp_path / "src"), str(tmp_path / "out"), PrepareConfig(options={option: "column"}))


def test_an_index_refuses_several_texts(tmp_path: Path) -> None:
    table(tmp_path / "src" / "train.parquet", a=["a", "b"], b=["c", "d"])
    with pytest.raises(UserError, match="--index cannot take the option text with several columns"):
        index("table", str(tmp_path / "src"), str(tmp_path / "out"), PrepareConfig(options={"text": "a,b"}))


@pytest.mark.parametrize("source", ["table", "csv"])
def test_several_texts_of_a_row_are_read_one_after_the_other(tmp_path: Path, source: str) -> None:
    """A row in which one is missing is quarantined; the separator in a text does not divide it."""
    columns = {"a": ["one", "two", "x\x1fy", "five"], "b": ["1", "", "3", "5"], "c": ["p", "q", "p", "q"]}
    if source == "table":
        table(tmp_path / "src" / "t.parquet", **columns)
    else:
        rows = [",".join(row) for row in zip(*columns.values(), strict=True)]
        write(tmp_path / "src", {"t.csv": "\n".join([",".join(columns), *rows, ""]).encode()})
    found = prepared(tmp_path, source, text="b,a", label="c", held_out="none")
    texts = [row["text"] for row in found.rows["train"].values()]
    assert sorted(texts) == ["1\x1fone", "3\x1fx y", "5\x1ffive"]
    assert list(found.rejected.values()) == ["no text"]


def test_a_column_whose_name_has_a_comma_is_one_text(tmp_path: Path) -> None:
    write(tmp_path / "src", {"t.csv": b'"a,b",a,b\none,1,2\n'})
    found = prepared(tmp_path, "csv", text="a,b", held_out="none")
    assert [row["text"] for row in found.rows["train"].values()] == ["one"]
    assert "columns: text from a,b; not used: a, b" in found.notes


@pytest.mark.parametrize(("text", "message"), [("a,z", "no column z"), ("a,a", "column a is named twice")])
def test_texts_that_are_not_there_are_refused(tmp_path: Path, text: str, message: str) -> None:
    table(tmp_path / "src" / "t.parquet", a=["a", "b"], b=["c", "d"])
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, "table", text=text)


COLUMNS = {
    "a": list(range(12)),
    "b": [i / 2 for i in range(12)],
    "price": [10.0 * i for i in range(12)],
    "kind": ["x", "y", "z"] * 4,
    "part": ["train"] * 8 + ["test"] * 4,
}


@pytest.mark.parametrize("source", ["table", "csv"])
def test_numbers_labels_targets_and_splits_of_one_table(tmp_path: Path, source: str) -> None:
    """Of `series=all` are left out the columns of targets; both have statistics of the training split."""
    options = {"series": "all", "label": "kind", "target": "price", "split": "part"}
    if source == "table":
        table(tmp_path / "src" / "t.parquet", **COLUMNS)
    else:
        rows = [",".join(map(str, row)) for row in zip(*COLUMNS.values(), strict=True)]
        write(tmp_path / "src", {"t.csv": "\n".join([",".join(COLUMNS), *rows, ""]).encode()})
    found = prepared(tmp_path, source, **options)
    features = found.manifest.features
    assert features["series"] == SeriesFeature(channels=2, length=1, names=("a", "b"))
    assert features["target"] == TargetFeature(names=("price",), mean=(35.0,), std=(np.arange(0.0, 80, 10).std(),))
    assert found.manifest.class_counts == {"label": (3, 3, 2)} and found.samples == {"train": 8, "test": 4}
    assert found.manifest.statistics["series"].mean == (3.5, 1.75)


def test_a_damaged_row_group_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "src" / "t.parquet"
    path.parent.mkdir()
    texts, parts = [f"long enough {i} " * 9 for i in range(6)], ["train", "test"] * 3
    pq.write_table(
        pa.table({"text": texts, "split": parts}),
        path,
        row_group_size=3,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    raw = bytearray(path.read_bytes())
    raw[4:60] = b"\xff" * 56
    path.write_bytes(raw)
    found = prepared(tmp_path, "table", bad=1.0)
    assert found.samples == {"train": 1, "test": 2} and len(found.rejected) == 3


def test_hub_folders_name_the_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub"):
        prepare("table", "hf://datasets/someone/something", str(tmp_path / "out"))


class Hub(MemoryFileSystem):
    """Files in memory under the protocol that huggingface_hub registers."""

    protocol = ("hf",)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("hf://").strip("/")


def test_hub_folders_are_read_through_fsspec(tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [0, 1, 0]}), sink)
    fsspec.register_implementation("hf", Hub, clobber=True)
    try:
        Hub().pipe("/datasets/me/pets/data/train-00000.parquet", sink.getvalue())
        here = PrepareConfig(parallel="off")  # processes of a Ray that another test has started do not know the files
        manifest = prepare("table", "hf://datasets/me/pets", str(tmp_path / "out"), here)
    finally:
        fsspec.register_implementation("hf", "huggingface_hub.HfFileSystem", clobber=True)
    assert manifest.splits["train"].samples == 3 and manifest.source == "hf://datasets/me/pets"
