"""A recipe for prepared data: its sections by the features of the data, sizes by their number and the machine."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from cluster.draft.inputs import CPU, GPU, Limits, Part, draft_inputs
from cluster.draft.targets import Goal, draft_goal
from cluster.recipe.file import packaged_file, read_tree
from cluster.recipe.resources import machine_cpus
from pipelines.inspect.sizes import Sizes
from pipelines.shards.manifest import Manifest

NEAREST = {
    "image": "quickstart",
    "series": "breast_cancer",
    "points": "digit_points",
    "mel": "notes",
    "video": "av_digits",
    "multimodal": "av_digits",
    "text": "languages",
    "embeddings": "weak_av",
}
"""The recipe whose model, optimizer and batch are taken, by kind of input."""
OF_TASK = {"segmentation": "digit_masks", "multitask": "notes_both"}
"""The one by task, if it has a model of its own."""
HELD_OUT = ("test", "val", "validation", "valid", "dev")
FEW, MANY = 1000, 50_000
"""Training samples below which the size of recipes/train/breast_cancer.yaml is enough, and from which a GPU trains a
wider model than those of our recipes for CPUs."""
GPU_GB = 15.0
"""Memory that the wider model needs, with batches of 128."""
CPU_WORKERS = 4


@dataclass(frozen=True)
class Machine:
    """This machine: CPU cores, GPUs and the memory of one in 10^9 bytes."""

    cpus: int
    gpus: int = 0
    gpu_gb: float = 0.0

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPU{'s' * (self.gpus > 1)} of {self.gpu_gb:.0f} GB" if self.gpus else ""
        return f"{self.cpus} CPU cores{gpus}"


@dataclass(frozen=True)
class Draft:
    """A recipe without its length.

    Attributes:
        tree: the sections.
        part: the input.
        goal: the task.
        nearest: the recipe from which model, optimizer and batch are taken.
        notes: comments by section.
    """

    tree: dict[str, Any]
    part: Part
    goal: Goal
    nearest: str
    notes: Mapping[str, tuple[str, ...]]

    def with_length(self, train: Mapping[str, Any], steps: int) -> "Draft":
        """Return the recipe with the keys of `train` of a run of some steps; the warm-up is at most a tenth of them."""
        optim = dict(self.tree["optim"])
        schedule = optim["schedule"]
        optim["schedule"] = schedule | {"warmup_steps": min(schedule["warmup_steps"], steps // 10)}
        return replace(self, tree=self.tree | {"optim": optim, "train": dict(train)})


def this_machine() -> Machine:
    """Return this machine's cores and GPUs."""
    gpus = torch.cuda.device_count()
    return Machine(machine_cpus(), gpus, torch.cuda.mem_get_info()[1] / 1e9 if gpus else 0.0)


def draft_recipe(url: str, manifest: Manifest, sizes: Sizes, machine: Machine, workers: int | None = None) -> Draft:
    """Return a recipe for prepared data, with `train.steps` = 1.

    Args:
        url: folder of the data.
        manifest: of the data.
        sizes: of some training samples.
        machine: to train on.
        workers: default: the machine's GPUs, else its cores, at most four.

    Raises:
        UserError: no input or no task fits the features.
    """
    limits: Limits = GPU if machine.gpus else CPU
    goal = draft_goal(manifest)
    part = draft_inputs(manifest, sizes, limits)
    task, kind = goal.task["kind"], part.inputs["kind"]
    if (task, kind) == ("classification", "text"):
        part = replace(part, inputs=part.inputs | {"front_end": "conv"})
    nearest = OF_TASK.get(task, NEAREST[kind])
    base = read_tree(packaged_file(f"train/{nearest}.yaml"))
    splits, split_notes = _splits(manifest)
    samples = manifest.split(training_split(manifest)).samples
    workers = workers or machine.gpus or min(machine.cpus, CPU_WORKERS)
    tree: dict[str, Any] = {
        "name": recipe_name(url, manifest),
        "seed": 0,
        "data": {"url": url, **splits, **part.data},
        "model": _model(base, part, goal, _width(samples, machine)),
        "task": goal.task | ({"label_smoothing": 0.05} if (task, kind) == ("classification", "mel") else {}),
        "optim": base["optim"],
        "train": {"steps": 1, "global_batch": _batch(base["train"]["global_batch"], samples, workers)},
        "deepspeed": {"zero_stage": 1},
        "cluster": {"workers": workers, **({"gpus_per_worker": 1} if machine.gpus else {})},
    }
    notes = {
        "data": (*split_notes, *part.notes),
        "model": ("latents and latent_channels: more can learn more from more samples, and take longer",),
        "task": goal.notes,
        "optim": ("the learning rate rises over warmup_steps, then falls to 0 at the end of the run",),
        "cluster": ("workers: processes that share each batch",),
    }
    return Draft(tree, part, goal, f"recipes/train/{nearest}.yaml", notes)


def training_split(manifest: Manifest) -> str:
    """Return the split to train on: train, else the first."""
    return "train" if "train" in manifest.splits else next(iter(manifest.splits))


def recipe_name(url: str, manifest: Manifest) -> str:
    """Return a plain name for the runs: of the data's folder, else of the data set."""
    for name in (url.rstrip("/").rpartition("/")[2], manifest.name):
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[:80]
        if plain:
            return plain
    return "recipe"


def _splits(manifest: Manifest) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the keys of the splits that are not the defaults, and comments."""
    train = training_split(manifest)
    others = [name for name in manifest.splits if name != train]
    held_out = next((name for name in HELD_OUT if name in others), others[0] if others else None)
    found = {"train_split": train} if train != "train" else {}
    if held_out is None:
        note = "no held-out split: evaluations are of the training data and show what is memorised, not what is learned"
        return {**found, "eval_split": train}, (note,)
    return {**found, **({"eval_split": held_out} if held_out != "test" else {})}, ()


def _width(samples: int, machine: Machine) -> dict[str, int]:
    """Return the keys of the model that change with the number of samples and the machine."""
    if samples < FEW:
        return {"latents": 8, "latent_channels": 32}
    if machine.gpu_gb >= GPU_GB and samples >= MANY:
        return {"latents": 128, "latent_channels": 256, "heads": 8}
    return {"latents": 16, "latent_channels": 64}


def _model(base: Mapping[str, Any], part: Part, goal: Goal, width: Mapping[str, int]) -> dict[str, Any]:
    """Return the model of a recipe with other inputs, and the outputs that the task needs."""
    body = {key: value for key, value in base["model"].items() if key not in ("kind", "inputs", "decoder")}
    kind = base["model"]["kind"]
    if goal.decoder and kind == "perceiver":
        body = {key: body[key] for key in ("latents", "latent_channels", "latent_init_std", "heads")}
        body |= {"blocks": 1, "self_attends_per_block": 6}
    decoder = {"decoder": goal.decoder} if goal.decoder else {}
    return {"kind": "perceiver_io" if decoder else kind, "inputs": part.inputs, **body, **width, **decoder}


def _batch(wanted: int, samples: int, workers: int) -> int:
    """Return the batch of a recipe, smaller for few samples, so that an epoch has at least four steps."""
    while wanted // 2 >= workers and wanted > samples / 4:
        wanted //= 2
    return wanted
