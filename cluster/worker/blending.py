"""The evaluations by which a run estimates the weights of its classifiers again (`task.blend_every`)."""

import contextlib
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from cluster.recipe.config import eval_rows
from cluster.worker.setup import Setup
from perceiver.tasks import Batch, Task
from perceiver.train.blending import BlendedTask, BlendHook
from perceiver.train.engine.protocol import Engine
from perceiver.train.hooks import History
from pipelines.feed.ingest import EvalShare, eval_batches


def build_blend(setup: Setup, history: History, engine: Engine, task: Task) -> list[BlendHook]:
    """Return the hook of `task.blend_every`, nothing without it."""
    config: Any = setup.recipe.task
    every: float | None = getattr(config, "blend_every", None)
    if every is None:
        return []
    held_out = config.blend_split or setup.recipe.data.eval_split
    most = setup.manifest.split(held_out).samples
    train, other = (partial(_batches, setup, split, most) for split in (setup.recipe.data.train_split, held_out))
    return [BlendHook(history, engine, cast(BlendedTask, task), (train, other), every)]


def _batches(setup: Setup, split: str, most: int) -> Iterator[Batch]:
    """Return this worker's batches of about the first `most` samples of a split, not augmented."""
    me, data = setup.me, setup.recipe.data
    rows = eval_rows(setup.recipe, me.world)
    share = EvalShare(split, rows, me.rank, me.world)

    def first() -> Iterator[Batch]:
        found = eval_batches(data, setup.manifest, share, me.device, setup.quarantine)
        with contextlib.closing(found) as batches:
            yield from itertools.islice(batches, -(-most // (rows * me.world)))

    return setup.pulse.count(first())
