"""`python -m tests.cluster.run.elastic_worker RECIPE OUT`: one worker of a run without Ray, RANK and WORLD_SIZE set.

Writes the losses of the steps and the ids of the samples that this rank used, as JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.recipe.config import load_recipe
from cluster.run.worker import WorkerRank, build_engine, first_model, training_batches
from perceiver.tasks import build_task
from perceiver.train.engine.deepspeed_engine import init_distributed
from perceiver.train.loop import Span, StepInfo, train
from pipelines.feed.ingest import load_data
from pipelines.shards.quarantine import Quarantine


def main(recipe_file: str, out: str) -> None:
    torch.set_num_threads(1)
    init_distributed()
    world = dist.get_world_size()
    me = WorkerRank(dist.get_rank(), world, world, torch.device("cpu"))
    recipe = load_recipe(recipe_file)
    manifest = load_data(recipe.data)
    samples, classes = manifest.split("train").samples, len(manifest.classes)
    training = recipe.train
    steps = training.total_steps(samples)
    span = Span(0, steps, training.global_batch, training.accumulation(world), samples / training.global_batch, 0)
    engine = build_engine(recipe, first_model(recipe, classes), build_task(recipe.task, classes=classes), span, me)
    losses: list[float] = []
    used: list[list[int]] = []

    def record(info: StepInfo) -> None:
        losses.append(info.result.loss)
        used.append([int(i) for ids in info.sample_ids for i in ids if i >= 0])

    train(engine, training_batches(recipe, manifest, me, (0, steps), Quarantine(0.0)), [record], span)
    Path(out).write_text(json.dumps({"losses": losses, "used": used}))
    dist.barrier()
    os._exit(0)  # Gloo's threads may hold tensors while the interpreter ends


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
