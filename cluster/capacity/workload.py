"""The workload of a recipe, independent of hardware: the model's cost, the batch, the data."""

from dataclasses import dataclass
from typing import Any

from cluster.capacity.decoding import by_bytes, of_prepared
from cluster.recipe.config import Recipe, zero_stage
from cluster.recipe.statistics import with_statistics
from cluster.recipe.targets import with_targets
from perceiver.accounting import Account, account
from perceiver.config import UserError
from perceiver.step_trace import StepTrace, trace_step
from perceiver.storage import open_folder
from perceiver.tasks import output_count
from pipelines.feed.ingest import load_data
from pipelines.shards.manifest import MANIFEST, Manifest

GROUP_BYTES = 8 << 20
"""Assumed bytes of a record batch, which a reader fetches with one request, without a manifest."""


@dataclass(frozen=True)
class DataVolume:
    """The volume of the training split.

    Attributes:
        samples: number of samples.
        sample_bytes: stored bytes per sample.
        classes: number of classes, None without labels.
        group_bytes: bytes of a record batch, which is read at once.
        cpu_seconds: assumed CPU time to decode and augment a sample.
    """

    samples: int
    sample_bytes: float
    classes: int | None
    group_bytes: float
    cpu_seconds: float


@dataclass(frozen=True)
class Workload:
    """The needs of a recipe.

    Attributes:
        recipe: the recipe.
        account: parameters, FLOPs and activations of the model.
        trace: operations and memory traffic of a training pass.
        data: the training split.
    """

    recipe: Recipe
    account: Account
    trace: StepTrace
    data: DataVolume

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage."""
        return zero_stage(self.recipe)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.recipe.train.total_steps(self.data.samples)


def build_workload(
    recipe: Recipe, *, samples: int | None = None, sample_bytes: float | None = None, classes: int | None = None
) -> Workload:
    """Return the workload of a recipe; data that do not exist yet are described by the three numbers.

    Raises:
        UserError: the data are neither prepared nor described.
    """
    recipe = with_statistics(recipe, None)
    data = _data_volume(recipe, samples, sample_bytes, classes)
    what: dict[str, Any] = {"classes": data.classes, "frozen": recipe.train.freeze}
    return Workload(recipe, account(recipe.model, **what), trace_step(recipe.model, **what), data)


def _data_volume(recipe: Recipe, samples: int | None, sample_bytes: float | None, classes: int | None) -> DataVolume:
    manifest = _manifest(recipe) if samples is None or sample_bytes is None else None
    if manifest is None:
        assert samples is not None and sample_bytes is not None
        seconds = by_bytes(_kinds(recipe), sample_bytes)
        return DataVolume(samples, sample_bytes, classes, GROUP_BYTES, seconds)
    split = manifest.split(recipe.data.train_split)
    each = sample_bytes or split.bytes / split.samples
    return DataVolume(
        samples or split.samples,
        each,
        classes or output_count(with_targets(recipe, manifest).task, len(manifest.classes)) or None,
        split.shards[0].rows_per_group * each,
        of_prepared(manifest, recipe.data, each),
    )


def _manifest(recipe: Recipe) -> Manifest:
    url = recipe.data.url
    try:
        there = open_folder(url, recipe.data.storage_options).exists(MANIFEST)
    except (OSError, ImportError) as error:
        raise UserError(
            f"data.url = {url} cannot be read ({error}): describe the data with --samples and "
            "--sample-bytes (and --classes)"
        ) from None
    if not there:
        raise UserError(
            f"data.url = {url} is not prepared: prepare it, or describe the data with --samples and "
            "--sample-bytes (and --classes): --samples 1281167 --sample-bytes 110000 --classes 1000"
        )
    return load_data(recipe.data)


def _kinds(recipe: Recipe) -> list[str]:
    """Return the kinds of the model's inputs."""
    inputs: Any = recipe.model.inputs  # pyright: ignore[reportAttributeAccessIssue] every model has inputs
    return list(inputs.modalities) if inputs.kind == "multimodal" else [inputs.kind]
