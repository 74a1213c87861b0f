"""`python -m tests.cluster.run.elastic_worker RECIPE FOLDER WORLD...`: a run without Ray for each number of workers.

Each worker is a process that is forked here, so that libraries are imported once. It writes the losses of the steps and
the ids of the samples that it used to FOLDER/WORLD-RANK.json.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.recipe.config import load_recipe
from cluster.run.worker import WorkerRank, build_engine, first_model, training_batches
from cluster.runtime.local import free_port
from perceiver.tasks import build_task
from perceiver.train.engine.deepspeed_engine import init_distributed
from perceiver.train.loop import Span, StepInfo, train
from pipelines.feed.ingest import load_data
from pipelines.shards.quarantine import Quarantine


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


def fork(recipe_file: str, folder: Path, world: int, rank: int, port: int) -> int:
    """Start a worker; return its process."""
    child = os.fork()
    if child:
        return child
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        work(recipe_file, folder)
    except Exception:  # noqa: BLE001  a fork must not return from here
        traceback.print_exc()
        os._exit(1)
    finally:
        os._exit(0)  # Gloo's threads may hold tensors while the interpreter ends


def main(recipe_file: str, folder: Path, worlds: list[int]) -> int:
    """Run with each number of workers, one after the other; return the number of workers that failed."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()  # imports what each worker would import
    failed = 0
    for world in worlds:
        port = free_port("127.0.0.1")
        workers = [fork(recipe_file, folder, world, rank, port) for rank in range(world)]
        failed += sum(os.waitpid(worker, 0)[1] != 0 for worker in workers)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), [int(world) for world in sys.argv[3:]]))
