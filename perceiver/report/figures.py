"""Drawings of the report: curves as vector graphics that follow the page's colours, maps as small exact PNGs.

Matplotlib is imported inside functions: whoever only needs the data classes does not pay for it.
"""

import base64
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT, RULE, FIRST, SECOND = "#30363d", "#d5d9de", "#2563c9", "#d9610f"
CSS_COLOURS = {TEXT: "var(--soft)", RULE: "var(--rule)", FIRST: "var(--first)", SECOND: "var(--second)"}
SMOOTH_FROM = 60
MAP_PIXELS = 112

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Curve:
    """One chart: a title, the history keys drawn in it with their labels, and how the values are shown."""

    slug: str
    title: str
    series: tuple[tuple[str, str], ...]
    percent: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Drawing:
    """A finished figure: SVG for the page, PNG for `figures/`, and one line of text for who cannot see it."""

    slug: str
    title: str
    svg: str
    png: bytes
    text: str


def curves(rows: Rows) -> list[Curve]:
    """The charts that a history has values for, in reading order."""
    keys = {key for row in rows for key in row}
    wanted = [Curve("loss", "Loss", (("train/loss", "training"), ("eval/loss", "evaluation")))]
    names = sorted({key.partition("/")[2] for key in keys if key.startswith("eval/")} - {"loss"})
    for name in names:
        percent = name.endswith("accuracy")
        pair = ((f"train/{name}", "training"), (f"eval/{name}", "evaluation"))
        wanted.append(Curve(name.replace("/", "-"), name.replace("_", " ").capitalize(), pair, percent=percent))
    wanted += [
        Curve("learning-rate", "Learning rate", (("train/lr", ""),), from_zero=True),
        Curve("gradient-norm", "Gradient norm before clipping", (("train/grad_norm", ""),), from_zero=True),
        Curve("throughput", "Samples per second", (("train/samples_per_s", ""),), from_zero=True),
        Curve("data-wait", "Time spent waiting for data", (("train/data_wait", ""),), percent=True, from_zero=True),
    ]
    return [curve for curve in wanted if any(key in keys for key, _ in curve.series)]


def draw_curve(curve: Curve, rows: Rows) -> Drawing | None:
    """Draw one chart over the optimizer steps; None if it has no finite value."""
    points = {key: series(rows, key) for key, _ in curve.series}
    if not any(np.isfinite(values).any() for _, values in points.values()):
        return None
    figure, axes = chart(curve.percent)
    colours = [FIRST, SECOND] if len(curve.series) > 1 else [FIRST]
    for (key, label), colour in zip(curve.series, colours, strict=True):
        steps, values = points[key]
        if len(steps):
            _line(axes, steps, values, label, colour, dotted=key.startswith("eval/"))
    if curve.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step", loc="right")
    if sum(len(steps) > 0 for steps, _ in points.values()) > 1:
        axes.legend(frameon=False, loc="best", labelcolor=TEXT, handlelength=1.4)
    lost = sum(int((~np.isfinite(values)).sum()) for _, values in points.values())
    text = f"{lost} of the recorded values are not finite and are left out." if lost else ""
    return Drawing(curve.slug, curve.title, *render(figure, curve.slug), text)


def series(rows: Rows, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of one history key; values that are no finite number become NaN."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None and "step" in row]
    steps = np.array([step for step, _ in pairs], dtype=np.float64)
    values = np.array([_number(value) for _, value in pairs], dtype=np.float64)
    return steps, values


def _number(value: object) -> float:
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def draw_calibration(confidence: NDArray[np.floating], right: NDArray[np.bool_]) -> tuple[Drawing, float]:
    """Accuracy over confidence in ten bins, and the expected calibration error.

    Args:
        confidence: (B,) probability of the predicted class.
        right: (B,) whether the prediction is right.
    """
    bins = np.clip((confidence * 10).astype(int), 0, 9)
    counts = np.bincount(bins, minlength=10)
    used = counts > 0
    accuracy = np.bincount(bins, weights=right, minlength=10)[used] / counts[used]
    mean = np.bincount(bins, weights=confidence, minlength=10)[used] / counts[used]
    error = float(np.sum(counts[used] * np.abs(accuracy - mean)) / counts.sum())
    figure, axes = chart(percent=True)
    axes.plot([0, 1], [0, 1], color=RULE, linewidth=1.2, dashes=(4, 3))
    area = 12 + 180 * np.sqrt(counts[used] / counts.sum())
    axes.scatter(mean, accuracy, s=area, color=FIRST, linewidth=0, zorder=3)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.06)
    axes.xaxis.set_major_formatter(percent_axis())
    axes.set_xlabel("confidence", loc="right")
    return Drawing("calibration", "Accuracy over confidence", *render(figure, "calibration"), ""), error


