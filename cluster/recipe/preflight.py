"""Whatever can be refused is refused here, before a worker starts, in one line that names the fix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cluster.recipe.config import Recipe, kind_of
from cluster.recipe.inputs import check_inputs
from cluster.recipe.placement import DataNeed, Node, check_evaluation, place
from cluster.record.run_folder import RunFolder
from cluster.runtime.local import machine_cpus, worker_cpus
from perceiver.config import UserError
from perceiver.export.weights import open_weights, plan_start
from perceiver.factory import build_model
from perceiver.tasks import build_task
from perceiver.train.checkpoint.store import CheckpointManifest, parameter_difference
from perceiver.train.engine.deepspeed_config import BatchPlan, plan_config
from pipelines.feed.ingest import batch_shapes, check_files, load_data, sample_plan
from pipelines.shards.manifest import Manifest, load_manifest

TARGETS = {"classification": "label", "tagging": "labels"}
"""The kind of the feature ``label`` that a task learns from."""
NEEDS = {"flow": "flow", "masked_language": "text"}
"""The batch key that a task without labels learns from."""


@dataclass(frozen=True)
class Preflight:
    """What the checks found out, for the header and the launch."""

    manifest: Manifest
    parameters: int
    epoch_steps: float
    total_steps: int
    checkpoint: CheckpointManifest | None
    start: str = ""


@dataclass(frozen=True)
class CheckedModel:
    """The data and the model that a recipe comes to: the number of parameters, and the shape of each."""

    manifest: Manifest
    parameters: int
    shapes: dict[str, list[int]]


def check(recipe: Recipe, folder: RunFolder, resume: bool) -> Preflight:
    """Check a recipe against its data, this machine, its output folder and the checkpoint to resume from.

    Raises:
        UserError: the first thing that would stop the run, with what to change.
    """
    model = check_recipe(recipe)
    check_files(recipe.data, model.manifest)
    if recipe.cluster.resolved_address() is None:
        check_machine(recipe)
    checkpoint = folder.checkpoints.newest() if resume else None
    if checkpoint is not None:
        check_resume(recipe, folder, checkpoint, model.shapes)
    elif not resume and folder.facts():
        raise UserError(
            f"run {folder.name!r} exists below {folder.output}: add --resume to go on, or choose another --run"
        )
    start = describe_start(recipe, model.manifest) if checkpoint is None else ""
    folder.note(recipe=recipe.name)
    epoch_steps = epoch_steps_of(recipe, model.manifest)
    total_steps = recipe.train.total_steps(epoch_steps)
    return Preflight(model.manifest, model.parameters, epoch_steps, total_steps, checkpoint, start)


def check_machine(recipe: Recipe) -> tuple[int, int]:
    """Check that this machine holds the workers and data tasks of a recipe; return its CPUs and GPUs.

    Raises:
        UserError: it does not; the line says what is missing and which key asks for it.
    """
    cpus, gpus = machine_cpus(), torch.cuda.device_count()
    share = worker_cpus(recipe.cluster, cpus, data_cpus(recipe))
    here = Node("this machine", {"CPU": cpus, "GPU": gpus})
    config = recipe.cluster.model_copy(update={"cpus_per_worker": share, "autoscaling": False})
    place(config, [here], data_need(recipe))
    if recipe.train.eval_beside:
        check_evaluation(config, [here])
    return cpus, gpus


def check_recipe(recipe: Recipe, load: Callable[[str, dict[str, str]], Manifest] = load_manifest) -> CheckedModel:
    """Check a recipe against itself and its data, without a look at machines and folders.

    Args:
        recipe: the recipe.
        load: reads a prepared folder's manifest, given its URL and storage options.

    Raises:
        UserError: the first thing that would stop the run, with what to change.
    """
    check_batch(recipe)
    manifest = load_data(recipe.data, load)
    check_data(recipe, manifest)
    check_best(recipe, len(manifest.classes))
    with torch.device("meta"):
        model = build_model(recipe.model, classes=len(manifest.classes))
    parameters = sum(p.numel() for p in model.parameters())
    check_deepspeed(recipe, parameters)
    return CheckedModel(manifest, parameters, {name: list(p.shape) for name, p in model.named_parameters()})


def describe_start(recipe: Recipe, manifest: Manifest) -> str:
    """Say what ``train.init_from`` gives the model, empty without it; refuse weights of another model."""
    place = recipe.train.init_from
    if not place:
        return ""
    with torch.device("meta"):
        model = build_model(recipe.model, classes=len(manifest.classes))
    return plan_start(model, open_weights(place)).describe(place)


def epoch_steps_of(recipe: Recipe, manifest: Manifest) -> float:
    """Return the optimizer steps of one pass over the training data, not necessarily whole."""
    return manifest.split(recipe.data.train_split).samples / recipe.train.global_batch


def data_cpus(recipe: Recipe) -> float:
    """Return the CPUs that data tasks may hold at a time: each worker's training tasks, and one for its evaluation.

    A training task that waits for the worker to take its rows keeps its CPU, so without room beside it an evaluation
    could wait for ever. With `data.executor: inline` there are none.
    """
    if recipe.data.executor == "inline":
        return 0.0
    return recipe.cluster.workers * (recipe.data.tasks + 1) * recipe.data.cpus_per_task


def data_need(recipe: Recipe) -> DataNeed:
    """Return what the data tasks of a run need of the nodes."""
    data = recipe.data
    if data.executor == "inline":
        return DataNeed(0.0, data.cpus_per_task)
    return DataNeed(data_cpus(recipe), data.cpus_per_task, data.task_labels, data.task_memory)


def shared_out(recipe: Recipe) -> tuple[int, ...]:
    """Return the numbers of workers that may train: from `cluster.min_workers` on, those that share out the batch."""
    cluster = recipe.cluster
    least = cluster.min_workers or cluster.workers
    return recipe.train.worlds(least, cluster.workers)


def place_some(recipe: Recipe, nodes: Sequence[Node]) -> float:
    """Return the logical CPUs of one worker so that all fit onto the nodes, or at least as many as may train.

    Raises:
        UserError: not even those fit, or no GPU is left for evaluations beside training.
    """
    if recipe.train.eval_beside and not recipe.cluster.autoscaling:
        check_evaluation(recipe.cluster, nodes)
    try:
        return place(recipe.cluster, nodes, data_need(recipe))
    except UserError:
        least = shared_out(recipe)[0]
        if least == recipe.cluster.workers:
            raise
        fewer = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"workers": least})})
        return place(fewer.cluster, nodes, data_need(fewer))


class _Sums(dict[str, Any]):
    """Sums of an evaluation that has whatever a task asks for."""

    def __missing__(self, key: str) -> float:
        return 1.0


def evaluation_metrics(recipe: Recipe, classes: int) -> list[str]:
    """Return the names of the figures that an evaluation of the recipe's task gives, such as "accuracy"."""
    bins = torch.ones(classes, 2)
    sums = _Sums(positive=bins, negative=bins)  # what tagging makes its average precision of
    return sorted(build_task(recipe.task, classes=classes).summarise(sums, 1.0))


