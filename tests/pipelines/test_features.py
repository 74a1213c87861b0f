"""Kinds of features: stored form, decoding, view."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perceiver.storage import open_folder
from pipelines.features import Feature, LabelsFeature, PointsFeature, TextFeature
from pipelines.features.base import ViewConfig
from pipelines.feed.ingest import DataConfig, EvalShare, TrainShare, batch_shapes, eval_batches, train_batches
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, Split, arrow_schema, load_manifest, save_manifest
from pipelines.transforms import BadSample
from pipelines.transforms.points import PointsViewConfig, evaluation_view, training_view

TEXTS = ["Grüße", "a", "x" * 100, "γειά σου κόσμε", "tab\tand\nline"]


def no_rng() -> np.random.Generator:
    """Fail the test: for views without randomness."""
    raise AssertionError("nothing here is random")


def test_texts_become_bytes_after_six_special_ids_between_cls_and_sep() -> None:
    for text in TEXTS:
        ids = [4, *(byte + 6 for byte in text.encode()[:22]), 5]
        got = TextFeature().show("text", text, ViewConfig(text_length=24), True, no_rng)
        assert got["text"].tolist() == ids + [0] * (24 - len(ids))
        assert got["text_mask"].tolist() == [True] * len(ids) + [False] * (24 - len(ids))


def test_training_points_are_a_random_normalised_choice() -> None:
    cloud = np.random.default_rng(0).normal(5, 3, (500, 3)).astype(np.float32)
    view = training_view(cloud, PointsViewConfig(count=200), np.random.default_rng(1))
    assert view.shape == (200, 3) and view.dtype == np.float32
    assert abs(view.mean(axis=0)).max() < 1e-5 and np.abs(view).max() == pytest.approx(1, abs=1e-6)
    other = training_view(cloud, PointsViewConfig(count=200), np.random.default_rng(2))
    assert (view != other).any()
    assert training_view(cloud[:50], PointsViewConfig(count=200), np.random.default_rng(1)).shape == (200, 3)


def test_training_shows_every_point_of_a_small_cloud_as_evaluation_does() -> None:
    """Points drawn with replacement were once 63 % of a cloud of one point too few."""
    cloud = np.random.default_rng(0).normal(size=(49, 3)).astype(np.float32)
    for count in (49, 50, 120):
        config = PointsViewConfig(count=count, scale=(1, 1))
        for found in (training_view(cloud, config, np.random.default_rng(1)), evaluation_view(cloud, config)):
            assert len(found) == count and len(np.unique(found, axis=0)) == 49


def test_evaluation_points_are_spread_over_the_stored_ones() -> None:
    line = np.stack([np.arange(100), np.zeros(100), np.zeros(100)], axis=1).astype(np.float32)
    view = evaluation_view(line, PointsViewConfig(count=10))
    assert np.allclose(np.diff(view[:, 0]), np.diff(view[:, 0])[0]) and view[0, 0] == -1
    assert evaluation_view(line[:3], PointsViewConfig(count=10)).shape == (10, 3)


@pytest.mark.parametrize(
    "feature, stored, reason",
    [
        (PointsFeature(), b"", "no points"),
        (PointsFeature(), b"1234567", "rows of 3 float32"),
        (PointsFeature(), np.array([0, np.nan, 1], "<f4").tobytes(), "NaN or infinite"),
        (PointsFeature(), np.array([0, np.inf, 1], "<f4").tobytes(), "NaN or infinite"),
        (TextFeature(), "", "empty text"),
        (TextFeature(), None, "empty text"),
        (LabelsFeature(), [1, 9], "label 9 is not one of 4"),
    ],
)
def test_damage_is_a_bad_sample(feature: Any, stored: Any, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        feature.decode(stored, ViewConfig(), 4)


def test_all_kinds_go_through_shards_and_batches_together(tmp_path: Path) -> None:
    features: dict[str, Feature] = {"text": TextFeature(), "points": PointsFeature(), "label": LabelsFeature()}
    rng = np.random.default_rng(0)
    samples = [
        {
            "key": str(i),
            "text": TEXTS[i % 5],
            "label": [i % 4, 3],
            "points": rng.normal(size=(30, 3)).astype("<f4").tobytes(),
        }
        for i in range(20)
    ]
    folder = open_folder(str(tmp_path))
    with ShardWriter(folder, "a.arrow", arrow_schema(features), 6) as writer:
        writer.write(samples)
        shard = writer.close()
    assert shard is not None
    save_manifest(
        Manifest(
            name="all",
            features=features,
            classes=tuple("abcd"),
            licence="",
            source="",
            splits={"train": Split(shards=(shard,))},
        ),
        folder,
    )
    manifest = load_manifest(str(tmp_path))
    data = DataConfig(url=str(tmp_path), executor="inline", text_length=16, points=PointsViewConfig(count=8))
    shapes = {"text": (16,), "text_mask": (16,), "points": (8, 3), "label": (4,)}
    assert batch_shapes(data, manifest) == shapes
    batch = next(train_batches(data, manifest, TrainShare(0, 20, 20, 0, 1), "cpu"))
    assert {name: tuple(batch[name].shape[1:]) for name in shapes} == shapes
    assert {name: batch[name].dtype for name in shapes} == {
        "text": torch.int64,
        "text_mask": torch.bool,
        "points": torch.float32,
        "label": torch.float32,
    }
    rows = next(eval_batches(data, manifest, EvalShare("train", 20), "cpu"))
    for number in range(20):
        assert rows["label"][number].nonzero().ravel().tolist() == sorted({number % 4, 3})
        ids = rows["text"][number][rows["text_mask"][number]] - 6
        assert bytes(ids[1:-1].tolist()).decode(errors="ignore") == TEXTS[number % 5][:14].encode()[:14].decode(
            errors="ignore"
        )