def draw_confusion(matrix: NDArray[np.int64], names: Sequence[str]) -> bytes:
    """The confusion matrix as a PNG: rows are labels, each scaled to its own sum; one pixel block a class."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = len(matrix)
    side = 6.4
    figure = Figure(figsize=(side, side * 0.94), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(np.sqrt(share), cmap=colormaps["Blues"], vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    if classes <= 30:
        size = 9 if classes <= 12 else 6
        short = [name if len(name) <= 14 else name[:13] + "…" for name in names]
        rotation = 0 if max(map(len, short)) <= 3 else 90
        axes.set_xticks(range(classes), short, rotation=rotation, fontsize=size, parse_math=False)
        axes.set_yticks(range(classes), short, fontsize=size, parse_math=False)
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if share[row, column] > 0.35 else TEXT
            text = str(matrix[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    return _png(figure)


def chart(percent: bool, size: tuple[float, float] = (5.2, 2.7)) -> tuple["Figure", "Axes"]:
    """An empty chart in the report's manner: a light grid, no box. `size` is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    figure.subplots_adjust(left=0.57 / size[0], right=1 - 0.16 / size[0], top=0.96, bottom=0.46 / size[1])
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, length=0, labelsize=9)
    axes.xaxis.label.set_color(TEXT)
    axes.xaxis.label.set_fontsize(9)
    axes.margins(x=0.01)
    if percent:
        axes.yaxis.set_major_formatter(percent_axis())
    return figure, axes


def percent_axis() -> Any:
    """Return a formatter that writes shares as percentages."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{100 * value:.4g} %")


def _line(
    axes: "Axes",
    steps: NDArray[np.float64],
    values: NDArray[np.float64],
    label: str,
    colour: str,
    *,
    dotted: bool,
) -> None:
    """A series: points joined by a line when few, a thin line under its running median-like mean when many."""
    if dotted or len(steps) < SMOOTH_FROM:
        style = {"marker": "o", "markersize": 3.2} if len(steps) <= 40 else {}
        axes.plot(steps, values, color=colour, linewidth=1.6, label=label, **style)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
    axes.plot(steps, smooth(values), color=colour, linewidth=1.7, label=label)


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred running mean over about 1/30 of the points; NaNs are left out of the means."""
    width = max(3, len(values) // 30) | 1
    kernel = np.ones(width)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def render(figure: "Figure", salt: str) -> tuple[str, bytes]:
    """The figure as SVG with the page's CSS colours and font, and as PNG on white.

    `salt` keeps the names of clip paths and markers apart between the figures of a page, and the same in every report.
    """
    import matplotlib as mpl

    png = _png(figure)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg, png


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=144, facecolor="white")
    return buffer.getvalue()


def image_png(pixels: NDArray[np.uint8]) -> bytes:
    """An image (H, W, C) or (H, W) as PNG; one, three or four channels, the first of any other number."""
    from PIL import Image

    if pixels.ndim == 3 and pixels.shape[2] not in (3, 4):
        pixels = pixels[:, :, 0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def shrink(array: NDArray[Any], limit: int = MAP_PIXELS) -> NDArray[Any]:
    """Average blocks of the first two axes until both are at most `limit` long."""
    factor = math.ceil(max(array.shape[:2]) / limit)
    if factor <= 1:
        return array
    height, width = (size // factor * factor for size in array.shape[:2])
    blocks = array[:height, :width].reshape(height // factor, factor, width // factor, factor, *array.shape[2:])
    return blocks.mean(axis=(1, 3)).astype(array.dtype)


def map_pixels(weights: NDArray[np.floating], picture: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """An attention map as colours, from 0 to its own largest weight; the colour follows the square root.

    Args:
        weights: (H, W), of one latent or a mean.
        picture: what was attended to, (h, w, C), shown dark beneath the weights; None: black.

    Returns:
        (H, W, 3), or the picture's size if that is larger; at most `MAP_PIXELS` a side.
    """
    from matplotlib import colormaps

    weights = shrink(np.nan_to_num(weights.astype(np.float64)))
    scaled = np.sqrt(np.clip(weights / max(float(weights.max(initial=0.0)), 1e-12), 0, 1))
    if picture is None:
        return (colormaps["inferno"](scaled)[:, :, :3] * 255).astype(np.uint8)
    under = shrink(picture)
    size = (max(under.shape[0], weights.shape[0]), max(under.shape[1], weights.shape[1]))
    grey = resize(under, size).astype(np.float64).reshape(*size, -1)[:, :, :3].mean(axis=2, keepdims=True) * 0.42
    scaled = resize(scaled, size)
    colour = colormaps["inferno"](0.35 + 0.65 * scaled)[:, :, :3] * 255
    share = scaled[:, :, None]
    return (share * colour + (1 - share) * grey).astype(np.uint8)


def data_uri(png: bytes) -> str:
    """A PNG as a `data:` URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def montage(rows: Sequence[Sequence[NDArray[np.uint8]]], cell: int = 112, gap: int = 6) -> NDArray[np.uint8]:
    """Pictures in rows on white, each enlarged without interpolation to about `cell` pixels."""
    height = len(rows) * (cell + gap) + gap
    width = max(len(row) for row in rows) * (cell + gap) + gap
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            colour = picture if picture.ndim == 3 and picture.shape[2] >= 3 else np.repeat(_grey(picture), 3, axis=2)
            big = resize(colour[:, :, :3], (cell, cell))
            top, left = gap + y * (cell + gap), gap + x * (cell + gap)
            canvas[top : top + cell, left : left + cell] = big
    return canvas


def _grey(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return picture[:, :, :1] if picture.ndim == 3 else picture[:, :, None]


def resize(array: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """The nearest value for each of (height, width) positions, over the first two axes."""
    ys = np.arange(size[0]) * array.shape[0] // size[0]
    xs = np.arange(size[1]) * array.shape[1] // size[1]
    return array[ys][:, xs]
