"""The workload of a recipe, independent of hardware: the model's cost, the batch, the data."""

from dataclasses import dataclass
from typing import Any

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

CPU_NS_PER_BYTE = {
    "image": 31.0,
    "segmentation": 31.0,
    "audio": 10.0,
    "mel": 10.0,
    "video": 250.0,
    "media": 250.0,
    "clip": 250.0,
    "flow": 31.0,
}
"""CPU nanoseconds to decode and augment one stored byte, by feature, assumed without a calibration. Images: a JPEG of
90 KB takes 1.3 ms with the papers' augmentation on an idle core of an AMD EPYC, 15 ns per byte, and twice that on an
older or shared core; sound is of that order. Video at 224 x 224, 32 frames: 250 ns, at 720p and at 256 pixels alike
(docs/data.md, media at the size at which they are used)."""
CPU_SECONDS_PER_SAMPLE = 50e-6
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
    return Workload(
        recipe, account(recipe.model, classes=data.classes), trace_step(recipe.model, classes=data.classes), data
    )


def _data_volume(recipe: Recipe, samples: int | None, sample_bytes: float | None, classes: int | None) -> DataVolume:
    manifest = _manifest(recipe) if samples is None or sample_bytes is None else None
    if manifest is None:
        assert samples is not None and sample_bytes is not None
        seconds = decode_seconds(_kinds(recipe, None), sample_bytes)
        return DataVolume(samples, sample_bytes, classes, GROUP_BYTES, seconds)
    split = manifest.split(recipe.data.train_split)
    each = sample_bytes or split.bytes / split.samples
    return DataVolume(
        samples or split.samples,
        each,
        classes or output_count(with_targets(recipe, manifest).task, len(manifest.classes)) or None,
        split.shards[0].rows_per_group * each,
        decode_seconds(_kinds(recipe, manifest), each),
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


def _kinds(recipe: Recipe, manifest: Manifest | None) -> list[str]:
    """Return the kinds of the features, or of the model's inputs without a manifest."""
    if manifest is not None:
        return [str(getattr(feature, "kind", "")) for feature in manifest.features.values()]
    inputs: Any = recipe.model.inputs  # pyright: ignore[reportAttributeAccessIssue] every model has inputs
    return list(inputs.modalities) if inputs.kind == "multimodal" else [inputs.kind]


def decode_seconds(kinds: list[str], sample_bytes: float) -> float:
    """Return the assumed CPU seconds to decode a sample of `sample_bytes` with features of these kinds."""
    return CPU_SECONDS_PER_SAMPLE + 1e-9 * sample_bytes * max(CPU_NS_PER_BYTE.get(kind, 1.0) for kind in kinds)
