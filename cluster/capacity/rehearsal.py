"""A few real steps by Ray Train and Ray Data: `python -m cluster.capacity.rehearsal`, its task as JSON on stdin.

They show what a step costs beyond itself: data tasks, Ray's own processes, and workers that wait for each other while
these have the cores.
"""

import json
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from cluster.recipe import build_recipe

SHORTEST = 24
"""Steps at least."""
LEFT_OUT = 3
"""The first one in so many of the steps: processes still start beside them, and samples are made ahead."""


def rehearse(config: Mapping[str, Any]) -> dict[str, Any]:
    """Take a worker's steps without evaluation, checkpoints and tracking; return the mean seconds of a step."""
    from cluster.preflight import epoch_steps_of
    from cluster.worker import build_engine, find_place, first_model, training_batches
    from perceiver.tasks import build_task
    from perceiver.train.loop import Span, train
    from pipelines.ingest import load_data
    from pipelines.quarantine import Quarantine

    recipe = build_recipe(config["recipe"])
    manifest, place = load_data(recipe.data), find_place(1)
    training, classes = recipe.train, len(manifest.classes)
    batches = training_batches(recipe, manifest, place, (0, config["steps"]), Quarantine())
    model, task = first_model(recipe, classes, restored=True), build_task(recipe.task, classes=classes)
    engine = build_engine(recipe, model, task, manifest, place)
    seconds: list[float] = []
    span = Span(0, config["steps"], training.global_batch, training.accumulation(place.world),
                epoch_steps_of(recipe, manifest), recipe.seed)  # fmt: skip
    train(engine, batches, [lambda info: seconds.append(info.seconds)], span)
    return {"seconds": statistics.fmean(seconds[len(seconds) // LEFT_OUT :])}


def main() -> None:
    """Start a Ray of our own, take the steps, print the figures as one line."""
    from cluster.local import cluster_cpus, start_ray

    task = json.load(sys.stdin)
    recipe = build_recipe(task["recipe"])
    start_ray(recipe.cluster)
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.trainer import Share, worker_resources

    cluster = recipe.cluster
    trainer = TorchTrainer(
        rehearse,
        train_loop_config=task,
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            resources_per_worker=worker_resources(recipe, Share(cluster_cpus())),
            use_gpu=cluster.gpus_per_worker > 0,
        ),
        run_config=ray.train.RunConfig(name="rehearsal", storage_path=task["folder"]),
    )
    figures = trainer.fit().return_value
    ray.shutdown()
    sys.stdout.write("\n" + json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
