"""Statistics for normalisation: against direct computations, bounded, deterministic, and checked when they are read."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from perceiver.config import UserError
from perceiver.modalities.mel import MelConfig, log_mel
from pipelines.features import TargetFeature
from pipelines.order.mixture import MixturePart, mixed_manifest
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import MANIFEST, load_manifest
from pipelines.statistics import SAMPLES, with_statistics
from tests.pipelines.toys import write_images

RATE = 16000


def colours(folder: Path, count: int = 12) -> np.ndarray:
    """Write PNGs of two classes with train and test splits; return the training pixels (n, H, W, C)."""
    rng = np.random.default_rng(0)
    kept = []
    for split, shift in (("train", 0), ("test", 100)):
        for name in ("a", "b"):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count // 2):
                pixels = rng.integers(shift, [shift + 30, shift + 60, shift + 150], (9, 7, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
                kept += [pixels] if split == "train" else []
    return np.stack(kept)


def sounds(folder: Path, count: int = 6) -> list[np.ndarray]:
    """Write WAV files of two classes; return the samples (T,) in [-1, 1)."""
    rng = np.random.default_rng(1)
    found = []
    for number in range(count):
        place = folder / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        samples = (rng.normal(0.1, 0.05, RATE // 2 + 100 * number) * 32768).astype(np.int16)
        soundfile.write(place / f"{number}.wav", samples, RATE)
        found.append(samples / 32768)
    return found


def test_pixels_of_the_training_split_alone(tmp_path: Path) -> None:
    pixels = colours(tmp_path / "raw") / 255
    manifest = prepare("image_folder", str(tmp_path / "raw"), str(tmp_path / "data"))
    found = manifest.statistics["image"]
    assert found.samples == len(pixels)
    assert np.allclose(found.mean, pixels.mean((0, 1, 2)), atol=1e-6)
    assert np.allclose(found.std, pixels.reshape(-1, 3).std(0), atol=1e-6)
    assert load_manifest(str(tmp_path / "data")) == manifest


def test_sound_and_spectrogram_are_those_that_the_model_sees(tmp_path: Path) -> None:
    waves = sounds(tmp_path / "raw")
    options = PrepareConfig(options={"held_out": "none"})
    manifest = prepare("audio_folder", str(tmp_path / "raw"), str(tmp_path / "data"), options)
    found = manifest.statistics["audio"]
    means, variances = [wave.mean() for wave in waves], [wave.var() for wave in waves]
    assert np.allclose(found.mean, np.mean(means), rtol=1e-3)
    assert np.allclose(found.std, np.sqrt(np.mean(variances) + np.var(means)), rtol=1e-3)
    (mel,) = manifest.spectrograms
    config = MelConfig(rate=RATE)
    assert mel.spectrogram.model_dump() == config.model_dump(include=set(mel.spectrogram.model_dump()))
    values = [log_mel(torch.tensor(wave, dtype=torch.float32)[None], config).numpy() for wave in waves]
    spread = np.sqrt(np.mean([v.var() for v in values]) + np.var([v.mean() for v in values]))
    assert np.allclose([*mel.mean, *mel.std], [np.mean([v.mean() for v in values]), spread], rtol=1e-3)


def test_a_complete_destination_gets_what_it_lacks(tmp_path: Path) -> None:
    sounds(tmp_path / "raw")
    place = tmp_path / "data"
    options = PrepareConfig(options={"held_out": "none"})
    first = prepare("audio_folder", str(tmp_path / "raw"), str(place), options)
    tree = json.loads((place / MANIFEST).read_text())
    del tree["statistics"], tree["spectrograms"]  # as an earlier version wrote it
    (place / MANIFEST).write_text(json.dumps(tree))
    assert not load_manifest(str(place)).statistics
    assert prepare("audio_folder", str(tmp_path / "raw"), str(place), options) == first
    changed = (place / MANIFEST).stat().st_mtime_ns
    prepare("audio_folder", str(tmp_path / "raw"), str(place), options)
    assert (place / MANIFEST).stat().st_mtime_ns == changed
    more = options.model_copy(update={"spectrogram": {"window": 512, "hop": 256, "bins": 20}})
    again = prepare("audio_folder", str(tmp_path / "raw"), str(place), more)
    assert [one.spectrogram.bins for one in again.spectrograms] == [80, 20] and again.splits == first.splits
    for wrong, words in (({"bans": 1}, "bans"), ({"bins": 1.5}, "bins"), ({"high": 9000}, "rate / 2")):
        with pytest.raises(UserError, match=words):
            prepare(
                "audio_folder", str(tmp_path / "raw"), str(place), options.model_copy(update={"spectrogram": wrong})
            )


def test_a_spectrogram_of_data_without_sound_is_refused(tmp_path: Path) -> None:
    colours(tmp_path / "raw")
    with pytest.raises(UserError, match="no feature audio"):
        prepare("image_folder", str(tmp_path / "raw"), str(tmp_path / "data"), PrepareConfig(spectrogram={"bins": 8}))


def test_damaged_samples_do_not_count_and_constants_have_deviation_one(tmp_path: Path) -> None:
    for number in range(4):
        place = tmp_path / "raw" / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        sink = io.BytesIO()
        Image.new("RGB", (4, 4), (51, 0, 102)).save(sink, "PNG")
        (place / f"{number}.png").write_bytes(sink.getvalue() if number else b"\x89PNG damaged")
    options = PrepareConfig(options={"held_out": "none"})
    found = prepare("image_folder", str(tmp_path / "raw"), str(tmp_path / "data"), options).statistics["image"]
    assert found.mean == pytest.approx((0.2, 0.0, 0.4)) and (found.std, found.samples) == ((1.0, 1.0, 1.0), 3)


def test_the_sample_is_bounded_and_always_the_same(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, {"train": [700, 700], "test": [5]})
    found = with_statistics(manifest, str(tmp_path)).statistics["image"]
    assert found.samples <= SAMPLES < manifest.split("train").samples
    assert found == with_statistics(manifest, str(tmp_path)).statistics["image"]
    assert np.allclose([*found.mean, *found.std], [0.5, 0.29], atol=0.02)  # uniform


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": [0.5], "std": [0.1]}, "1 channels, wanted 3"),
        ({"mean": [0.5] * 3, "std": [0.1, 0.0, 0.1]}, "greater than 0"),
        ({"mean": [0.5] * 3, "std": [0.1] * 2}, "3 means and 2 deviations"),
        ({"mean": [0.5, float("nan"), 0.5], "std": [0.1] * 3}, "finite"),
        ({"mean": [], "std": []}, "at least 1"),
    ],
)
def test_statistics_are_checked_when_they_are_read(tmp_path: Path, change: dict[str, list[float]], words: str) -> None:
    colours(tmp_path / "raw", 4)
    prepare("image_folder", str(tmp_path / "raw"), str(tmp_path / "data"))
    path = tmp_path / "data" / MANIFEST
    tree = json.loads(path.read_text())
    tree["statistics"]["image"] |= change
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=words):
        load_manifest(str(tmp_path / "data"))


def test_a_mixture_has_the_statistics_of_its_parts_by_weight(tmp_path: Path) -> None:
    means = []
    for number, level in enumerate((51, 102)):
        for split in ("train", "test"):
            for name in "ab":
                place = tmp_path / f"raw{number}" / split / name
                place.mkdir(parents=True)
                Image.new("L", (4, 4), level).save(place / "0.png")
        means.append(prepare("image_folder", str(tmp_path / f"raw{number}"), str(tmp_path / f"data{number}")))
    flat = [
        m.model_copy(update={"statistics": {"image": m.statistics["image"].model_copy(update={"std": (1e-3,)})}})
        for m in means
    ]
    parts = [MixturePart(url=f"data{number}", weight=weight) for number, weight in enumerate((3, 1))]
    mixed = mixed_manifest(flat[0], "train", list(zip(parts, flat, strict=True))).statistics["image"]
    assert np.allclose([*mixed.mean, *mixed.std], [0.25, np.sqrt(1e-6 + 0.75 * 0.05**2 + 0.25 * 0.15**2)])
    targets = [
        one.model_copy(update={"features": {"target": TargetFeature(names=("a",), mean=(mean,), std=(0.1,))}})
        for one, mean in zip(flat, (0.2, 0.4), strict=True)
    ]
    target: Any = mixed_manifest(targets[1], "train", list(zip(parts, targets, strict=True))).features["target"]
    assert np.allclose([*target.mean, *target.std], [0.25, np.sqrt(0.01 + 0.75 * 0.05**2 + 0.25 * 0.15**2)])
    without = [flat[0], flat[1].model_copy(update={"statistics": {}})]
    assert not mixed_manifest(flat[0], "train", list(zip(parts, without, strict=True))).statistics
