"""Workers of Ray Train that measure: `python -m cluster.capacity.rehearsal`, its task as JSON on stdin.

First steps by themselves, side by side, as `cluster.capacity.probe` takes them. Then a few real ones with Ray Data:
they show what a step costs beyond itself, for data tasks, Ray's own processes, and workers that wait for each other
while these have the cores.
"""

import json
import statistics
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from cluster.recipe.config import Recipe, build_recipe

if TYPE_CHECKING:
    from cluster.run.worker import WorkerRank

SHORTEST, TIMES = 24, 3
"""Real steps at least, and for how many times as long as one size of a step is measured."""
LEFT_OUT = 3
"""The first one in so many of the steps: processes still start beside them, and samples are made ahead."""


def rehearse(config: Mapping[str, Any]) -> dict[str, Any]:
    """Measure as a worker; return the figures of `probe.measure`, and ``seconds``: the mean of a real step."""
    from cluster.capacity.probe import measure
    from cluster.run.worker import find_rank

    recipe, place = build_recipe(config["recipe"]), find_rank(1)
    figures = measure(recipe, config["micro"], config["seconds"])
    number = max(SHORTEST, round(TIMES * config["seconds"] / figures["timings"][-1][1]))
    steps = torch.tensor(number, device=place.device)
    torch.distributed.broadcast(steps, 0)
    return {**figures, "seconds": _real_steps(recipe, place, int(steps))}


def _real_steps(recipe: Recipe, place: "WorkerRank", steps: int) -> float:
    """Take a worker's steps without evaluation, checkpoints and tracking; return the mean seconds of a step."""
    from cluster.run.worker import build_engine, first_model, training_batches
    from cluster.runtime.ray_internals import rest_data_scheduler
    from perceiver.tasks import build_task
    from perceiver.train.loop import Span, train
    from pipelines.feed.ingest import load_data
    from pipelines.shards.quarantine import Quarantine

    rest_data_scheduler()
    manifest, training = load_data(recipe.data), recipe.train
    classes = len(manifest.classes)
    epoch_steps = manifest.split(recipe.data.train_split).samples / training.global_batch
    span = Span(0, steps, training.global_batch, training.accumulation(place.world), epoch_steps, recipe.seed)
    batches = training_batches(recipe, manifest, place, (0, steps), Quarantine())
    model, task = first_model(recipe, classes, restored=True), build_task(recipe.task, classes=classes)
    engine = build_engine(recipe, model, task, span, place)
    seconds: list[float] = []
    train(engine, batches, [lambda info: seconds.append(info.seconds)], span)
    return statistics.fmean(seconds[len(seconds) // LEFT_OUT :])


def main() -> None:
    """Start a Ray of our own, take the steps, print the figures as one line."""
    from cluster.record.failures import failure_reason
    from cluster.runtime.local import cluster_cpus, start_ray

    task = json.load(sys.stdin)
    recipe = build_recipe(task["recipe"])
    start_ray(recipe.cluster)
    import ray.train
    from ray.train.torch import TorchTrainer

    from cluster.run.trainer import Share, worker_resources
    from cluster.runtime.process_group import torch_config

    cluster = recipe.cluster
    trainer = TorchTrainer(
        rehearse,
        train_loop_config=task,
        torch_config=torch_config(cluster),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            resources_per_worker=worker_resources(recipe, Share(cluster_cpus())),
            use_gpu=cluster.gpus_per_worker > 0,
        ),
        run_config=ray.train.RunConfig(name="rehearsal", storage_path=task["folder"]),
    )
    try:
        figures = trainer.fit().return_value
    except Exception as error:  # noqa: BLE001  whatever Ray raises becomes one line, the last
        sys.exit(failure_reason(error))
    ray.shutdown()
    sys.stdout.write("\n" + json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
