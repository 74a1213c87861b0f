"""`python -m tests.cluster.run.elastic_worker RECIPE FOLDER WORLD...`: a run without Ray for each number of workers.

Each worker is a process that is forked here, so that libraries are imported once. It writes the losses of the steps and
the ids of the samples that it used to FOLDER/WORLD-RANK.json.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.recipe.config import load_recipe
from cluster.run.worker import build_engine, first_model, training_batches
from cluster.worker.setup import WorkerRank
from perceiver.tasks import build_task
from perceiver.train.engine.deepspeed_engine import init_distributed
from perceiver.train.loop import Span, StepInfo, train
from pipelines.feed.ingest import load_data
from pipelines.shards.quarantine import Quarantine
from tests.forks import failed, import_what_a_step_imports, start_ranks


def work(recipe_file: str, folder: Path) -> None:
    """Train as the worker that the environment names."""
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
    (folder / f"{world}-{me.rank}.json").write_text(json.dumps({"losses": losses, "used": used}))
    dist.barrier()


def main(recipe_file: str, folder: Path, worlds: list[int]) -> int:
    """Run with each number of workers, one after the other; return the number of workers that failed."""
    import_what_a_step_imports()
    return sum(failed(start_ranks(lambda: work(recipe_file, folder), world)) for world in worlds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), [int(world) for world in sys.argv[3:]]))
