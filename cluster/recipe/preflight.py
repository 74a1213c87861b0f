"""The checks before a worker starts; each refuses a mistake in one line that names the fix."""

import importlib.util
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import psutil
import torch

from cluster.recipe.branches import check_branches
from cluster.recipe.config import Recipe, kind_of, zero_stage
from cluster.recipe.inputs import check_inputs, input_sections
from cluster.recipe.memory import held_bytes, state_bytes
from cluster.recipe.placement import DataNeed, Node, check_evaluation, place
from cluster.recipe.resources import machine_cpus, worker_cpus
from cluster.recipe.resume import check_same_data, check_same_recipe, check_schedule, check_start, recipe_before
from cluster.recipe.statistics import FIELDS, with_statistics
from cluster.recipe.targets import check_targets, class_names, with_targets
from cluster.record.run_folder import RunFolder
from cluster.runtime.local import check_reachable
from perceiver.config import Config, UserError
from perceiver.export.parts import plan_parts
from perceiver.export.weights import DataFacts, open_weights, plan_weights
from perceiver.factory import build_model, on_meta
from perceiver.optim.config import optimizer_groups
from perceiver.optim.freezing import freeze
from perceiver.storage import is_local, open_url
from perceiver.tasks import build_task, output_count
from perceiver.text_ids import SPECIALS
from perceiver.tracking.printable import safe_line
from perceiver.tracking.redaction import redact, redact_text
from perceiver.tracking.wandb_config import WandbConfig
from perceiver.train.checkpoint.store import CheckpointManifest, parameter_difference
from perceiver.train.engine.deepspeed_config import BatchPlan, plan_config
from perceiver.train.hooks import History
from perceiver_train.extras import lacks
from pipelines.feed.excess import describe_excess
from pipelines.feed.ingest import DataConfig, batch_shapes, check_files, load_data, sample_plan
from pipelines.shards.manifest import Manifest, content_digest, file_versions, load_manifest

DIGEST_CHARACTERS = 36
"""The longest digest of a data set that MLflow accepts."""
MOST_PARAMETERS = 1_000_000_000_000
SMALLER = "lower model.latents, the channels or the layers"


@dataclass(frozen=True)
class Preflight:
    """Results of the checks, for the header and the launch.

    Attributes:
        manifest: of the data.
        parameters: number of parameters, frozen ones included.
        epoch_steps, total_steps: optimizer steps of an epoch and of the run.
        checkpoint: the one to resume from.
        start: describes `train.init_from`.
        changes: the keys of a resumed run that have changed.
        notes: what of the samples is not shown, a line each.
        frozen: number of parameters that `train.freeze` excludes.
        state: bytes of the whole training state.
        early_stop: why the run to resume has ended before its last step (`train.early_stop`); empty if it has not.
        recipe: the recipe, with the data's statistics.
    """

    recipe: Recipe
    manifest: Manifest
    parameters: int
    epoch_steps: float
    total_steps: int
    checkpoint: CheckpointManifest | None
    start: str = ""
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    frozen: int = 0
    early_stop: str = ""
    state: int = 0

    @property
    def size(self) -> str:
        """The number of parameters for people."""
        return f"{self.parameters:,} parameters" + (f" ({self.frozen:,} frozen)" if self.frozen else "")


@dataclass(frozen=True)
class CheckedModel:
    """The data and the model of a recipe.

    Attributes:
        recipe: the recipe, with the data's statistics.
        manifest: of the data.
        parameters: number of parameters, frozen ones included.
        shapes: shape of each parameter by name.
        weight_bytes: memory of parameters and buffers; each worker builds all of them.
        sample_bytes: memory of a sample in a batch and of its latents after each layer; a training step needs more.
        frozen: number of parameters that `train.freeze` excludes.
    """

    recipe: Recipe
    manifest: Manifest
    parameters: int
    shapes: dict[str, list[int]]
    weight_bytes: int
    sample_bytes: int
    frozen: int = 0


