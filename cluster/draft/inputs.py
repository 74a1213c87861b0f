"""The input of a drafted recipe: `model.inputs` and the keys of `data` that go with it, by the features of the data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.recipe.config import kind_of
from perceiver.config import UserError
from pipelines.inspect.sizes import Sizes
from pipelines.shards.manifest import Manifest

TARGETS = {"label", "labels", "target"}
PATCHED = 1024
"""Images of more pixels are read in patches."""
COVERED = 95
"""Percentile of the lengths that a text, a series or a clip covers."""


@dataclass(frozen=True)
class Limits:
    """The largest inputs of a draft.

    Attributes:
        side, frame: pixels of a side of an image and of a frame.
        frames: frames of a clip.
        points, steps, text: points of a cloud, steps of a series, tokens of a text.
        seconds: of a clip.
        mel: values of a spectrogram.
    """

    side: int = 64
    frame: int = 64
    frames: int = 8
    points: int = 512
    steps: int = 1024
    text: int = 256
    seconds: float = 2.0
    mel: int = 4096


CPU = Limits()
GPU = Limits(side=224, frame=112, frames=16, points=2048, steps=4096, text=2048, seconds=10.0, mel=16_384)


@dataclass(frozen=True)
class Part:
    """One input, or several as one.

    Attributes:
        facts: its size in words.
        inputs: the section `model.inputs`.
        data: keys of the section `data`.
        notes: comments for the recipe.
    """

    facts: str
    inputs: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def draft_inputs(manifest: Manifest, sizes: Sizes, limits: Limits) -> Part:
    """Return the input by the data's features: sound and video as two modalities, otherwise the first that fits.

    Args:
        manifest: of the data.
        sizes: of some samples.
        limits: the largest inputs.

    Raises:
        UserError: no feature is an input of our models.
    """
    drafts = _Drafts(manifest, sizes, limits)
    found = {key: part for name in manifest.features for key, part in drafts.parts(name).items()}
    if not found:
        has = ", ".join(f"{name} ({kind_of(feature)})" for name, feature in manifest.features.items())
        hint = "; for optical flow start from recipes/train/flow.yaml" if "flow" in manifest.features else ""
        raise UserError(
            f"init: no feature of {manifest.name} is an input that a recipe can be drafted for: it has {has}; wanted"
            f" image, video, audio, text, points, series or embeddings{hint}"
        )
    if {"audio", "video"} <= found.keys():
        both = {name: found.pop(name) for name in ("audio", "video")}
        first, part = "audio and video", _joined(both)
    else:
        first = next(iter(found))
        part = found.pop(first)
    others = (f"not used: {', '.join(found)} (the model reads {first})",) if found else ()
    return Part(f"{first} {part.facts}", part.inputs, part.data, (*part.notes, *others))


def _joined(parts: dict[str, Part]) -> Part:
    """Return several parts as one multimodal input, as recipes/train/av_digits.yaml has it."""
    return Part(
        ", ".join(f"{name} {part.facts}" for name, part in parts.items()),
        {
            "kind": "multimodal",
            "modalities": {name: part.inputs for name, part in parts.items()},
            "dropout": dict.fromkeys(parts, 0.15),
        },
        {key: value for part in parts.values() for key, value in part.data.items()},
        tuple(note for part in parts.values() for note in part.notes),
    )


class _Drafts:
    """Drafts the parts of the inputs of one data set."""

    def __init__(self, manifest: Manifest, sizes: Sizes, limits: Limits) -> None:
        self.manifest, self.sizes, self.limits = manifest, sizes, limits

    def parts(self, name: str) -> dict[str, Part]:
        """Return the parts of a feature by batch key; none of a target, or of a name that no input reads."""
        feature: Any = self.manifest.features[name]
        kind = kind_of(feature)
        if kind == "segmentation":
            return {"image": self._image(name, feature, patches=False)}
        if kind == "media":
            seconds = self._seconds(name)
            return {"audio": self._audio(name, seconds), "video": self._video(name, feature, seconds)}
        if kind != name:
            return {}
        match kind:
            case "image":
                return {name: self._image(name, feature, patches=True)}
            case "video":
                return {name: self._video(name, feature, self._seconds(name))}
            case "audio":
                return {name: self._audio(name, self._seconds(name))}
            case "text":
                return {name: self._text(name)}
            case "points":
                return {name: self._points(name, feature)}
            case "series":
                return {name: self._series(name, feature)}
            case "embeddings":
                return {name: _embeddings(feature)}
            case _:
                return {}

    def _size(self, name: str, quantity: str, default: float, percentile: float = 50) -> float:
        """Return a percentile of a quantity of the samples."""
        found = self.sizes.get(name, {}).get(quantity)
        return float(np.percentile(found, percentile)) if found else default

    def _seconds(self, name: str) -> float:
        return min(self._size(name, "seconds", 1.0, COVERED), self.limits.seconds)

    def _statistics(self, key: str) -> dict[str, Any]:
        return {"mean": "data", "std": "data"} if key in self.manifest.statistics else {}

    def _pixels(self, name: str, stored: tuple[int, int] | None, largest: int, multiple: int) -> tuple[int, int]:
        """Return (height, width): as stored if it is within the limit, else a square of a multiple of pixels."""
        if stored and max(stored) <= largest and not any(side % multiple for side in stored):
            return stored
        known = stored or tuple(int(self._size(name, side, largest)) for side in ("height", "width"))
        side = max(multiple, min(largest, *known) // multiple * multiple)
        return side, side

    def _image(self, name: str, feature: Any, *, patches: bool) -> Part:
        height, width = self._pixels(name, feature.size, self.limits.side, 1)
        patch = 8 if height * width > 16 * PATCHED else 4
        patched = patches and height * width > PATCHED
        if patched:
            height, width = self._pixels(name, feature.size, self.limits.side, patch)
        statistics = self._statistics("image")
        if not statistics:
            statistics = {"mean": [0.5] * feature.channels, "std": [0.25] * feature.channels}
        grid = (height // patch, width // patch) if patched else (height, width)
        inputs = {
            "kind": "image",
            "channels": feature.channels,
            "size": [height, width],
            **statistics,
            **({"front_end": "patch", "patch": patch} if patched else {}),
            "positions": _fourier(8, grid),
        }
        augment = {"shift": max(1, min(height, width) // 14), "rotate": 10, "scale": [0.9, 1.1]}
        resized = {} if feature.size == (height, width) else {"image_size": [height, width]}
        notes = ["augment: add flip: true if a mirrored image is as good, as for photographs"]
        if resized:
            notes.append(f"image_size: images are {_shape(feature.size)} and are resized; larger ones cost more time")
        return Part(f"{height} x {width}", inputs, {**resized, "augment": augment}, tuple(notes))

    def _video(self, name: str, feature: Any, seconds: float) -> Part:
        limits, patch = self.limits, 8 if self.limits.frame > 64 else 4
        height, width = self._pixels(name, feature.size, limits.frame, patch)
        fps = round(max(0.001, min(25.0, limits.frames / seconds)), 3)
        inputs = {
            "kind": "video",
            "frames": limits.frames,
            "channels": feature.channels,
            "size": [height, width],
            "patch": [2, patch, patch],
            **(self._statistics("video") or {"mean": [0.5] * feature.channels, "std": [0.25] * feature.channels}),
            "positions": _fourier(4, (limits.frames // 2, height // patch, width // patch)),
        }
        view: dict[str, Any] = {"frames": limits.frames, "fps": fps}
        view |= {} if feature.size == (height, width) else {"size": [height, width]}
        return Part(f"{limits.frames} frames of {height} x {width}", inputs, {"video": view})

    def _audio(self, name: str, seconds: float) -> Part:
        """Return a log-mel spectrogram: one whose statistics the data have, else that of recipes/train/notes.yaml."""
        notes: tuple[str, ...] = ()
        if self.manifest.spectrograms:
            shape: dict[str, Any] = self.manifest.spectrograms[0].spectrogram.model_dump()
            statistics: dict[str, Any] = {"mean": "data", "std": "data"}
        else:
            rate = int(self._size(name, "rate", 16_000))
            shape = {"rate": rate, "window": 1024, "hop": 512, "bins": 40}
            shape |= {"low": min(50.0, rate / 8), "high": min(7600.0, rate / 2)}
            statistics = {}
            notes = ("no statistics of the spectrogram: perceiver prepare measures them, for mean: data and std: data",)
        frames = max(1, min(round(seconds * shape["rate"]) // shape["hop"], self.limits.mel // shape["bins"]))
        samples = frames * shape["hop"]
        inputs = {
            "kind": "mel",
            "samples": samples,
            **shape,
            "layout": "grid",
            **statistics,
            "time_masks": 1,
            "time_width": max(1, frames // 6),
            "frequency_masks": 2,
            "frequency_width": max(1, shape["bins"] // 7),
            "positions": _fourier(8, (frames, shape["bins"])),
        }
        heard = f"{samples / shape['rate']:.3g} s"
        return Part(
            f"clips of {heard}",
            inputs,
            {"audio": {"rate": shape["rate"], "samples": samples}},
            (*notes, f"clips of {heard}: give audio.samples and inputs.samples another length together"),
        )

    def _text(self, name: str) -> Part:
        wanted = 2 + self._size(name, "bytes", self.limits.text, COVERED)
        length = min(self.limits.text, 32 * math.ceil(wanted / 32))
        inputs = {"kind": "text", "length": length, "channels": 64}
        return Part(f"of {length} bytes", inputs, {"text_length": length})

    def _points(self, name: str, feature: Any) -> Part:
        count = min(self.limits.points, max(16, 1 << int(math.log2(self._size(name, "points", self.limits.points)))))
        bands, resolution = (8, 16) if count < 512 else (16, 32)
        inputs = {"kind": "points", "points": count, "bands": bands, "max_resolution": resolution}
        columns = {"features": feature.features} if feature.features else {}
        return Part(f"clouds of {count}", {**inputs, **columns}, {"points": {"count": count}})

    def _series(self, name: str, feature: Any) -> Part:
        length = feature.length or max(1, int(self._size(name, "steps", 128, COVERED)))
        length = min(length, self.limits.steps)
        inputs = {"kind": "series", "length": length, "channels": feature.channels}
        if length == 1:
            inputs |= {"elements": "values", **self._statistics("series"), "embedding": 16}
            inputs["positions"] = {"kind": "learned", "channels": 16, "init_std": 1.0}
        else:
            patch = -(-length // 256)
            inputs |= {"patch": patch, **self._statistics("series"), "embedding": 32}
            inputs["positions"] = _fourier(8, (-(-length // patch),))
        shown = {} if feature.length == length else {"series": {"length": length}}
        return Part(f"{length} x {feature.channels} numbers", inputs, shown)


def _embeddings(feature: Any) -> Part:
    size = {"segments": feature.segments, "channels": feature.channels}
    inputs = {"kind": "embeddings", **size, "positions": _fourier(4, (feature.segments,))}
    return Part(f"of {feature.segments} segments with {feature.channels} values", inputs)


def _fourier(bands: int, grid: Sequence[int]) -> dict[str, Any]:
    """Return Fourier positions whose highest frequency is that of the quickstart: 16 for 28 pixels."""
    return {"kind": "fourier", "bands": bands, "max_resolution": [max(2, -(-4 * side // 7)) for side in grid]}


def _shape(size: tuple[int, int] | None) -> str:
    return f"{size[0]} x {size[1]}" if size else "of different sizes"
