"""Statistics for normalisation: mean and deviation of a bounded sample of the training split.

The sample is the same for the same data: some row groups, evenly spaced, and some rows of each. Damaged samples are
left out; training quarantines them.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from perceiver.config import UserError
from perceiver.storage import invalid_key
from pipelines.features.audio import AudioFeature, some_sound
from pipelines.features.base import ViewConfig
from pipelines.features.video import MediaFeature
from pipelines.shards.manifest import Manifest
from pipelines.shards.reader import Reader, RowGroup
from pipelines.shards.statistics import Spectrogram, SpectrogramStatistics, Statistics
from pipelines.transforms import BadSample

SPLIT = "train"
GROUPS, SAMPLES, RECORDINGS = 64, 1024, 256
"""Row groups that are read, and the most samples of them; fewer of recordings, which take longer to decode."""
FLAT = 1e-7
"""A deviation below this share of the mean is the rounding of a constant in float32."""

Moments = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Mean and variance of the values of one sample, by channel."""


def with_statistics(
    manifest: Manifest, url: str, options: Mapping[str, str] | None = None, wanted: Mapping[str, float] | None = None
) -> Manifest:
    """Return a manifest with the statistics of its training split that it lacks.

    Args:
        manifest: of a complete data set.
        url: its folder.
        options: storage options.
        wanted: settings of the log-mel spectrogram of sound, by key; default: those of `model.inputs` of kind mel, at
            the rate of most recordings.

    Raises:
        UserError: there is no such spectrogram, or no sound in the data.
    """
    keys = [key for name, feature in manifest.features.items() for key in feature.normalised(name)]
    if wanted and "audio" not in keys:
        raise UserError(
            f"--spectrogram: data set {manifest.name} has no feature audio, only {', '.join(keys) or 'none'}"
        )
    if SPLIT not in manifest.splits or not keys:
        return manifest
    found = dict(manifest.statistics)
    if not found:
        moments: dict[str, list[Moments]] = {}
        for values in _values(manifest, url, options):
            for key, each in values.items():
                moments.setdefault(key, []).append(_moments(each))
        found = {key: Statistics(**_joined(moments[key])) for key in keys if key in moments}
    spectrograms = manifest.spectrograms
    if "audio" in found and (wanted or not spectrograms):
        spectrogram = _spectrogram(manifest, url, options, wanted or {})
        if spectrogram and all(one.spectrogram != spectrogram for one in spectrograms):
            spectrograms = (*spectrograms, *_measured(manifest, url, options, spectrogram))
    return manifest.model_copy(update={"statistics": found, "spectrograms": spectrograms})


def _samples(manifest: Manifest, url: str, options: Mapping[str, str] | None) -> Iterator[tuple[RowGroup, int]]:
    """Yield row groups and rows of the sample."""
    split = manifest.split(SPLIT)
    most = RECORDINGS if any(feature.clips for feature in manifest.features.values()) else SAMPLES
    reader = Reader.of(url, manifest, split, options)
    ids = np.linspace(0, split.samples - 1, GROUPS).astype(np.int64)
    places = sorted({(shard, group) for shard, group, _ in reader.locate(ids)})
    for place in places:
        group = reader.row_groups({place})[place]
        rows = min(group.rows, math.ceil(most / len(places)))
        for row in np.linspace(0, group.rows - 1, rows).astype(int).tolist() if rows else ():
            yield group, row


def _values(
    manifest: Manifest, url: str, options: Mapping[str, str] | None
) -> Iterator[Mapping[str, NDArray[np.floating]]]:
    """Yield the values of each sample of the sample, by batch key."""
    for group, row in _samples(manifest, url, options):
        for name, feature in manifest.features.items():
            if not feature.normalised(name):
                continue
            try:
                yield feature.values(name, group.value(name, row))
            except BadSample:
                continue


def _sounds(manifest: Manifest, url: str, options: Mapping[str, str] | None) -> Iterator[Any]:
    """Yield the recordings of the sample, open."""
    for group, row in _samples(manifest, url, options):
        for name, feature in manifest.features.items():
            if isinstance(feature, AudioFeature | MediaFeature):
                try:
                    yield feature.decode(group.value(name, row), ViewConfig(), 0)
                except BadSample:
                    continue


def _spectrogram(
    manifest: Manifest, url: str, options: Mapping[str, str] | None, wanted: Mapping[str, float]
) -> Spectrogram | None:
    """Return the settings: those that are wanted, the model's defaults for others, the rate of most recordings."""
    from perceiver.modalities.mel import MelConfig

    rates = Counter(sound.rate for sound in _sounds(manifest, url, options)) if "rate" not in wanted else Counter[int]()
    rate = int(wanted.get("rate") or max(rates, key=lambda rate: (rates[rate], rate)))
    default = MelConfig().model_dump(include=set(Spectrogram.model_fields))
    default |= {"rate": rate, "high": min(default["high"], rate / 2)}
    try:
        return Spectrogram.model_validate(default | dict(wanted))
    except ValidationError as error:
        if not wanted:  # recordings of a few hundred samples per second
            return None
        raise UserError(f"--spectrogram: {invalid_key(error)}") from None


def _measured(
    manifest: Manifest, url: str, options: Mapping[str, str] | None, spectrogram: Spectrogram
) -> Iterator[SpectrogramStatistics]:
    """Yield the statistics of the spectrogram, unless no recording can be read."""
    import torch

    from perceiver.modalities.mel import MelConfig, log_mel

    config = MelConfig.model_validate(dict(spectrogram))
    moments: list[Moments] = []
    for sound in _sounds(manifest, url, options):
        try:
            samples = torch.from_numpy(some_sound(sound, spectrogram.rate)[:, 0])
        except BadSample:
            continue
        moments.append(_moments(log_mel(samples[None], config).flatten()[:, None].numpy()))
    if moments:
        yield SpectrogramStatistics(**_joined(moments), spectrogram=spectrogram)


def _moments(values: NDArray[np.floating]) -> Moments:
    """Return mean and variance (channels,) of values (n, channels)."""
    return values.mean(0, dtype=np.float64), values.var(0, dtype=np.float64)


def _joined(moments: list[Moments]) -> dict[str, Any]:
    """Return mean and deviation over samples of equal weight, the mean to 12 digits, the deviation to 6."""
    means, variances = (np.stack(part) for part in zip(*moments, strict=True))
    mean, deviation = means.mean(0), np.sqrt(variances.mean(0) + means.var(0))
    deviation[deviation <= np.maximum(FLAT * np.abs(mean), np.finfo(np.float32).tiny)] = 1.0
    digits = [[float(f"{value:.{n}g}") for value in part] for part, n in ((mean, 12), (deviation, 6))]
    return {"mean": digits[0], "std": digits[1], "samples": len(moments)}
