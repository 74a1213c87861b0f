"""The page of `perceiver inspect --html`: samples of every modality, and the results of the inspection."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perceiver.report.figures import SMALL
from perceiver.report.page import CardPart, render, size, text
from perceiver.storage import refusing, write_whole
from pipelines.features import Feature, TargetFeature
from pipelines.features.base import UNLIMITED, ViewConfig
from pipelines.inspect.inspection import Inspection, check_followers, stored_row
from pipelines.inspect.samples import show, show_boxes
from pipelines.shards.manifest import Manifest, Split, load_manifest
from pipelines.shards.reader import Reader
from pipelines.transforms import BadSample

WIDE_PX, PICTURE_PX = 320, 210
WIDE = {"text", "audio", "video", "media", "flow"}


def write_page(found: Inspection, path: Path, *, samples: int = 24, options: Mapping[str, str] | None = None) -> Path:
    """Write the page of an inspection.

    Args:
        found: the result of `inspect`.
        path: the file to write; its folder is created.
        samples: number of samples shown of each split, evenly spread; the file grows with it.
        options: storage options.

    Raises:
        UserError: the page cannot be written.
    """
    manifest = load_manifest(found.url, options)
    splits = found.splits.values()
    cards = {
        name: list(_cards(found.url, manifest, split, samples, options)) for name, split in manifest.splits.items()
    }
    checked = any(split.sizes for split in splits)
    page = render(
        "inspection.html",
        kind="Prepared data",
        name=found.name,
        facts={
            "samples": sum(split.samples for split in splits),
            "size": size(sum(split.bytes for split in splits)),
            "splits": ", ".join(found.splits),
            "repeated contents": text(sum(split.doubles for split in splits) if checked else None),
        },
        found=found,
        checked=checked,
        unreadable=sum(split.unreadable for split in splits),
        cards=cards,
        width=card_width(manifest),
    )
    with refusing(str(path), "give --html a file in a writable folder"):
        write_whole(path, page)
    return path


def spread_places(total: int, count: int) -> list[int]:
    """Return at most `count` evenly spaced places of 0..total-1, each in the middle of its part."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _cards(
    url: str, manifest: Manifest, split: Split, count: int, options: Mapping[str, str] | None
) -> Iterator[dict[str, Any]]:
    reader = Reader.of(url, manifest, split, options)
    for place in spread_places(split.samples, count):
        shard, group, row = reader.locate(np.array([place]))[0]
        found = reader.row_groups({(shard, group)})[shard, group]
        if found.error:
            key = reader.row_key(shard, group, row)
            yield {"place": place, "key": key, "labels": [], "parts": [], "problem": found.error}
        else:
            yield _card(place, stored_row(found, row), manifest)


def _card(place: int, row: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Return the page's facts about one stored row: place in the split, key, labels, parts, and problem."""
    labels: list[str] = []
    parts: list[CardPart] = []
    problems, sample = [], dict[str, Any]()
    for name, feature in manifest.features.items():
        try:
            sample[name] = feature.decode(row[name], ViewConfig(**UNLIMITED), len(manifest.classes))
        except BadSample as error:
            problems.append(f"{name}: {error}")
    if not problems:
        try:
            check_followers(manifest, sample)
        except BadSample as error:
            problems.append(str(error))
    boxes = {feature.follows: sample.get(name) for name, feature in manifest.features.items() if feature.follows}
    for name, decoded in sample.items():
        feature = manifest.features[name]
        labels += _labels(name, feature, decoded, row[name], manifest)
        around = boxes.get(name)
        parts += show(feature.kind, row[name], decoded) if around is None else show_boxes(decoded, around)
    return {"place": place, "key": row["key"], "labels": labels, "parts": parts, "problem": "; ".join(problems)}


def _labels(name: str, feature: Feature, decoded: Any, stored: Any, manifest: Manifest) -> list[str]:
    """Return the words for a label, a number or a mark; none for other features."""
    if feature.kind in ("label", "labels"):
        numbers = [decoded] if feature.kind == "label" else stored
        classes = getattr(feature, "classes", ()) or manifest.classes
        return [classes[number] for number in numbers if number >= 0]
    if isinstance(feature, TargetFeature):
        return [f"{target} {text(value)}" for target, value in zip(feature.names, decoded.tolist(), strict=True)]
    return [name] if feature.kind == "flag" and decoded else []


def card_width(manifest: Manifest) -> int:
    """Return the minimum width of a card in pixels: small for pictures, larger for texts and recordings."""
    features = manifest.features.values()
    if any(feature.kind in WIDE for feature in features):
        return WIDE_PX
    return SMALL if any(max(getattr(feature, "size", None) or [SMALL]) < SMALL for feature in features) else PICTURE_PX
