"""The length of a drafted recipe: steps for a number of minutes, from a measured time per step."""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from cluster.recipe.preflight import CheckedModel
from cluster.recipe.resources import machine_cpus
from perceiver.factory import build_model
from perceiver.optim.config import build_optimizer
from perceiver.tasks import Batch, build_task, output_count
from perceiver.train.engine.protocol import default_device
from pipelines.feed.ingest import sample_spec

WARM, LEAST, MOST = 2, 3, 20
"""Untimed steps at the beginning, and the least and most timed steps."""
MEASURE_S = 3.0
"""Approximate seconds of the timed steps."""
SURROUNDINGS = 1.6
"""Factor by which a step of a run takes longer than one alone: data tasks, DeepSpeed, waiting for other workers."""
EVALUATION = 0.4
"""Time of a sample in an evaluation relative to that in a training step, which also goes backward."""
EVALUATIONS = 5
MOST_EPOCHS = 100
"""More passes over the data are not drafted: models of this size then memorise them."""
LEAST_STEPS = 10


@dataclass(frozen=True)
class Length:
    """The length of a run.

    Attributes:
        train: keys of the section `train`.
        steps: optimizer steps.
        epochs: passes over the training data.
        minutes: estimated, evaluations included, start-up not.
        capped: whether the minutes suffice for more than `MOST_EPOCHS`.
    """

    train: dict[str, Any]
    steps: int
    epochs: float
    minutes: float
    capped: bool


def fit_length(samples: int, held_out: int, batch: int, seconds: float, minutes: float) -> Length:
    """Return the length of a run that takes about the given minutes, at most 100 epochs, at least 10 steps.

    Args:
        samples: of the training split.
        held_out: of the evaluation split.
        batch: samples of a step.
        seconds: of a step in a run.
        minutes: wanted, evaluations included.
    """
    evaluation = EVALUATION * seconds * held_out / batch
    count = EVALUATIONS if EVALUATIONS * evaluation <= 15 * minutes else 1
    steps = max(LEAST_STEPS, int((60 * minutes - count * evaluation) / seconds))
    epochs = steps * batch / samples
    capped = epochs > MOST_EPOCHS
    length: dict[str, Any] = {"steps": steps}
    if epochs >= 2:
        epochs = min(int(epochs), MOST_EPOCHS)
        steps, length = math.ceil(samples * epochs / batch), {"epochs": epochs}
    every = max(1, round(epochs / count)) if epochs >= count else float(f"{epochs / count:.3g}")
    train = {**length, "global_batch": batch, "eval_every": every, "checkpoint_every": every}
    return Length(train, steps, epochs, (steps * seconds + count * evaluation) / 60, capped)


def step_seconds(checked: CheckedModel, most_s: float = MEASURE_S) -> float:
    """Return the seconds of an optimizer step of a run, measured in this process with random inputs.

    A worker's share of the batch passes through the model with a worker's share of the cores, or on a GPU.

    Args:
        checked: the recipe with its data's statistics and targets.
        most_s: approximate time of the timed steps.
    """
    recipe, device = checked.recipe, default_device()
    threads, workers = torch.get_num_threads(), recipe.cluster.workers
    torch.set_num_threads(max(1, machine_cpus() // workers))
    try:
        torch.manual_seed(recipe.seed)
        classes = len(checked.manifest.classes)
        model = build_model(recipe.model, classes=output_count(recipe.task, classes)).to(device)
        task, optimizer = build_task(recipe.task, classes=classes), build_optimizer(recipe.optim, model)
        batch = random_batch(checked, recipe.train.micro(workers), device)
        seconds: list[float] = []
        while len(seconds) < WARM + LEAST or (len(seconds) < WARM + MOST and sum(seconds[WARM:]) < most_s):
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                output = task.loss(model, batch)
            (output.loss_sum / task.count(batch).clamp(min=1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            output.loss_sum.item()  # on a GPU the calls above only start the operations
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return SURROUNDINGS * statistics.median(seconds[WARM:]) * recipe.train.accumulation(workers)


def random_batch(checked: CheckedModel, rows: int, device: torch.device) -> Batch:
    """Return random inputs and constant targets of the shapes and types of a training batch."""
    data = checked.recipe.data
    spec = sample_spec(data, checked.manifest, split=data.train_split, training=True)
    batch: Batch = {"sample_id": torch.arange(rows, device=device)}
    for key, (shape, kind) in spec.shapes().items():
        dtype = getattr(torch, kind.__name__.rstrip("_"))
        target = key in ("label", "target", "mask") or key.startswith("label_")
        if dtype == torch.bool:
            tensor = torch.ones((rows, *shape), dtype=dtype)
        elif target:
            tensor = torch.zeros((rows, *shape), dtype=dtype)
        elif dtype.is_floating_point:
            tensor = torch.randn((rows, *shape), dtype=dtype)
        else:
            tensor = torch.randint(0, 200, (rows, *shape)).to(dtype)
        batch[key] = tensor.to(device)
    return batch