def check(recipe: Recipe, folder: RunFolder, resume: bool) -> Preflight:
    """Check a recipe against its data, this machine, its output folder and the checkpoint to resume from.

    Raises:
        UserError: the first problem that would stop the run, with its fix.
    """
    checkpoint = folder.checkpoints.newest() if resume else None
    before = recipe_before(folder, checkpoint) if resume else None
    check_worker_range(recipe)
    manifest = load_data(recipe.data)
    recipe = with_targets(with_statistics(recipe, manifest), manifest)
    changes = check_same_recipe(recipe, before) if before else ()
    if resume:
        check_same_data(recipe.data.url, data_facts(recipe.data, manifest), folder)
    model = check_model(recipe, manifest)
    check_files(recipe.data, model.manifest)
    check_replay(recipe)
    address = recipe.cluster.resolved_address()
    if address is None:
        check_machine(recipe)
        check_memory(recipe, model)
    else:
        check_reachable(address)
    if recipe.tracking.enabled:
        recipe.tracking.store_uri(folder.local.parent)
    if recipe.tracking.tensorboard:
        check_tensorboard(folder)
    if recipe.tracking.wandb is not None:
        check_wandb(recipe.tracking.wandb)
    if checkpoint is not None:
        check_same_parameters(folder, checkpoint, model.shapes)
    if not resume:
        check_new(folder, known=())
    start = describe_start(recipe, model.manifest) if checkpoint is None else ""
    samples = model.manifest.split(recipe.data.train_split).samples
    epoch_steps, total_steps = samples / recipe.train.global_batch, recipe.train.total_steps(samples)
    check_start(recipe, total_steps)
    if recipe.train.profile:
        recipe.train.profile.check(total_steps, recipe.cluster.workers)
    if before is not None:
        check_schedule(recipe, before, samples)
    folder.note(recipe=recipe.name)
    notes = tuple(describe_excess(recipe.data, model.manifest, recipe.data.train_split))
    steps = epoch_steps, total_steps
    early = early_end(recipe, folder, checkpoint)
    facts = checkpoint, start, changes, notes, model.frozen, early, _state(model)
    return Preflight(recipe, model.manifest, model.parameters, *steps, *facts)


def _state(model: CheckedModel) -> int:
    """Return the bytes of the whole training state."""
    return state_bytes(model.recipe, model.parameters - model.frozen, model.frozen)


def early_end(recipe: Recipe, folder: RunFolder, checkpoint: CheckpointManifest | None) -> str:
    """Return why the run of a checkpoint has ended before its last step; empty if it has not."""
    if checkpoint is None or recipe.train.early_stop is None:
        return ""
    found = recipe.train.early_stop.decided(History(folder.checkpoints.history(checkpoint.step)).evaluations())
    return found[1] if found is not None and found[0] < checkpoint.step else ""


def check_replay(recipe: Recipe) -> None:
    """Refuse `train.replay_every` where the weights are sharded."""
    if recipe.train.replay_every and zero_stage(recipe) == 3:
        raise UserError(
            f"train.replay_every = {recipe.train.replay_every} with ZeRO stage 3, which shards the weights: wanted a "
            "stage from 0 to 2; set deepspeed.zero_stage, or remove train.replay_every"
        )


def check_new(folder: RunFolder, known: Collection[str] = ("name", "created", "recipe")) -> None:
    """Refuse to start a run anew in a folder that has one; `known` are the facts that the start itself has noted."""
    if folder.facts().keys() - set(known) or folder.checkpoints.steps():
        raise UserError(
            f"run {folder.name!r} exists below {folder.output}: add --resume to continue, or choose another --run"
        )


def check_machine(recipe: Recipe) -> tuple[int, int]:
    """Check that the workers and data tasks of a recipe fit on this machine; return its CPUs and GPUs.

    Raises:
        UserError: they do not fit; the message names the missing resource and its key.
    """
    if recipe.cluster.avoid:
        raise UserError(
            f"cluster.avoid = {list(recipe.cluster.avoid)}, but this run has only this machine: no node is left "
            "for the workers; remove the key, or set cluster.address"
        )
    cpus, gpus = machine_cpus(), torch.cuda.device_count()
    share = worker_cpus(recipe.cluster, cpus, data_cpus(recipe))
    here = Node("this machine", {"CPU": cpus, "GPU": gpus})
    config = recipe.cluster.model_copy(update={"cpus_per_worker": share, "autoscaling": False})
    place(config, [here], data_need(recipe))
    if recipe.train.eval_async:
        check_evaluation(config, [here])
    return cpus, gpus


