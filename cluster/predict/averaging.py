"""The average of a run's last checkpoints: several models as one, whose output is that of their mean prediction."""

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.export.weights import Saved, open_weights
from perceiver.model import Raw
from perceiver.tasks._clips import mean_output, mean_sigmoid, mean_softmax
from perceiver.train.checkpoint.shards import Weights
from perceiver.train.checkpoint.store import CheckpointStore

log = logging.getLogger(__name__)

AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "classification": mean_softmax,
    "tagging": mean_sigmoid,
    "regression": mean_output,
}
"""How the outputs (B, N, C) of N models become one, by kind of task: probabilities are averaged, or numbers."""


class Averaged(nn.Module):
    """Runs several models on the same inputs and averages what they predict."""

    def __init__(self, models: list[nn.Module], average: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.average = average
        first = cast(Any, models[0])
        self.input_keys: tuple[str, ...] = first.input_keys
        self.optional_keys: tuple[str, ...] = first.optional_keys

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for each input key."""
        return cast(Any, self.models[0]).example(batch, device)

    def forward(self, raw: Raw) -> Tensor:
        """Return the outputs (B, C) of the mean prediction."""
        return self.average(torch.stack([model(raw).float() for model in self.models], 1))


def average_checkpoints(run: str, count: int, weights: Weights | None = None) -> tuple[Saved, Averaged, list[str]]:
    """Load the last checkpoints of a run as one model; damaged ones are logged and do not count.

    Args:
        run: the run's folder.
        count: number of checkpoints.
        weights: of a run with `train.ema`, see `open_weights`.

    Returns:
        The newest checkpoint's weights and origin, the model on the GPU if there is one, and the checkpoints' names,
        newest first.

    Raises:
        UserError: there are fewer, or the outputs of the run's task cannot be averaged.
    """
    store, found = CheckpointStore(f"{run.rstrip('/')}/checkpoints"), list[Saved]()
    for step in reversed(store.steps()):
        if len(found) == count:
            break
        try:
            found.append(open_weights(store.location(step), weights))
        except UserError as error:
            log.warning("checkpoint %s is not used: %s", store.location(step), error)
            continue
        _check_task(found[0], count)
    if len(found) < count:
        raise UserError(
            f"--average {count}: {run} has {len(found)} intact checkpoints; wanted a run's folder with as many:"
            " lower it, or train with more train.keep_checkpoints"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    average = AVERAGES[found[0].recipe["task"]["kind"]]
    model = Averaged([saved.build() for saved in found], average).to(device)
    return found[0], model, [saved.place.rpartition("/")[2] for saved in found]


def _check_task(saved: Saved, count: int) -> None:
    kind = (saved.recipe.get("task") or {}).get("kind")
    if kind not in AVERAGES:
        raise UserError(
            f"--average {count}: {saved.place} has task.kind = {kind!r}; wanted a task whose outputs can be averaged"
            f" ({', '.join(AVERAGES)}): evaluate one checkpoint"
        )
