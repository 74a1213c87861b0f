"""Prediction in Ray Data actors that hold the model; the results come in order."""

import math
import queue
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch

from cluster.predict.outputs import predicted
from cluster.predict.scoring import Scoring
from cluster.recipe.config import Recipe
from cluster.recipe.placement import Node, connected_nodes
from cluster.recipe.resources import ClusterConfig, machine_cpus
from cluster.run.trainer import Share, worker_resources
from cluster.runtime.local import cluster_cpus
from perceiver.config import Config, UserError
from perceiver.tasks import build_task
from pipelines.feed.ingest import EvalShare, eval_outcomes
from pipelines.feed.samples import RankWork
from pipelines.feed.stream import Collate, Lines, RayOptions, Run, make_dataset, plain_errors
from pipelines.shards.quarantine import Quarantine

TURNS = 4
"""Least number of runs per actor, so that all actors stay busy also with few samples."""
ROWS, PROBLEMS, SIZE = "rows", "problems", "size"
"""Columns of an actor's output for a batch: predictions as an Arrow stream, problem lines, number of rows."""


def default_workers(config: ClusterConfig, nodes: Sequence[Node], joined: bool) -> int:
    """Return the default number of actors; 0 means that the calling process predicts.

    One per GPU of the nodes that the recipe's workers may use, otherwise one per node. A local Ray instance with less
    than two GPUs has no advantage over the calling process.

    Args:
        config: the recipe's `cluster` section.
        nodes: the live nodes.
        joined: whether Ray is an existing cluster.
    """
    suitable = [node for node in nodes if node.has(config.worker_labels)]
    gpus = sum(node.room({"GPU": config.gpus_per_worker or 1}) for node in suitable)
    if joined:
        return gpus or len(suitable)
    return gpus if gpus > 1 else 0


def connected_workers(scoring: Scoring) -> int:
    """Return `default_workers` for the connected Ray."""
    config = scoring.recipe.cluster
    return default_workers(config, connected_nodes(), config.resolved_address() is not None)


class Forward:
    """An actor with the model: maps a batch of rows to one row with its predictions.

    Args:
        weights: reference to the `Saved` weights, which each actor reads once from the object store.
        task: the recipe's task.
        classes: number of classes of the model.
        gpu: whether the actor has a GPU.
        neighbours: number of actors on its node, which share the cores.
    """

    def __init__(self, weights: "ray.ObjectRef[Any]", task: Config, classes: int, gpu: bool, neighbours: int) -> None:
        self.device = torch.device("cuda" if gpu else "cpu")
        if not gpu:
            torch.set_num_threads(max(1, machine_cpus() // neighbours))
        self.model = ray.get(weights).build().to(self.device)
        self.task = build_task(task, classes=classes)
        self.lines: Lines = queue.SimpleQueue()
        self.collate = Collate(self.lines)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Predict a batch."""
        batch = {name: tensor.to(self.device) for name, tensor in self.collate(rows).items()}
        found, lines = predicted(self.task, self.model, batch), []
        while not self.lines.empty():
            lines.append(self.lines.get())
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, found.schema) as stream:
            stream.write_table(found)
        output = {
            ROWS: pa.array([sink.getvalue().to_pybytes()], pa.large_binary()),
            PROBLEMS: pa.array([lines], pa.list_(pa.string())),
            SIZE: [rows.num_rows],
        }
        return pa.table(output)


def predict_in_actors(
    scoring: Scoring, workers: int, first: int, quarantine: Quarantine
) -> Generator[pa.Table, None, None]:
    """Yield the predictions of `workers` actors for each batch, in order, starting with batch `first`.

    Raises:
        UserError: the actors do not fit on the cluster, or there are too many bad samples.
    """
    share = EvalShare(scoring.split, scoring.batch, first=first)
    workers = min(workers, -(-scoring.samples // scoring.batch) - first)
    execute = partial(_execute, scoring, workers, _resources(scoring.recipe, workers))
    yield from eval_outcomes(scoring.recipe.data, scoring.manifest, share, execute, quarantine)


def _resources(recipe: Recipe, workers: int) -> dict[str, Any]:
    """Return the resources of each actor: those of a training worker, and a GPU if there are any."""
    gpus = recipe.cluster.gpus_per_worker or float(ray.cluster_resources().get("GPU", 0) >= workers)
    cluster = recipe.cluster.model_copy(update={"workers": workers, "gpus_per_worker": gpus})
    try:
        held = worker_resources(recipe.model_copy(update={"cluster": cluster}), Share(cluster_cpus()))
    except UserError as error:
        raise UserError(f"--workers {workers}, used as cluster.workers: {error}") from None
    return {
        "num_cpus": held.pop("CPU", 0),
        "num_gpus": held.pop("GPU", 0),
        "resources": held or None,
        "label_selector": cluster.worker_labels or None,
    }


def _shorter(runs: list[Run], workers: int) -> list[Run]:
    """Return the same steps in shorter runs, at least `TURNS` per actor."""
    most = -(-(runs[-1][1] - runs[0][0]) // (TURNS * workers))
    return [(first, min(first + most, stop)) for start, stop in runs for first in range(start, stop, most)]


def _execute(
    scoring: Scoring, workers: int, resources: dict[str, Any], work: RankWork, runs: list[Run], options: RayOptions
) -> Iterator[tuple[pa.Table, int, list[str]]]:
    """Run the data tasks and the actors as one Ray Dataset."""
    runs = _shorter(runs, workers)
    limits = replace(options, tasks=workers * options.tasks, bytes_in_flight=workers * options.bytes_in_flight)
    dataset = make_dataset(work, runs, limits).map_batches(
        Forward,
        batch_size=scoring.batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        fn_constructor_kwargs={
            "weights": ray.put(scoring.saved),
            "task": scoring.recipe.task,
            "classes": scoring.classes,
            "gpu": resources["num_gpus"] > 0,
            "neighbours": math.ceil(workers / len(connected_nodes())),
        },
        **resources,
    )
    allowed = dataset.context.execution_options
    allowed.resource_limits = allowed.resource_limits.copy(
        cpu=limits.tasks * limits.cpus_per_task + workers * resources["num_cpus"], gpu=workers * resources["num_gpus"]
    )
    blocks: Any = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    with plain_errors(), closing(blocks):
        for block in blocks:
            for output in block.to_pylist():
                yield pa.ipc.open_stream(output[ROWS]).read_all(), output[SIZE], output[PROBLEMS]
