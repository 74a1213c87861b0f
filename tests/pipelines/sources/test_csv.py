"""Tables of files, texts and labels as a source."""

import json
import os
from pathlib import Path

import pytest

from perceiver.config import UserError
from pipelines.features import AudioFeature, ImageFeature, LabelsFeature, PointsFeature, TextFeature
from pipelines.prepare import PrepareConfig, prepare
from pipelines.sources._common import MAX_FILE
from tests.pipelines.raw import write
from tests.pipelines.sources.test_layouts import PICTURES, prepared


def lines(*rows: str) -> bytes:
    return ("\n".join(rows) + "\n").encode()


def test_images_with_captions_labels_and_splits(tmp_path: Path) -> None:
    files = {f"img/{i}.png": PICTURES[i] for i in range(6)}
    rows = [f'img/{i}.png,"a, {i}",{"dog" if i % 2 else "cat"},{"training" if i < 4 else "dev"}' for i in range(6)]
    write(tmp_path / "src", files | {"all.csv": lines("photo,caption,kind,part", *rows)})
    found = prepared(tmp_path, "csv", image="photo", text="caption", label="kind", split="part")
    assert found.manifest.classes == ("cat", "dog") and found.samples == {"train": 4, "val": 2} and not found.rejected
    assert found.manifest.features["image"] == ImageFeature(channels=3, size=(4, 4))
    row = found.rows["val"]["all.csv#6"]
    assert (row["image"], row["text"], row["label"]) == (PICTURES[5], "a, 5", 1)


def test_one_table_with_several_labels(tmp_path: Path) -> None:
    write(tmp_path / "src", {"t.tsv": lines("text\ttags", "one\tb; a", "two\t", "three\tc;a")})
    config = PrepareConfig(parallel="off", options={"labels": "tags", "held_out": "none"})
    manifest = prepare("csv", str(tmp_path / "src" / "t.tsv"), str(tmp_path / "out"), config)
    assert manifest.classes == ("a", "b", "c")
    assert manifest.features == {"text": TextFeature(), "label": LabelsFeature()}


def test_json_lines_with_lists_and_points(tmp_path: Path) -> None:
    rows = [
        {"points": "a.txt", "labels": [0, 10]},
        {"points": "a.txt", "labels": ["x"]},
        {"points": "a.txt", "labels": [1.5]},
    ]
    write(tmp_path / "src", {"a.txt": b"0 0 0 9\n1 0 0 9\n", "t.jsonl": lines(*map(json.dumps, rows))})
    found = prepared(tmp_path, "csv", held_out="none", features="1", classes="0,10,x")
    assert found.manifest.features["points"] == PointsFeature(features=1)
    assert [row["label"] for row in found.rows["train"].values()] in ([[0, 1], [2]], [[2], [0, 1]])
    assert found.rejected == {"t.jsonl#3": "a label that is a float"}


def test_lists_in_json_zero_and_false_are_labels_and_floats_are_rejected(tmp_path: Path) -> None:
    rows = [{"text": "a", "labels": label} for label in (0, False, '["x", 0]', "[]", "[x];y", None, [1.5])]
    write(tmp_path / "src", {"t.jsonl": lines(*map(json.dumps, rows))})
    found = prepared(tmp_path, "csv", held_out="none")
    assert found.manifest.classes == ("0", "[x]", "false", "x", "y")
    labels = [found.rows["train"][f"t.jsonl#{number}"]["label"] for number in range(1, 7)]
    assert labels == [[0], [2], [3, 0], [], [1, 4], []]
    assert found.rejected == {"t.jsonl#7": "a label that is a float"}


def test_rows_of_a_group_stay_together(tmp_path: Path) -> None:
    write(tmp_path / "src", {"t.csv": lines("text,label,who", *(f"text {i},{i % 2},{i // 5}" for i in range(50)))})
    found = prepared(tmp_path, "csv", group="who", held_out="0.3")
    assert found.samples == {"train": 35, "test": 15}
    groups = [{(int(key.split("#")[1]) - 1) // 5 for key in rows} for rows in found.rows.values()]
    assert not groups[0] & groups[1]


def test_special_and_large_files_are_not_read(tmp_path: Path) -> None:
    write(
        tmp_path / "src",
        {"a.wav": b"sound", "t.csv": lines("audio", "a.wav", "fifo.wav", "zero.wav", "large.wav", "x")},
    )
    os.mkfifo(tmp_path / "src" / "fifo.wav")
    (tmp_path / "src" / "zero.wav").symlink_to("/dev/zero")
    (tmp_path / "src" / "x").mkdir()
    with (tmp_path / "src" / "large.wav").open("wb") as file:
        file.truncate(MAX_FILE + 1)
    found = prepared(tmp_path, "csv", bad=1.0, held_out="none")
    assert found.samples == {"train": 1} and found.rejected.keys() == {f"t.csv#{row}" for row in (2, 3, 4, 5)}


def test_rows_that_cannot_be_used_are_quarantined(tmp_path: Path) -> None:
    rows = ["a.wav,x", "gone.wav,x", "../a.wav,x", ",x", "a.wav,", "/etc/passwd,x"]
    write(tmp_path / "src", {"a.wav": b"sound", "t.csv": lines("audio,label", *rows)})
    found = prepared(tmp_path, "csv", bad=1.0, held_out="none")
    assert found.samples == {"train": 1} and found.manifest.features["audio"] == AudioFeature()
    assert {key: reason.split(",")[0].split(" '")[0] for key, reason in found.rejected.items()} == {
        "t.csv#2": "unreadable file: FileNotFoundError",
        "t.csv#3": "got file name",
        "t.csv#4": "no audio",
        "t.csv#5": "no label",
        "t.csv#6": "got file name",
    }


@pytest.mark.parametrize(
    "table, options, message",
    [
        (lines("a,b", "1,2"), {}, "none of the columns a, b is an input"),
        (lines("text,label", "x,y"), {"image": "photo"}, "option image=photo: .*no such column; it has text, label"),
        (lines("text,label,labels", "x,y,z"), {}, "label and labels"),
        (lines("text,split", "x,nowhere"), {}, "'nowhere', wanted train, val or test"),
        (lines("text,label"), {}, "no rows"),
        (lines("text,label", "x,"), {}, "no row has a label"),
        (lines("text", "x"), {"colour": "y"}, "unknown option 'colour'"),
        ("text\nx\n".encode("utf-16"), {}, "UTF-16"),
    ],
)
def test_unusable_tables_are_refused(tmp_path: Path, table: bytes, options: dict[str, str], message: str) -> None:
    write(tmp_path / "src", {"t.csv": table})
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, "csv", **options)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        prepare("csv", str(tmp_path / "t.csv"), str(tmp_path / "out"))
