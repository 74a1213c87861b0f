"""Evaluation samples of a run as its report shows them, and its final model to answer them."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cluster.recipe.config import Recipe
from cluster.record.run_folder import WEIGHTS, RunFolder
from perceiver.factory import build_model
from perceiver.model import Encoder
from perceiver.report.page import CardPart
from perceiver.storage import open_url
from perceiver.tasks import output_count
from pipelines.feed.ingest import DataConfig, sample_spec
from pipelines.feed.samples import make_sample
from pipelines.inspect.inspection import stored_row
from pipelines.inspect.samples import show
from pipelines.shards.manifest import Manifest
from pipelines.shards.reader import Reader
from pipelines.transforms import BadSample


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


@dataclass(frozen=True)
class Sample:
    """An evaluation sample as the report shows it.

    Attributes:
        key: where it came from.
        image: pixels (H, W, C), uint8, as the model reads them; None for other kinds of data.
        parts: text, spectrogram and player, frames or points of other kinds of data.
        mask: classes of the pixels (H, W), if the data have them.
        view: what model and task read, by the batch's keys, of the samples for which it was asked.
    """

    key: str
    image: np.ndarray | None
    parts: list[CardPart]
    mask: np.ndarray | None = None
    view: Mapping[str, Any] = field(default_factory=dict)


def read_samples(
    recipe: Recipe, manifest: Manifest, ids: Iterable[int], views: Collection[int] = ()
) -> dict[int, Sample]:
    """Return evaluation samples by id, those of `views` as the model reads them, too; without unreadable ones."""
    data, found = recipe.data, dict[int, Sample]()
    split = manifest.split(data.eval_split)
    spec = sample_spec(data, manifest, split=data.eval_split, training=False)
    reader = Reader.of(data.url, manifest, split, data.storage_options, policy=data.read)
    for number in sorted(ids):
        place = np.array([number])
        shard, index, row = reader.locate(place)[0]
        group = reader.row_groups({(shard, index)})[shard, index]
        if group.error:
            continue
        try:
            pictures, key = "image" in manifest.features, reader.keys(place)[0]
            view = make_sample(spec, group, row, np.random.default_rng) if pictures or number in views else {}
            if pictures:
                found[number] = Sample(key, view["image"].transpose(1, 2, 0), [], view.get("mask"), view)
            else:
                found[number] = Sample(key, None, _parts(stored_row(group, row), manifest, data), view=view)
        except BadSample:
            continue
    return found


def _parts(row: Mapping[str, Any], manifest: Manifest, data: DataConfig) -> list[CardPart]:
    """Return the parts that show a stored row."""
    parts: list[CardPart] = []
    for name, feature in manifest.features.items():
        parts += show(feature.kind, row[name], feature.decode(row[name], data, len(manifest.classes)))
    return parts


def built_model(recipe: Recipe, manifest: Manifest) -> torch.nn.Module:
    """Return the run's model with random weights."""
    return build_model(recipe.model, classes=output_count(recipe.task, len(manifest.classes))).eval()


def load_final(model: torch.nn.Module, folder: RunFolder) -> None:
    """Load the final weights of a run."""
    import safetensors.torch

    fs, path = open_url(folder.location(WEIGHTS))
    model.load_state_dict(safetensors.torch.load(fs.cat_file(path)))


def one_batch(model: Encoder, view: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return a batch of one sample; of several clips, as in an evaluation, the first one."""
    axes = {key: tensor.ndim for key, tensor in model.example(1, "cpu").items()}
    keys = (*model.input_keys, *model.optional_keys)
    batch = {key: torch.as_tensor(np.asarray(view[key]))[None] for key in keys if key in view}
    return {key: value[:, 0] if value.ndim > axes.get(key, value.ndim) else value for key, value in batch.items()}
