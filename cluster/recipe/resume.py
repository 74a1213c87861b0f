"""What a resumed run must have in common with its first start: the recipe but for some keys, and the data."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from cluster.recipe.config import Recipe, build_recipe, for_workers
from cluster.record.run_folder import RunFolder
from perceiver.config import UserError, shown
from perceiver.export.facts import DataFacts
from perceiver.optim.schedules import build_schedule
from perceiver.tracking.redaction import redact
from perceiver.train.checkpoint.store import CheckpointManifest
from perceiver.yaml_reader import parse_yaml

MAY_CHANGE = (
    # where things are, who runs them, how they are tracked
    "name",
    "output",
    "cluster.*",
    "deepspeed.*",
    "tracking.*",
    # how the data are read; their content is compared by `check_same_data`
    "data.url",
    "data.mixture.*.url",
    "data.files",
    "data.storage_options.*",
    "data.executor",
    "data.cpus_per_task",
    "data.tasks",
    "data.task_memory",
    "data.task_labels.*",
    "data.run_samples",
    "data.run_bytes",
    "data.prefetch_*",
    "data.read.*",
    "data.cache_bytes",
    "data.max_bad_fraction",
    # how long the run is, what it keeps, how its steps are computed
    "train.epochs",
    "train.steps",
    "train.micro_batch",
    "train.precision",
    "train.compile",
    "train.bf16_residual",
    "train.log_every",
    "train.eval_every",
    "train.eval_async",
    "train.early_stop",
    "train.early_stop.*",
    "train.checkpoint_*",
    "train.keep_*",
    "train.on_bad_loss",
    "train.bad_loss_limit",
    "train.on_spike",
    "train.replay_every",
    "train.spike_window",
    "train.spike_factor",
    "train.ledger",
    "train.profile*",
    "model.attention",
    "model.checkpoint_activations",
    # how it continues to learn
    "optim.lr",
    "optim.weight_decay",
    "optim.clip",
    "optim.groups",
    "optim.groups.*",
    "optim.layer_decay",
    "optim.schedule.*",
    "hooks",
    "hooks.*",
)
"""Patterns of the keys that may differ between two starts of a run. All others must stay as they are."""
JUMP = 1.5
"""A longer run is refused if its length alone would raise the learning rate by more than this factor."""
GENTLE = 0.1
"""The proposed peak of the learning rate of a longer run, as a share of the first one."""
SHOWN, LONGEST_VALUE, LONGEST_CHANGE = 4, 60, 500


@dataclass(frozen=True)
class Before:
    """The recipe with which a run was last trained, and how far.

    Attributes:
        tree: the recipe as plain types, secrets redacted.
        recipe: the recipe; None if this version cannot read it.
        step: optimizer steps done.
        place: the file that contains it.
    """

    tree: Mapping[str, Any]
    recipe: Recipe | None
    step: int
    place: str


def recipe_before(folder: RunFolder, checkpoint: CheckpointManifest | None) -> Before | None:
    """Return the recipe of a run: that of its newest checkpoint, else of its `recipe.yaml`; None if it has neither."""
    place = folder.checkpoints.location(checkpoint.step) if checkpoint else folder.location("recipe.yaml")
    tree = checkpoint.recipe if checkpoint else parse_yaml(folder.read("recipe.yaml") or "", place)
    if not isinstance(tree, dict) or not tree:
        return None
    try:
        recipe = build_recipe(tree, place)
        tree = redact(for_workers(recipe))  # with today's defaults for keys that it lacks
    except UserError:
        recipe, tree = None, redact(tree)
    return Before(tree, recipe, checkpoint.step if checkpoint else 0, place)


def check_same_recipe(recipe: Recipe, before: Before) -> tuple[str, ...]:
    """Return the keys that have changed since the last start, as `key: old -> new`.

    Raises:
        UserError: a key has changed that must not; the message names it, both values and the fix.
    """
    old, new = dict(_flat(before.tree)), dict(_flat(redact(for_workers(recipe))))
    changed = {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
    refused = {key: pair for key, pair in changed.items() if not any(fnmatchcase(key, known) for known in MAY_CHANGE)}
    if refused:
        listed = [f"{key} = {_value(new)}, the run has {_value(old)}" for key, (old, new) in refused.items()]
        more = f" (and {len(listed) - SHOWN} more)" if len(listed) > SHOWN else ""
        fix = " ".join(shlex.quote(f"{key}={_value(pair[0])}") for key, pair in [*refused.items()][:SHOWN])
        raise UserError(
            f"--resume: {'; '.join(listed[:SHOWN])}{more} ({before.place}): set {fix}, or start a new run without "
            "--resume; train.init_from starts it from this run's weights"
        )
    return tuple(
        f"{key}: {_value(old, LONGEST_CHANGE)} -> {_value(new, LONGEST_CHANGE)}"
        for key, (old, new) in sorted(changed.items())
    )


def _flat(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings, and of mappings in lists, by dotted key; an empty mapping yields nothing."""
    if isinstance(node, Mapping):
        pairs: Any = node.items()
    elif isinstance(node, list | tuple) and node and all(isinstance(item, Mapping) for item in node):
        pairs = enumerate(node)
    else:
        yield key, list(node) if isinstance(node, tuple) else node
        return
    for name, value in pairs:
        yield from _flat(value, f"{key}.{name}" if key else str(name))