def check_recipe(recipe: Recipe, load: Callable[[str, dict[str, str]], Manifest] = load_manifest) -> CheckedModel:
    """Check a recipe against itself and its data, not against machines and folders.

    Args:
        recipe: the recipe.
        load: reads the manifest of a prepared folder, given its URL and storage options.

    Raises:
        UserError: the first problem that would stop the run, with its fix.
    """
    check_worker_range(recipe)
    manifest = load_data(recipe.data, load)
    return check_model(with_statistics(recipe, manifest), manifest)


def check_model(recipe: Recipe, manifest: Manifest) -> CheckedModel:
    """Check a recipe's data, task and model against each other.

    Raises:
        UserError: the first problem that would stop the run, with its fix.
    """
    recipe = with_targets(recipe, manifest)
    check_data(recipe, manifest)
    if kind_of(recipe.task) == "classification" and len(manifest.classes) == 1:
        raise UserError(
            f"data set {manifest.name} at {recipe.data.url} has one class ({safe_line(manifest.classes[0])}), wanted at"
            " least two: any model would be right; prepare the data with one folder or label per class"
        )
    check_best(recipe, len(manifest.classes))
    with on_meta():
        model = build_model(recipe.model, classes=output_count(recipe.task, len(manifest.classes)))
        example: dict[str, torch.Tensor] = cast(Any, model).example(1, "meta")
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MOST_PARAMETERS:
        raise UserError(f"the model has {parameters:.1e} parameters, wanted at most {MOST_PARAMETERS:.0e}: {SMALLER}")
    frozen = freeze(model, recipe.train.freeze) if recipe.train.freeze else 0
    optimizer_groups(recipe.optim, model)
    check_deepspeed(recipe, parameters)
    data = sum(4 * math.prod(shape) for shape in batch_shapes(recipe.data, manifest).values())
    return CheckedModel(
        recipe,
        manifest,
        parameters,
        {name: list(p.shape) for name, p in model.named_parameters()},
        sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        max(data, sum(4 * tensor.numel() for tensor in example.values())) + _latent_bytes(recipe.model),
        frozen,
    )


def _latent_bytes(model: Any) -> int:
    """Return the bytes of a sample's latents after each layer, 0 for a model without latents."""
    if not hasattr(model, "latents"):
        return 0
    blocks = model.blocks if model.blocks is not None else model.cross_attends
    return 4 * model.latents * model.latent_channels * (1 + blocks * model.self_attends_per_block)


def check_memory(recipe: Recipe, model: CheckedModel) -> None:
    """Refuse weights, batches or an object store that this machine's memory cannot contain, whatever else is computed.

    `perceiver plan` estimates the memory of a run; this refuses only what is certain to fail.

    Raises:
        UserError: the message names the keys to lower.
    """
    workers, memory = recipe.cluster.workers, psutil.virtual_memory().total
    store = recipe.cluster.object_store_mb or 0
    held = held_bytes(_state(model), 1) if recipe.train.checkpoint_memory_every else 0
    for what, size, fix in (
        (f"the weights of {model.parameters:,} parameters", workers * model.weight_bytes, SMALLER),
        (
            "the samples and latents of one micro-batch",
            workers * recipe.train.micro(workers) * model.sample_bytes,
            "lower train.micro_batch, model.latents or the size of a sample",
        ),
        (f"cluster.object_store_mb = {store}", store * 1_000_000, "lower it"),
        ("checkpoints in memory (train.checkpoint_memory_every)", held, "remove the key"),
    ):
        if size > memory:
            raise UserError(
                f"{what}: {size / 1e9:,.0f} GB for {workers} worker{'s' * (workers > 1)}, this machine has "
                f"{memory / 1e9:,.0f} GB: {fix}"
            )


def data_facts(data: DataConfig, manifest: Manifest) -> DataFacts:
    """Return what a run records of its training and evaluation data, without secrets."""
    splits = (data.train_split, data.eval_split)
    texts = {key: getattr(manifest, key) for key in ("name", "licence", "source", "classes")}
    return DataFacts(
        **redact(texts),
        samples={name: manifest.split(name).samples for name in splits},
        features={name: kind_of(feature) for name, feature in sorted(manifest.features.items())},
        digest=content_digest(manifest, splits),
        files=file_versions(manifest, splits),
    )


