"""Numbers in columns and arrays: rows of tables and time series, from a table to a batch."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver.config import UserError
from perceiver.factory import build_model, model_config
from pipelines.features import SeriesFeature
from pipelines.features.base import ViewConfig
from pipelines.feed.ingest import DataConfig, TrainShare, batch_shapes, train_batches
from pipelines.transforms import BadSample
from tests.pipelines.raw import write
from tests.pipelines.sources.test_layouts import Prepared, prepared


def lines(*rows: str) -> bytes:
    return ("\n".join(rows) + "\n").encode()


def npy(values: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, values)
    return sink.getvalue()


def numbers(found: Prepared, key: str, split: str = "train") -> list[list[float]]:
    """Return the stored steps of a sample."""
    feature = found.manifest.features["series"]
    return feature.decode(found.rows[split][key]["series"], ViewConfig(), 0).tolist()


def test_columns_of_numbers_are_one_step(tmp_path: Path) -> None:
    rows = [f"{i},{i / 2},n{i},{i % 3},{i % 2}" for i in range(10)]
    write(tmp_path / "src", {"t.csv": lines("a,b,name,kind,c", *rows, "5,nan,x,0,1", "5,,x,0,1", "5,1e39,x,0,1")})
    found = prepared(tmp_path, "csv", label="kind", series="all", held_out="none")
    assert found.manifest.features["series"] == SeriesFeature(channels=3, length=1, names=("a", "b", "c"))
    assert found.manifest.classes == ("0", "1", "2") and "not used: name" in found.notes[0]
    assert numbers(found, "t.csv#4") == [[3.0, 1.5, 1.0]]
    assert found.rejected == {
        "t.csv#11": "NaN or infinite in b",
        "t.csv#12": "no number in b",
        "t.csv#13": "a number beyond float32",
    }
    statistics = found.manifest.statistics["series"]
    assert np.allclose([statistics.mean, statistics.std], [[4.5, 2.25, 0.5], [2.87228, 1.43614, 0.5]])


def test_arrays_are_time_series(tmp_path: Path) -> None:
    """Lists of JSON, numbers with separators and .npy files; several columns are channels."""
    rows = [
        '"[1, 2, 3]",0;1;2',
        "a.npy,0;0;0",
        '"[[1], [2], [4]]","[7, 8, 9]"',
        '"[1, 2]","[1, 2, 3]"',
        '"[1, ""x""]",0;1',
        "gone.npy,0;1;2",
        "../a.npy,0;1;2",
        "b.npy,0;1;2",
        '"[1, 2]","[3, 4]"',
    ]
    arrays = {"a.npy": npy(np.arange(3)), "b.npy": npy(np.array([None, "a"], object))}
    write(tmp_path / "src", arrays | {"t.csv": lines("x,y", *rows)})
    found = prepared(tmp_path, "csv", bad=1.0, series="x,y", length="any", held_out="none")
    assert found.manifest.features["series"] == SeriesFeature(channels=2, names=("x", "y"))
    assert numbers(found, "t.csv#1") == [[1, 0], [2, 1], [3, 2]]
    assert numbers(found, "t.csv#2") == [[0, 0], [1, 0], [2, 0]]
    assert numbers(found, "t.csv#3") == [[1, 7], [2, 8], [4, 9]]
    assert len(numbers(found, "t.csv#9")) == 2
    assert "object" in found.rejected.pop("t.csv#8")
    assert {key: reason[:24] for key, reason in found.rejected.items()} == {
        "t.csv#4": "2, 3 steps in one row, w",
        "t.csv#5": "no numbers in x",
        "t.csv#6": "unreadable file: FileNot",
        "t.csv#7": "got file name '../a.npy'",
    }


def test_series_of_another_size_are_quarantined(tmp_path: Path) -> None:
    rows = [*({"series": [i, 2.0, 3]} for i in range(8)), {"series": [1, 2]}, {"series": [[1, 2], [3, 4], [5, 6]]}]
    write(tmp_path / "src", {"t.jsonl": lines(*map(json.dumps, rows))})
    found = prepared(tmp_path, "csv", held_out="none", length="3")
    assert found.manifest.features["series"] == SeriesFeature(length=3, names=("series",))
    assert found.rejected == {
        "t.jsonl#9": "2 steps, wanted 3: --option length=any takes any",
        "t.jsonl#10": "2 channels, wanted 1",
    }


@pytest.mark.parametrize(
    "table, options, message",
    [
        (lines("a,b", "x,1"), {"series": "c"}, "option series=c: no column c; the table has a, b"),
        (lines("a,b", "1,1"), {"series": "a,a"}, "named twice"),
        (lines("a,b", "x,y"), {"series": "all"}, "none of the other columns has numbers"),
        (lines("a,b", "x,y"), {"series": "a"}, "no numbers for the feature series in a: no number in a"),
        (lines("a,b", "1,1"), {}, "--option series=all for all columns of numbers"),
        (lines("a", "1;2"), {"series": "a", "length": "0"}, "option length=0"),
    ],
)
def test_unusable_columns_are_refused(tmp_path: Path, table: bytes, options: dict[str, str], message: str) -> None:
    write(tmp_path / "src", {"t.csv": table})
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, "csv", 0.5, **options)


def test_series_are_cut_and_padded_and_the_mask_says_where(tmp_path: Path) -> None:
    rows = [{"series": list(range(1, steps + 1)), "label": steps % 2} for steps in range(2, 12)]
    write(tmp_path / "src", {"t.jsonl": lines(*map(json.dumps, rows))})
    found = prepared(tmp_path, "csv", held_out="none")
    url = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"differ in length: set data\.series\.length"):
        batch_shapes(DataConfig(url=url), found.manifest)
    data = DataConfig.model_validate({"url": url, "executor": "inline", "series": {"length": 6}})
    assert batch_shapes(data, found.manifest) == {"series": (6, 1), "series_mask": (6,), "label": ()}
    batch = next(train_batches(data, found.manifest, TrainShare(0, 10, 10, 0, 1), "cpu"))
    for series, mask in zip(batch["series"][..., 0], batch["series_mask"], strict=True):
        shown = series[mask]
        assert (shown.diff() == 1).all() and not series[~mask].any()
    assert sorted(batch["series_mask"].sum(1).tolist()) == [2, 3, 4, 5, 6, 6, 6, 6, 6, 6]
    inputs = {"kind": "series", "length": 6, "patch": 4, "mean": [5.0], "std": [2.0]}
    model = build_model(
        model_config({"kind": "perceiver", "inputs": inputs, "latents": 2, "latent_channels": 8}), classes=2
    )
    assert model({key: batch[key] for key in ("series", "series_mask")}).shape == (10, 2)


def test_series_of_one_length_have_no_mask_unless_they_are_padded() -> None:
    feature = SeriesFeature(channels=2, length=4)
    stored = np.arange(8, dtype="<f4").tobytes()

    def shown(length: int | None) -> dict[str, Any]:
        view = ViewConfig.model_validate({"series": {"length": length}})
        found = feature.show("series", feature.decode(stored, view, 0), view, False, np.random.default_rng)
        assert {key: value.shape for key, value in found.items()} == {
            key: shape for key, (shape, _) in feature.shapes("series", view, 0).items()
        }
        return {key: value.tolist() for key, value in found.items()}

    assert shown(None) == {"series": [[0, 1], [2, 3], [4, 5], [6, 7]]}
    assert shown(2) == {"series": [[2, 3], [4, 5]]}  # the middle
    assert shown(5)["series_mask"] == [True] * 4 + [False]


@pytest.mark.parametrize(
    "stored, reason",
    [
        (b"", "no steps"),
        (b"1234567", "7 bytes are not steps of 2"),
        (np.array([0, np.nan], "<f4").tobytes(), "NaN or infinite"),
        (np.zeros(6, "<f4").tobytes(), "3 steps, wanted 4"),
    ],
)
def test_damage_is_a_bad_sample(stored: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        SeriesFeature(channels=2, length=4).decode(stored, ViewConfig(), 0)