def _value(value: Any, longest: int = LONGEST_VALUE) -> str:
    return shown(value if isinstance(value, str) and value else json.dumps(value, default=str), longest)


def check_same_data(url: str, now: DataFacts, folder: RunFolder) -> None:
    """Refuse data other than those that a run was started with; a copy in another place is the same data.

    Args:
        url: the recipe's `data.url`.
        now: the facts of these data.
        folder: of the run.

    Raises:
        UserError: the message says in what they differ.
    """
    recorded = folder.facts().get("data")
    if not recorded:
        return
    before = DataFacts(**{key: value for key, value in recorded.items() if key in DataFacts.__dataclass_fields__})
    difference = data_difference(before, now)
    if difference:
        raise UserError(
            f"--resume: {url} is not the data of {folder.url}: {difference}: set data.url to the run's data "
            f"({before.name}), or start a new run without --resume; train.init_from starts it from this run's weights"
        )


def data_difference(before: DataFacts, now: DataFacts) -> str:
    """Return in what two data sets differ, in one phrase; empty if they are the same."""
    if tuple(before.classes) != tuple(now.classes):
        return f"its classes are {_names(now.classes)}, the run's {_names(before.classes)}"
    if not before.digest:  # recorded by an earlier version
        return "" if before.name == now.name else f"it is {now.name}, the run's {before.name}"
    for what, old, new in (("features", before.features, now.features), ("samples", before.samples, now.samples)):
        if dict(old) != dict(new):
            return f"its {what} are {_pairs(new)}, the run's {_pairs(old)}"
    if before.digest != now.digest:
        return "the contents of its files differ (see manifest.json)"
    (places, _, versions), (places_now, _, versions_now) = before.files.partition(":"), now.files.partition(":")
    changed = places and places == places_now and versions != versions_now
    return "its indexed files have changed since the run began" if changed else ""


def _names(classes: tuple[str, ...] | list[str]) -> str:
    if not classes:
        return "none"
    return f"{len(classes)} ({shown(', '.join(classes), LONGEST_VALUE)})"


def _pairs(found: Mapping[str, Any]) -> str:
    return shown(", ".join(f"{name} {value}" for name, value in found.items()), 2 * LONGEST_VALUE)


def check_schedule(recipe: Recipe, before: Before, samples: int) -> None:
    """Refuse a new length that alone would raise the learning rate.

    Args:
        recipe: the recipe to continue with.
        before: the recipe so far.
        samples: number of training samples.

    Raises:
        UserError: the message has the keys that continue without a jump.
    """
    step, old = before.step, before.recipe
    if old is None or not step or step >= recipe.train.total_steps(samples):
        return
    if (old.optim.lr, old.optim.schedule) != (recipe.optim.lr, recipe.optim.schedule):
        return  # the new rate was asked for
    was, now = rate(old, min(step, old.train.total_steps(samples) - 1), samples), rate(recipe, step, samples)
    if now > JUMP * was:
        key = "train.epochs" if recipe.train.epochs else "train.steps"
        raise UserError(
            f"--resume: {key} = {recipe.train.epochs or recipe.train.steps:g}, the run has "
            f"{old.train.epochs or old.train.steps:g}: this alone would raise the learning rate from {was:.2g} to "
            f"{now:.2g} at step {step}: add {gentle(recipe, step)} for a new schedule from there, or set both to "
            "other values"
        )


def check_start(recipe: Recipe, total_steps: int) -> None:
    """Refuse a schedule that begins after the last step."""
    start = recipe.optim.schedule.start
    if start >= total_steps:
        raise UserError(
            f"optim.schedule.start = {start}, but the run has {total_steps} steps: set it to the step from which the "
            "run is resumed, or to 0"
        )


def rate(recipe: Recipe, step: int, samples: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    total, per_epoch = recipe.train.total_steps(samples), samples / recipe.train.global_batch
    return recipe.optim.lr * build_schedule(recipe.optim.schedule, total, per_epoch)(step)


def gentle(recipe: Recipe, step: int) -> str:
    """Return the overrides with which a run continues from a step with a new schedule, at first slowly."""
    start = f"optim.schedule.start={step}"
    return start if recipe.optim.schedule.start else f"{start} optim.lr={GENTLE * recipe.optim.lr:.2g}"


def longer(recipe: Recipe, step: int, samples: int) -> str:
    """Return the overrides that train a finished run as long again, without a jump of the learning rate."""
    train = recipe.train
    if train.early_stop and step < train.total_steps(samples):
        return "train.early_stop=null"
    length: dict[str, float] = {"steps": step * 2}
    if train.epochs:
        done = float(f"{step * train.global_batch / samples:.4g}")
        length = {"epochs": 2 * (train.epochs if train.total_steps(samples) >= step else done)}
    twice = recipe.model_copy(update={"train": train.model_copy(update=length)})
    words = " ".join(f"train.{key}={value:g}" for key, value in length.items())
    jumps = rate(twice, step, samples) > JUMP * rate(recipe, step - 1, samples)
    return f"{words} {gentle(recipe, step)}" if jumps else words
