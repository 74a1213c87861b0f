"""The samples and the hook with which a run estimates the weights of its classifiers again (`task.blend_every`)."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import cast

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
    config: Config, history: History, engine: Engine, task: Task, batches: tuple[Batches, Batches]
) -> list[BlendHook]:
    """Return the hook of `task.blend_every`, nothing without it."""
    every = getattr(config, "blend_every", None)
    return [] if every is None else [BlendHook(history, engine, cast(BlendedTask, task), batches, every)]


def training_part(
    recipe: Recipe, manifest: Manifest, rank: int, world: int, device: torch.device, quarantine: Quarantine
) -> Iterator[Batch]:
    """Yield a worker's first batches of the training split, as many as the evaluation split has, not augmented."""
    data, rows = recipe.data, eval_rows(recipe, world)
    share = EvalShare(data.train_split, rows, rank, world)
    count = -(-manifest.split(data.eval_split).samples // (rows * world))
    with contextlib.closing(eval_batches(data, manifest, share, device, quarantine)) as batches:
        yield from itertools.islice(batches, count)
