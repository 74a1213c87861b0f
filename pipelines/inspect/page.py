"""The page of `perceiver inspect --html`: samples of every modality to look at, beside what the inspection found.

One self-contained file: pictures, sounds and videos are data URIs, nothing is fetched, all text is escaped.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perceiver.config import UserError
from pipelines.features.base import ViewConfig
from pipelines.inspect.inspection import Inspection, Spread, figure, stored_row
from pipelines.inspect.pieces import SMALL, Piece
from pipelines.inspect.views import VIEWS
from pipelines.shards.manifest import Manifest, Split, load_manifest
from pipelines.shards.reader import Reader
from pipelines.transforms import BadSample

BARS = 40
"""Classes that get a bar each; more are drawn as one outline, the largest first."""

WIDE = {"text", "audio", "video", "media", "flow"}


@dataclass(frozen=True)
class Card:
    """One sample on the page.

    Attributes:
        place: its number in the split.
        key: where it came from.
        labels: its classes.
        pieces: what there is to see and hear.
        problem: why it cannot be used, or empty.
    """

    place: int
    key: str
    labels: list[str]
    pieces: list[Piece]
    problem: str = ""


def write_page(found: Inspection, path: Path, *, samples: int = 24, options: Mapping[str, str] | None = None) -> Path:
    """Write the page of an inspection.

    Args:
        found: what `inspect` returned.
        path: the file to write; its folder is made.
        samples: how many of each split are shown, spread evenly over its order; the file grows with them.
        options: storage options.

    Raises:
        UserError: the page cannot be written.
    """
    manifest = load_manifest(found.url, options)
    cards = {
        name: list(_cards(found.url, manifest, split, samples, options)) for name, split in manifest.splits.items()
    }
    text = _render(
        {
            **_totals(found),
            "found": found,
            "cards": cards,
            "width": _width(manifest),
            "classes": {name: _balance(split.classes) for name, split in found.splits.items()},
        }
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; give --html a file in a folder you may write to"
        ) from error
    return path


def spread_places(total: int, count: int) -> list[int]:
    """At most `count` different places of 0..total-1 at even distances, the middle ones of their stretches."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _cards(url: str, manifest: Manifest, split: Split, count: int, options: Mapping[str, str] | None) -> Iterator[Card]:
    reader = Reader.of(url, manifest, split, options)
    for place in spread_places(split.samples, count):
        shard, group, row = reader.locate(np.array([place]))[0]
        found = reader.row_groups({(shard, group)})[shard, group]
        if found.error:
            yield Card(place, reader.row_key(shard, group, row), [], [], found.error)
        else:
            yield card(place, stored_row(found, row), manifest)


def card(place: int, row: Mapping[str, Any], manifest: Manifest) -> Card:
    """The card of one stored row."""
    labels: list[str] = []
    pieces: list[Piece] = []
    problems = []
    for name, feature in manifest.features.items():
        try:
            decoded = feature.decode(row[name], ViewConfig(), len(manifest.classes))
        except BadSample as error:
            problems.append(f"{name}: {error}")
            continue
        if feature.kind == "label":
            labels.append(manifest.classes[decoded])
        elif feature.kind == "labels":
            labels += [manifest.classes[number] for number in row[name]]
        elif feature.kind in VIEWS:
            pieces += VIEWS[feature.kind].show(row[name], decoded)
    return Card(place, str(row["key"]), labels, pieces, "; ".join(problems))


def _balance(classes: Mapping[str, int]) -> dict[str, Any] | None:
    """What the chart of a split's classes needs: bars of named classes, or the outline of many."""
    if not classes:
        return None
    most = max(max(classes.values()), 1)
    ordered = sorted(classes.items(), key=lambda item: -item[1])
    if len(ordered) <= BARS:
        return {"bars": [(name, count, 100 * count / most) for name, count in classes.items()], "outline": None}
    counts = np.array([count for _, count in ordered])
    return {"bars": None, "outline": _outline(counts, most), "most": ordered[:8], "least": ordered[:-9:-1]}


def _outline(counts: Any, most: int) -> str:
    """The points of an SVG polygon, 600 wide and 120 high, of counts that fall from left to right."""
    shown = counts[np.linspace(0, len(counts) - 1, min(len(counts), 300)).astype(int)]
    across = np.linspace(0, 600, len(shown))
    line = [f"{x:.1f},{120 - 118 * count / most:.1f}" for x, count in zip(across, shown, strict=True)]
    return " ".join(["0,120", *line, "600,120"])


def _totals(found: Inspection) -> dict[str, Any]:
    """What the head of the page says of all splits together."""
    splits = found.splits.values()
    return {
        "samples": sum(split.samples for split in splits),
        "bytes": sum(split.bytes for split in splits),
        "doubles": sum(split.doubles for split in splits),
        "unreadable": sum(split.unreadable for split in splits),
        "checked": any(split.sizes for split in splits),
    }


def _width(manifest: Manifest) -> int:
    """Least width of a card in pixels: small pictures side by side, text and time wider."""
    features = manifest.features.values()
    if any(feature.kind in WIDE for feature in features):
        return 320
    return 120 if any(max(getattr(feature, "size", None) or [SMALL]) < SMALL for feature in features) else 210


def _histogram(spread: Spread) -> list[float]:
    """Heights of the bars in percent; what is there is seen, however little it is."""
    most = max(spread.bins)
    return [max(2.0, 100 * count / most) if count else 0.0 for count in spread.bins]


def _size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _render(page: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=figure, histogram=_histogram, size=_size)
    return environment.get_template("inspect_page.html").render(page)
