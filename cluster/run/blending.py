"""The samples and the hook with which a run estimates the weights of its classifiers again (`task.blend_every`)."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch

from cluster.recipe.config import Recipe, eval_rows
from perceiver.config import Config
from perceiver.tasks import Batch, Task
from perceiver.train.blending import BlendedTask, BlendHook
from perceiver.train.engine.protocol import Engine
from perceiver.train.hooks import History
from pipelines.feed.ingest import EvalShare, eval_batches
from pipelines.shards.manifest import Manifest
from pipelines.shards.quarantine import Quarantine

Batches = Callable[[], Iterable[Batch]]


def build_blend(
    recipe: Recipe, history: History, engine: Engine, task: Task, batches: Callable[[str], Iterable[Batch]]
) -> list[BlendHook]:
    """Return the hook of `task.blend_every`, nothing without it; `batches` gives the batches of a split by its name."""
    config: Any = recipe.task
    every: float | None = getattr(config, "blend_every", None)
    if every is None:
        return []
    splits = recipe.data.train_split, config.blend_split or recipe.data.eval_split
    first, second = (partial(batches, split) for split in splits)
    return [BlendHook(history, engine, cast(BlendedTask, task), (first, second), every)]


def first_batches(
    recipe: Recipe, manifest: Manifest, rank: int, world: int, device: torch.device, quarantine: Quarantine, split: str
) -> Iterator[Batch]:
    """Yield a worker's first batches of a split, not augmented: at most as many as that for the estimates has."""
    config: Any = recipe.task
    rows = eval_rows(recipe, world)
    most = manifest.split(config.blend_split or recipe.data.eval_split).samples
    count = -(-most // (rows * world))
    share = EvalShare(split, rows, rank, world)
    with contextlib.closing(eval_batches(recipe.data, manifest, share, device, quarantine)) as batches:
        yield from itertools.islice(batches, count)
