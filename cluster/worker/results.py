"""What a worker leaves in the run's folder at its end: predictions, weights, and the samples that it could not use."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from cluster.predict.outputs import parquet, predicted
from cluster.recipe.config import Recipe
from cluster.record.run_folder import WEIGHTS, RunFolder
from perceiver.tasks import Batch, Task
from perceiver.train.engine.protocol import Engine
from pipelines.shards.quarantine import Quarantine


def write_quarantine(quarantine: Quarantine, folder: RunFolder, rank: int) -> None:
    """Write this worker's bad samples, with their reasons, to ``quarantine/``."""
    if quarantine.problems:
        folder.check_owner()
        quarantine.write(folder.location("quarantine", f"part-{rank:05d}"))


def write_predictions(
    folder: RunFolder, rank: int, world: int, task: Task, engine: Engine, batches: Iterator[Batch]
) -> None:
    """Write ``predictions/part-<rank>.parquet``: one row per valid sample with id, label and the task's outputs."""
    import pyarrow as pa

    engine.module.eval()
    with torch.inference_mode():
        rows = pa.concat_tables([predicted(task, engine.module, batch) for batch in batches])
    folder.write(f"predictions/part-{rank:05d}.parquet", parquet(rows))
    if rank == 0:
        folder.remove_parts("predictions", world)


def write_weights(
    folder: RunFolder, recipe: Recipe, engine: Engine, classes: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Write ``model.safetensors`` (rank 0; every rank calls this).

    Args:
        folder: of the run.
        recipe: with the model.
        engine: with the weights.
        classes: names of the classes.
        facts: step and evaluation of the weights, which run.json has only until the run is resumed.
    """
    import safetensors.torch

    weights = engine.weights()
    if weights is not None:
        model = json.dumps(recipe.model.model_dump(mode="json"))
        known = {"classes": json.dumps(list(classes)), "facts": json.dumps(dict(facts))}
        metadata = {"format": "pt", "recipe": recipe.name, "model": model, **known}
        folder.write(WEIGHTS, safetensors.torch.save(weights, metadata))
