"""Numbers to predict, from columns of tables to shards and the manifest."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perceiver.config import UserError
from pipelines.features import TargetFeature
from pipelines.prepare import PrepareConfig, prepare
from tests.pipelines.raw import write
from tests.pipelines.sources.test_csv import lines
from tests.pipelines.sources.test_layouts import prepared

ROWS = [f"text {i},{i * 10},{1.5 - i}" for i in range(8)]


def table(folder: Path, **columns: object) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "train-0.parquet", row_group_size=3)


def test_columns_become_one_target_with_the_training_splits_statistics(tmp_path: Path) -> None:
    rows = [f"{row},{'train' if i < 6 else 'test'}" for i, row in enumerate(ROWS)]
    write(tmp_path / "src", {"t.csv": lines("text,price (EUR),width,split", *rows)})
    found = prepared(tmp_path, "csv", target="price (EUR),width")
    feature = found.manifest.features["target"]
    assert isinstance(feature, TargetFeature) and feature.names == ("price_EUR", "width")
    values = np.array([[i * 10, 1.5 - i] for i in range(6)])
    assert feature.mean == pytest.approx(values.mean(0)) and feature.std == pytest.approx(values.std(0))
    assert found.rows["test"]["t.csv#8"]["target"] == [70.0, -5.5]


def test_statistics_are_the_same_whatever_the_shards(tmp_path: Path) -> None:
    write(tmp_path / "src", {"t.csv": lines("text,price", *(f"text {i},{1e6 + i}" for i in range(50)))})
    features = []
    for size in (3, 64):
        config = PrepareConfig(parallel="off", shard_rows=size, options={"target": "price", "held_out": "none"})
        features.append(prepare("csv", str(tmp_path / "src"), str(tmp_path / f"out{size}"), config).features["target"])
    assert features[0].mean == pytest.approx(features[1].mean, rel=1e-12)
    assert features[0].std == pytest.approx(features[1].std, rel=1e-9)
    assert features[1].std == pytest.approx((np.arange(50).std(),), rel=1e-9)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [("nan", "NaN"), ("", "no target price"), ("-inf", "infinite"), ("cheap", "not a number"), ("1e150", "1e15")],
)
def test_unusable_cells_are_quarantined(tmp_path: Path, cell: str, reason: str) -> None:
    write(tmp_path / "src", {"t.csv": lines("text,price", f"bad,{cell}", *(f"text {i},{i}" for i in range(9)))})
    found = prepared(tmp_path, "csv", target="price", held_out="none")
    assert list(found.rejected) == ["t.csv#1"] and reason in found.rejected["t.csv#1"]


def test_lists_and_missing_keys_in_json_are_quarantined(tmp_path: Path) -> None:
    rows = [{"text": "a", "price": [1]}, {"text": "b"}, {"text": "c", "price": 1.5}, {"text": "d", "price": 2}]
    write(tmp_path / "src", {"t.jsonl": lines(*map(json.dumps, rows))})
    found = prepared(tmp_path, "csv", target="price", held_out="none")
    assert found.rejected == {"t.jsonl#1": "target price is a list, wanted a number", "t.jsonl#2": "no target price"}


def test_parquet_with_numbers_of_several_types(tmp_path: Path) -> None:
    numbers = pa.array([1, 2, None, 4], pa.int32())
    table(tmp_path / "src", text=["a", "b", "c", "d"], price=numbers, width=[0.5, float("nan"), 1.0, 2.0])
    found = prepared(tmp_path, "table", target="price,width", held_out="none")
    assert sorted(row["target"] for row in found.rows["train"].values()) == [[1.0, 0.5], [4.0, 2.0]]
    assert sorted(found.rejected.values()) == ["no target price", "target width is NaN, infinite or above 1e15"]


def test_a_constant_target_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "src", {"t.csv": lines("text,price", *(f"text {i},7" for i in range(9)))})
    with pytest.raises(UserError, match="target price is 7 in all 9 training samples"):
        prepared(tmp_path, "csv", target="price", held_out="none")


def test_a_target_in_units_that_are_far_too_large_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "src", {"t.csv": lines("text,price", *(f"text {i},{i}e-17" for i in range(9)))})
    with pytest.raises(UserError, match="target price has the deviation 2.58e-17, wanted 1e-15"):
        prepared(tmp_path, "csv", target="price", held_out="none")


def test_a_column_named_label_is_not_one_of_several_labels(tmp_path: Path) -> None:
    write(tmp_path / "src", {"t.csv": lines("text,label,size", *(f"text {i},{i % 2},{i % 3}" for i in range(9)))})
    with pytest.raises(UserError, match="column label cannot be one of several labels"):
        prepared(tmp_path, "csv", label="label,size", held_out="none")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("prise", "no column prise; it has text, price"),
        ("price,price", "twice"),
        ("text,price", "text is not a number"),
    ],
)
def test_columns_are_checked(tmp_path: Path, target: str, message: str) -> None:
    write(tmp_path / "src", {"t.csv": lines("text,price", *(f"text {i},{i}" for i in range(9)))})
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, "csv", target=target, held_out="none")


def test_a_column_of_texts_is_no_target_and_an_index_has_none(tmp_path: Path) -> None:
    from pipelines.index import index

    table(tmp_path / "src", text=["a", "b"], price=["1", "2"], size=[1, 2])
    with pytest.raises(UserError, match="column price is string, wanted a number .*size"):
        prepared(tmp_path, "table", target="price")
    with pytest.raises(UserError, match="--index"):
        index("table", str(tmp_path / "src"), str(tmp_path / "out"), PrepareConfig(options={"target": "size"}))