def tracked_data(data: DataConfig, manifest: Manifest) -> list[dict[str, str]]:
    """Return the training and the evaluation data as MLflow's inputs of a run, without secrets."""
    urls = {"url": data.url, **({"mixture": [part.url for part in data.mixture]} if data.mixture else {})}
    return [
        {
            "name": f"{manifest.name} {split}",
            "digest": content_digest(manifest, [split])[:DIGEST_CHARACTERS],
            "context": context,
            "source": json.dumps(redact({**urls, "split": split})),
            "profile": json.dumps({"samples": manifest.split(split).samples, "classes": len(manifest.classes)}),
        }
        for split, context in {data.eval_split: "evaluation", data.train_split: "training"}.items()
    ]


def describe_start(recipe: Recipe, manifest: Manifest) -> str:
    """Return a line about the weights of ``train.init_from``, empty without it; refuse weights of another model."""
    url = recipe.train.init_from
    if not url:
        return ""
    with on_meta():
        model = build_model(recipe.model, classes=output_count(recipe.task, len(manifest.classes)))
    if isinstance(url, dict):
        check_branches(recipe.model, url)
        plans = plan_parts(model, url, class_names(recipe, manifest))
        return "; ".join(f"{part} {plan.describe(url[part])}" for part, plan in plans.items())
    saved = open_weights(url)
    line = plan_weights(model, saved, class_names(recipe, manifest)).describe(url)
    return "; ".join([line, *other_normalisation(recipe.model, saved.model)])


def other_normalisation(model: Config, of_weights: Config | None) -> Iterator[str]:
    """Yield a remark for each input that a model normalises with other numbers than the model of saved weights."""
    before = dict(input_sections(of_weights))
    for key, inputs in input_sections(model):
        now, then = (
            ", ".join(f"{name} {_rounded(getattr(one, name))}" for name in FIELDS if getattr(one, name, None))
            for one in (inputs, before.get(key))
        )
        if now and then and now != then:
            yield f"{key} is normalised with {now}, in the model of the weights with {then}"


def _rounded(numbers: Any) -> str:
    return str([round(float(number), 4) for number in (numbers if isinstance(numbers, tuple | list) else [numbers])])


def data_cpus(recipe: Recipe) -> float:
    """Return the CPUs of all concurrent data tasks: each worker's training tasks, and one for its evaluation.

    A training task keeps its CPU while it waits for the worker to take its rows, so without the additional one an
    evaluation could wait for ever. With `data.executor: inline` there are no tasks.
    """
    if recipe.data.executor == "inline":
        return 0.0
    return recipe.cluster.workers * (recipe.data.tasks + 1) * recipe.data.cpus_per_task


def data_need(recipe: Recipe) -> DataNeed:
    """Return the resources of a run's data tasks."""
    data = recipe.data
    if data.executor == "inline":
        return DataNeed(0.0, data.cpus_per_task)
    return DataNeed(data_cpus(recipe), data.cpus_per_task, data.task_labels, data.task_memory)


def place_some(recipe: Recipe, nodes: Sequence[Node]) -> float:
    """Return the logical CPUs of one worker so that all fit on the nodes, or at least `cluster.min_workers`.

    Raises:
        UserError: not even those fit, or no GPU is left for asynchronous evaluation.
    """
    if recipe.train.eval_async and not recipe.cluster.autoscaling:
        check_evaluation(recipe.cluster, nodes)
    try:
        return place(recipe.cluster, nodes, data_need(recipe))
    except UserError:
        least = recipe.cluster.min_workers or recipe.cluster.workers
        if least == recipe.cluster.workers:
            raise
        fewer = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"workers": least})})
        return place(fewer.cluster, nodes, data_need(fewer))


class _Sums(dict[str, Any]):
    """Sums of an evaluation in which every key is present: 1, and one row of each kind of rows."""

    ROWS: ClassVar[Mapping[str, torch.Tensor]] = {
        "texts": torch.tensor([[1, SPECIALS, SPECIALS]]),
        "numbers": torch.ones(1, 2, dtype=torch.int64),
        "counts": torch.ones(3, 2),
    }

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> Any:
        return self.ROWS.get(key.partition("/")[0], 1.0)