def check_best(recipe: Recipe, classes: int) -> None:
    """Refuse to keep the best by a figure that no evaluation gives; those of training are not known beforehand."""
    best = recipe.train.keep_best
    if best is None or best.metric.startswith("train/"):
        return
    known = [f"eval/{name}" for name in evaluation_metrics(recipe, classes)]
    if best.metric not in known:
        raise UserError(
            f"train.keep_best.metric = {best.metric!r}: evaluations of task.kind = {kind_of(recipe.task)} give "
            f"{', '.join(known)}; set it to one of them, or to a figure of training such as train/loss"
        )


def check_batch(recipe: Recipe) -> None:
    """Refuse a global batch that the workers cannot share out in whole micro-batches."""
    if (recipe.cluster.min_workers or 0) > recipe.cluster.workers:
        raise UserError(
            f"cluster.min_workers {recipe.cluster.min_workers} is more than cluster.workers {recipe.cluster.workers}: "
            "set it to at most that"
        )
    batch, workers, micro = recipe.train.global_batch, recipe.cluster.workers, recipe.train.micro_batch
    portion = workers * (micro or 1)
    if batch % portion:
        factors = f"cluster.workers {workers}" + (f" x train.micro_batch {micro}" if micro else "")
        below, above = batch // portion * portion, (batch // portion + 1) * portion
        choice = f"{below} or {above}" if below else str(above)
        raise UserError(f"train.global_batch {batch} is not divisible by {factors} = {portion}: set it to {choice}")


def check_deepspeed(recipe: Recipe, parameters: int) -> None:
    """Refuse DeepSpeed settings that contradict the recipe, and a DeepSpeed JSON that is not there."""
    workers = recipe.cluster.workers
    batch = BatchPlan(recipe.train.micro(workers), recipe.train.accumulation(workers), workers)
    device = "cuda" if recipe.cluster.gpus_per_worker else "cpu"
    plan_config(
        recipe.deepspeed,
        recipe.optim,
        batch,
        precision=recipe.train.precision,
        device_type=device,
        parameters=parameters,
    )


def check_data(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse data that the recipe's splits, model or task do not fit."""
    manifest.split(recipe.data.train_split)
    manifest.split(recipe.data.eval_split)
    shapes = batch_shapes(recipe.data, manifest)
    sample_plan(recipe.data, manifest, seed=recipe.seed, global_batch=recipe.train.global_batch)
    check_targets(recipe, manifest)
    needed = NEEDS.get(kind_of(recipe.task))
    if needed and needed not in shapes:
        raise UserError(
            f"task.kind = {kind_of(recipe.task)!r} learns from {needed!r}, but {recipe.data.url} has the features "
            f"{', '.join(manifest.features)}: set data.url to data that have it"
        )
    check_inputs(recipe.model, shapes, recipe.data, manifest)


def check_targets(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse a task whose targets the data does not have."""
    wanted = TARGETS.get(kind_of(recipe.task))
    feature = manifest.features.get("label")
    if wanted and kind_of(feature) != wanted:
        has = f"the kind {kind_of(feature)!r}" if feature else "no feature 'label'"
        fits = next((task for task, kind in TARGETS.items() if feature and kind == kind_of(feature)), None)
        raise UserError(
            f"task.kind = {kind_of(recipe.task)!r} wants a feature 'label' of the kind {wanted!r}, "
            f"{recipe.data.url} has {has}: " + (f"set task.kind={fits}" if fits else "prepare the data with labels")
        )


def check_resume(
    recipe: Recipe, folder: RunFolder, checkpoint: CheckpointManifest, shapes: dict[str, list[int]]
) -> None:
    """Refuse to go on from a checkpoint of another model, batch or seed."""
    where = folder.checkpoints.location(checkpoint.step)
    difference = parameter_difference(checkpoint.parameters, shapes)
    if difference:
        raise UserError(
            f"{where} is from another model: {difference}; resume with that run's recipe "
            f"({folder.location('recipe.yaml')}) or start a new run without --resume"
        )
    saved = checkpoint.recipe
    for key, old, new in (
        ("train.global_batch", saved["train"]["global_batch"], recipe.train.global_batch),
        ("seed", saved["seed"], recipe.seed),
    ):
        if old != new:
            raise UserError(
                f"{where} was trained with {key} = {old}, the recipe says {new}: its place in the data would be lost"
            )
