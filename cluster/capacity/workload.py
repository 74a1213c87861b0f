"""What a recipe asks for, independent of hardware: the model's cost, the batch, the data."""

from dataclasses import dataclass
from typing import Any

from cluster.recipe.config import Recipe, zero_stage
from perceiver.accounting import Account, account
from perceiver.config import UserError
from perceiver.step_trace import StepTrace, trace_step
from perceiver.storage import open_folder
from pipelines.feed.ingest import load_data
from pipelines.shards.manifest import MANIFEST, Manifest

CPU_NS_A_BYTE = {"image": 31.0, "audio": 10.0, "mel": 10.0, "video": 60.0, "clip": 60.0, "flow": 31.0}
"""CPU nanoseconds to decode and augment one stored byte, by feature: assumptions for when the data was not measured.
Images: a JPEG of 90 KB takes 1.3 ms with the papers' augmentation on a quiet core of an AMD EPYC, 15 ns a byte, and
twice that on an older or shared one; the others are of that order."""
CPU_SECONDS_A_SAMPLE = 50e-6
GROUP_BYTES = 8 << 20
"""Bytes of a row group, which a reader fetches with one request, when there is no manifest to look into."""


@dataclass(frozen=True)
class DataFacts:
    """The training split.

    Attributes:
        samples: how many.
        sample_bytes: stored bytes of one.
        classes: number of classes, None without labels.
        group_bytes: bytes of a row group: those of a read.
        cpu_seconds: CPU time to decode and augment one sample, assumed.
    """

    samples: int
    sample_bytes: float
    classes: int | None
    group_bytes: float
    cpu_seconds: float


@dataclass(frozen=True)
class Workload:
    """A recipe's needs.

    Attributes:
        recipe: the recipe itself.
        account: parameters, FLOPs and activations of the model.
        trace: what a training pass moves.
        data: the training split.
    """

    recipe: Recipe
    account: Account
    trace: StepTrace
    data: DataFacts

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
    """Work out what a recipe needs; the data may be there, or be described by the three numbers.

    Raises:
        UserError: the data is not there and not described.
    """
    data = _data_facts(recipe, samples, sample_bytes, classes)
    return Workload(
        recipe, account(recipe.model, classes=data.classes), trace_step(recipe.model, classes=data.classes), data
    )


def _data_facts(recipe: Recipe, samples: int | None, sample_bytes: float | None, classes: int | None) -> DataFacts:
    manifest = _manifest(recipe) if samples is None or sample_bytes is None else None
    if manifest is None:
        assert samples is not None and sample_bytes is not None
        seconds = decode_seconds(_kinds(recipe, None), sample_bytes)
        return DataFacts(samples, sample_bytes, classes, GROUP_BYTES, seconds)
    split = manifest.split(recipe.data.train_split)
    each = sample_bytes or split.bytes / split.samples
    return DataFacts(
        samples or split.samples,
        each,
        classes or len(manifest.classes) or None,
        split.shards[0].rows_per_group * each,
        decode_seconds(_kinds(recipe, manifest), each),
    )


def _manifest(recipe: Recipe) -> Manifest:
    url = recipe.data.url
    try:
        there = open_folder(url, recipe.data.storage_options).exists(MANIFEST)
    except (OSError, ImportError) as error:
        raise UserError(
            f"data.url = {url} cannot be looked into ({error}): describe the data with --samples and "
            "--sample-bytes (and --classes)"
        ) from None
    if not there:
        raise UserError(
            f"data.url = {url} is not prepared: prepare it, or describe the data with --samples and "
            "--sample-bytes (and --classes): --samples 1281167 --sample-bytes 110000 --classes 1000"
        )
    return load_data(recipe.data)


def _kinds(recipe: Recipe, manifest: Manifest | None) -> list[str]:
    """The kinds of the features, or of the model's inputs where there is no manifest."""
    if manifest is not None:
        return [str(getattr(feature, "kind", "")) for feature in manifest.features.values()]
    inputs: Any = recipe.model.inputs  # pyright: ignore[reportAttributeAccessIssue] every model has inputs
    return list(inputs.modalities) if inputs.kind == "multimodal" else [inputs.kind]


def decode_seconds(kinds: list[str], sample_bytes: float) -> float:
    """Assumed CPU seconds to decode a sample of so many stored bytes with features of these kinds."""
    return CPU_SECONDS_A_SAMPLE + 1e-9 * sample_bytes * max(CPU_NS_A_BYTE.get(kind, 1.0) for kind in kinds)
