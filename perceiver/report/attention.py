"""The section of a run's report on attention: scores and weights of the first and the last cross-attend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from perceiver.report import figures
from perceiver.report.page import CardPart

LATENTS_SHOWN, FRAMES_SHOWN, EXAMPLES_SHOWN = 6, 4, 6
CARD = 224
"""Longest side of a sample's picture in pixels."""


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of the latents to the inputs, averaged over heads.

    Arrays are (E, A, N, *grid) by the modality's name, E examples, A cross-attends, N latents. A grid is H x W of an
    image, F x H x W of a video, bins x frames of a spectrogram, M of sound or a series.

    Attributes:
        samples: the E sample ids.
        attends: the numbers of the A cross-attends, from 1.
        scores: before the softmax; NaN where there is no input.
        weights: after it.
    """

    samples: Sequence[int]
    attends: Sequence[int]
    scores: Mapping[str, NDArray[np.floating]]
    weights: Mapping[str, NDArray[np.floating]]


def attention_sections(
    maps: AttentionMaps,
    images: Mapping[int, NDArray[np.uint8]],
    parts: Mapping[int, Sequence[CardPart]],
    keys: Mapping[int, str],
    files: dict[str, bytes],
) -> list[dict[str, Any]]:
    """Return the page's values for each example, and add its figure to `files`.

    A row has the mean map of the latents and those of some latents; there is one for the scores and one for the
    weights of each cross-attend and modality.
    """
    flat = [each.reshape(*each.shape[:3], -1) for each in maps.weights.values()]
    latents, elements = choose_latents(np.concatenate(flat, -1)), sum(each.shape[-1] for each in flat)
    sections = []
    for place, sample in list(enumerate(maps.samples))[:EXAMPLES_SHOWN]:
        image = figures.picture(images[sample]) if sample in images else None
        rows, pictures = [], []
        for index, attend in enumerate(maps.attends):
            for name, kind in ((name, kind) for name in maps.weights for kind in ("scores", "weights")):
                values = (maps.scores if kind == "scores" else maps.weights)[name][place, index].astype(np.float64)
                chosen = [values.mean(axis=0), *values[latents]]
                below = image if name == "image" else None
                drawn = [_draw(kind, each, below) for each in chosen]
                notes = [_note(kind, each, elements) for each in chosen]
                modality = f", {name}" if len(maps.weights) > 1 else ""
                cells = list(zip(map(figures.image_uri, drawn), notes, strict=True))
                rows.append((f"cross-attend {attend}{modality}: {kind}", cells))
                pictures.append([*([below] if below else []), *drawn])
        files[f"figures/attention-{sample}.png"] = figures.png_bytes(figures.montage(pictures, figures.MAP))
        shown = figures.image_uri(image, CARD) if image else None
        strips = [] if image else [part for part in parts.get(sample, ()) if part.kind in ("picture", "strip")]
        key = keys.get(sample, f"#{sample}")
        sections.append({"key": key, "image": shown, "parts": strips, "latents": latents, "rows": rows})
    return sections


def _draw(kind: str, values: NDArray[np.float64], image: Image | None) -> Image:
    flat = flat_map(values)
    return figures.score_map(flat) if kind == "scores" else figures.attention_map(flat, image)


def _note(kind: str, values: NDArray[np.float64], elements: int) -> str:
    if np.isnan(values).all():
        return "no input"
    if kind == "scores":
        return f"{np.nanmin(values):.3g} to {np.nanmax(values):.3g}"
    return f"{np.nanmax(values) * elements:.1f}×"


def flat_map(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a map as a picture (H, W): of a video some frames in two columns, of sound a band."""
    if values.ndim == 1:
        return np.tile(values, (-(-len(values) // 8), 1))
    if values.ndim == 2:
        return values
    chosen = np.unique(np.linspace(0, len(values) - 1, FRAMES_SHOWN).round().astype(int))
    gap = -(-values.shape[2] // 8)
    frames = [np.pad(frame, ((0, gap), (0, gap)), constant_values=np.nan) for frame in values[chosen]]
    frames += [np.full_like(frames[0], np.nan)] * (len(frames) % 2)
    rows = [np.concatenate(frames[start : start + 2], axis=1) for start in range(0, len(frames), 2)]
    return np.concatenate(rows)[:-gap, :-gap]


def choose_latents(weights: NDArray[np.floating], count: int = LATENTS_SHOWN) -> list[int]:
    """Return the latents whose maps differ most: the most focused one, then each time the farthest from those taken.

    Args:
        weights: (E, A, N, M).
        count: greatest number of latents.
    """
    maps = np.moveaxis(np.nan_to_num(weights.astype(np.float64)), 2, 0)
    flat = maps.reshape(maps.shape[0], -1)
    flat = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    chosen = [int(np.argmax(flat.max(axis=1)))]
    distance = 1 - flat @ flat[chosen[0]]
    while len(chosen) < min(count, len(flat)):
        distance[chosen] = -1.0
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, 1 - flat @ flat[chosen[-1]])
    return sorted(chosen)
