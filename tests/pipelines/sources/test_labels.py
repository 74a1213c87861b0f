"""Several classes per sample, from tables of labels next to files and from Parquet."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from perceiver.config import UserError
from pipelines.features import LabelFeature, LabelsFeature
from pipelines.features.base import ViewConfig
from pipelines.sources import load_source
from pipelines.transforms import BadSample
from tests.pipelines.raw import write
from tests.pipelines.sources.test_csv import lines
from tests.pipelines.sources.test_layouts import PICTURES, images, prepared, table


def source(name: str, root: Path, **options: str) -> None:
    """List the raw data again with other options."""
    load_source(name).listing(str(root / "src"), seed=0, shard_rows=8, options=options)


def test_a_table_next_to_images_gives_several_labels(tmp_path: Path) -> None:
    rows = ["a.png,red; round", "b.png,red", "c.png,", "d.png,round;red"]
    files = {f"{name}.png": PICTURES[number] for number, name in enumerate("abcde")}
    write(tmp_path / "src", files | {"metadata.csv": lines("file_name,labels", *rows)})
    found = prepared(tmp_path, "image_folder", held_out="none")
    assert found.manifest.classes == ("red", "round") and found.manifest.features["label"] == LabelsFeature()
    labels = {key: row["label"] for key, row in found.rows["train"].items()}
    assert labels == {"a.png": [0, 1], "b.png": [0], "c.png": [], "d.png": [1, 0]}
    assert found.rejected == {"e.png": "in no table of labels"}


def test_a_share_of_files_with_several_labels_is_held_out(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "tags": [str(i % 3), "all"]} for i in range(20)]
    files = {f"{i}.png": PICTURES[i] for i in range(20)}
    write(tmp_path / "src", files | {"metadata.jsonl": lines(*map(json.dumps, rows))})
    found = prepared(tmp_path, "image_folder", labels="tags", held_out="0.25")
    assert found.samples == {"train": 15, "test": 5}


def test_one_label_stays_one_where_both_columns_exist(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'ab'[i % 2]},x;y" for i in range(4)]
    files = {f"{i}.png": PICTURES[i] for i in range(4)}
    write(tmp_path / "src", files | {"metadata.csv": lines("file_name,label,labels", *rows)})
    assert prepared(tmp_path, "image_folder", held_out="none").manifest.features["label"] == LabelFeature()
    with pytest.raises(UserError, match="give one of them"):
        source("image_folder", tmp_path, label="label", labels="labels")


def test_parquet_with_a_list_column(tmp_path: Path) -> None:
    table(tmp_path / "src" / "t.parquet", image=images(4), labels=[["b", "a"], [], ["b", "b"], None])
    found = prepared(tmp_path, "table", held_out="none")
    assert found.manifest.classes == ("a", "b") and found.manifest.features["label"] == LabelsFeature()
    assert sorted(row["label"] for row in found.rows["train"].values()) == [[], [1], [1, 0]]
    assert list(found.rejected.values()) == ["no labels"]


def test_parquet_with_numbers_and_stored_names(tmp_path: Path) -> None:
    column = pa.array([[0, 2], [5]], pa.list_(pa.int64()))
    facts = {"info": {"features": {"tags": {"feature": {"names": ["x", "y", "z"]}}}}}
    schema = pa.schema({"image": pa.binary(), "tags": column.type}, {"huggingface": json.dumps(facts)})
    import pyarrow.parquet as pq

    (tmp_path / "src").mkdir()
    pq.write_table(pa.table([images(2), column], schema), tmp_path / "src" / "t.parquet")
    found = prepared(tmp_path, "table", labels="tags", held_out="none")
    assert found.manifest.classes == ("x", "y", "z")
    assert [row["label"] for row in found.rows["train"].values()] == [[0, 2]]
    assert list(found.rejected.values()) == ["label 5 is not one of 3 classes"]


def test_a_column_named_labels_of_another_type_is_no_list_of_labels(tmp_path: Path) -> None:
    table(tmp_path / "src" / "t.parquet", image=images(4), labels=[1, 0, 1, 0])
    assert "label" not in prepared(tmp_path, "table", held_out="none").manifest.features
    with pytest.raises(UserError, match="column labels is int64, wanted a list"):
        source("table", tmp_path, labels="labels")


def test_several_columns_of_labels_have_classes_of_their_own(tmp_path: Path) -> None:
    rows = ["a,red,1,x", "b,blue,,x", "c,,2,y", "d,,,y", "e,red,10,y"]
    write(tmp_path / "src", {"t.csv": lines("text,hue,my size,other", *rows)})
    found = prepared(tmp_path, "csv", label="hue,my size", held_out="none")
    assert found.manifest.features["label_hue"] == LabelFeature(classes=("blue", "red"))
    assert found.manifest.features["label_my_size"] == LabelFeature(classes=("1", "2", "10"))
    assert found.manifest.classes == () and found.rejected == {"t.csv#4": "no label"}
    assert found.manifest.class_counts == {"label_hue": (1, 2), "label_my_size": (1, 1, 1)}
    rows_of = {row["text"]: (row["label_hue"], row["label_my_size"]) for row in found.rows["train"].values()}
    assert rows_of == {"a": (1, 0), "b": (0, None), "c": (None, 1), "e": (1, 2)}
    view = ViewConfig()
    feature = found.manifest.features["label_hue"]
    assert (feature.decode(None, view, 0), feature.decode(1, view, 0)) == (-1, 1)
    with pytest.raises(BadSample):
        feature.decode(2, view, 0)


def test_several_columns_of_labels_in_parquet(tmp_path: Path) -> None:
    table(tmp_path / "src" / "t.parquet", text=["a", "b", "c"], hue=["red", None, "blue"], size=[1, 0, None])
    found = prepared(tmp_path, "table", label="hue,size", held_out="none")
    assert found.manifest.features["label_hue"] == LabelFeature(classes=("blue", "red"))
    assert found.manifest.features["label_size"] == LabelFeature(classes=("0", "1"))
    labels = {row["text"]: (row["label_hue"], row["label_size"]) for row in found.rows["train"].values()}
    assert labels == {"a": (1, 1), "b": (None, 0), "c": (0, None)}
    with pytest.raises(UserError, match="no column shape"):
        source("table", tmp_path, label="hue,shape")


def test_classes_are_counted_in_the_training_split(tmp_path: Path) -> None:
    rows = [f"{i},{'ab'[i % 2]},{'train' if i < 5 else 'test'}" for i in range(8)]
    write(tmp_path / "src", {"t.csv": lines("text,label,split", *rows)})
    assert prepared(tmp_path, "csv").manifest.class_counts == {"label": (3, 2)}