def evaluation_metrics(recipe: Recipe, classes: int) -> list[str]:
    """Return the names of the metrics of the recipe's task, such as "accuracy"."""
    bins = torch.ones(classes, 2)
    # For the average precision of tagging, and the mean IoU of a segmentation.
    sums = _Sums(positive=bins, negative=bins, confusion=torch.ones(classes, classes))
    return sorted(build_task(recipe.task, classes=classes).summarise(sums, 1.0))


def check_best(recipe: Recipe, classes: int) -> None:
    """Refuse `train.early_stop` and `train.keep_best` by an unknown evaluation metric.

    Training metrics, by which checkpoints can be kept, are not known beforehand.
    """
    known = [f"eval/{name}" for name in evaluation_metrics(recipe, classes)]
    stop, best = recipe.train.early_stop, recipe.train.keep_best
    for key, metric, more in (
        ("early_stop", stop.metric if stop else known[0], ""),
        ("keep_best", best.metric if best else known[0], ", or to a training metric such as train/loss"),
    ):
        if metric not in known and not (more and metric.startswith("train/")):
            raise UserError(
                f"train.{key}.metric = {metric!r}: evaluations of task.kind = {kind_of(recipe.task)} have the "
                f"metrics {', '.join(known)}: set it to one of them{more}"
            )


def check_worker_range(recipe: Recipe) -> None:
    """Refuse `cluster.min_workers` above `cluster.workers`."""
    if (recipe.cluster.min_workers or 0) > recipe.cluster.workers:
        raise UserError(
            f"cluster.min_workers = {recipe.cluster.min_workers} is more than cluster.workers = "
            f"{recipe.cluster.workers}: set it to at most that"
        )


def check_tensorboard(folder: RunFolder) -> None:
    """Refuse `tracking.tensorboard` without its package, and for an output folder that is not a mounted one."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError(lacks("tracking.tensorboard", ModuleNotFoundError(name="tensorboardX")))
    if not is_local(open_url(folder.url)[0]):
        raise UserError(
            f"tracking.tensorboard: got output = {safe_line(redact_text(folder.output))}, wanted a folder on a "
            "disk, to which event files can be appended: set output to one, or tracking.tensorboard=false"
        )


def check_wandb(config: WandbConfig) -> None:
    """Refuse `tracking.wandb` without its package or, online, without a key."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError(lacks("tracking.wandb", ModuleNotFoundError(name="wandb")))
    config.check()


def check_deepspeed(recipe: Recipe, parameters: int) -> None:
    """Refuse DeepSpeed settings that contradict the recipe, and a missing DeepSpeed JSON."""
    workers = recipe.cluster.workers
    training = recipe.train
    batch = BatchPlan(training.micro(workers), training.accumulation(workers), workers, training.global_batch)
    device = "cuda" if recipe.cluster.gpus_per_worker else "cpu"
    if training.compile is True and zero_stage(recipe) == 3:
        raise UserError(
            "train.compile = true with deepspeed.zero_stage = 3, which gathers the weights layer by layer: set "
            "train.compile=auto, which does not compile there, or deepspeed.zero_stage=2"
        )
    plan_config(
        recipe.deepspeed,
        recipe.optim,
        batch,
        precision=recipe.train.precision,
        device_type=device,
        parameters=parameters,
    )


def check_data(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse data that do not fit the recipe's splits, model or task."""
    manifest.split(recipe.data.train_split)
    manifest.split(recipe.data.eval_split)
    shapes = batch_shapes(recipe.data, manifest)
    sample_plan(recipe.data, manifest, seed=recipe.seed, global_batch=recipe.train.global_batch)
    check_targets(recipe, manifest, shapes)
    check_inputs(recipe.model, shapes, recipe.data, manifest)


def check_same_parameters(folder: RunFolder, checkpoint: CheckpointManifest, shapes: dict[str, list[int]]) -> None:
    """Refuse to resume from a checkpoint of another model."""
    difference = parameter_difference(checkpoint.parameters, shapes)
    if difference:
        raise UserError(
            f"{folder.checkpoints.location(checkpoint.step)} is of another model: {difference}: resume with the run's "
            f"recipe ({folder.location('recipe.yaml')}), or start a new run without --resume"
        )
