"""The figures of all pages: charts as SVG in the page's colours, pictures and attention maps as data URIs.

Matplotlib is imported in functions, because its import is slow.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from perceiver.report.page import data_uri, is_share
from perceiver.tracking.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT, RULE, FIRST, SECOND = "#30363d", "#d5d9de", "#2563c9", "#d9610f"
CSS_COLOURS = {TEXT: "var(--soft)", RULE: "var(--rule)", FIRST: "var(--first)", SECOND: "var(--second)"}
_TICK = {"color": TEXT, "labelsize": 9, "major.size": 0}
_STYLE: dict[str, dict[str, Any]] = {
    "axes": {"edgecolor": RULE, "labelcolor": TEXT, "labelsize": 9, "grid": True, "axisbelow": True, "xmargin": 0.01},
    "axes.spines": {"top": False, "right": False, "left": False},
    "xtick": _TICK,
    "ytick": _TICK,
    "xaxis": {"labellocation": "right"},
    "grid": {"color": RULE, "linewidth": 0.7},
    "legend": {"frameon": False, "labelcolor": TEXT, "handlelength": 1.4},
    "text": {"color": TEXT, "parse_math": False},
    "svg": {"fonttype": "none"},
}
STYLE: dict[Any, Any] = {f"{group}.{key}": value for group, keys in _STYLE.items() for key, value in keys.items()}
"""Settings of matplotlib for all charts: a light grid, no box."""
HALF, FULL = (5.2, 2.7), (10.8, 3.6)
"""Sizes of a chart in inches: two of them in a row, or one."""
DOTS: dict[str, Any] = {"marker": "o", "linestyle": ""}
MOST_DOTS = 2000
"""Samples that a chart of single samples shows."""
SMOOTH_FROM = 60
"""Number of points from which a training curve is drawn with its running mean."""
SINGLE_CURVES = (
    ("learning-rate", "Learning rate", ("train/lr",)),
    ("gradient-norm", "Gradient norm before clipping", ("train/grad_norm",)),
    ("throughput", "Samples per second", ("train/samples_per_s",)),
    ("data-wait", "Time spent waiting for data", ("train/data_wait",)),
)
SHARE_TICKS = (0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
NEAR_ONE = 0.9999
TICKS = 5
PICTURE, SMALL, MAP = 256, 120, 112
"""Pixels per side: largest picture on a page; size below which a picture stays exact; largest attention map."""

Rows = Sequence[Mapping[str, Any]]
Line = tuple[ArrayLike, ArrayLike, Mapping[str, Any]]
"""x values, y values, and how `matplotlib.axes.Axes.plot` draws them."""


@dataclass(frozen=True)
class Drawing:
    """A finished chart: SVG for the page, PNG for a file, and a line of text below it."""

    slug: str
    title: str
    svg: str
    png: bytes
    note: str


def plot(
    slug: str,
    title: str,
    lines: Iterable[Line],
    note: str = "",
    *,
    size: tuple[float, float] = HALF,
    percent: str = "",
    grid: str = "y",
    texts: Iterable[tuple[float, float, str]] = (),
    **axis: Any,
) -> Drawing:
    """Draw lines in the style of the pages: a light grid, no box.

    Args:
        slug: name of the chart's file, unique on a page.
        title: text above the chart.
        lines: drawn in this order; those with a `label` get a legend.
        note: text below the chart.
        size: width and height in inches.
        percent: the axes that are labelled in per cent: "", "x", "y" or "xy".
        grid: the axes whose ticks have grid lines: "x", "y" or "both".
        texts: x, y and text of annotations.
        axis: properties of `matplotlib.axes.Axes`, such as xlabel or ylim.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with mpl.rc_context({**STYLE, "axes.grid.axis": grid, "svg.hashsalt": slug}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for x, y, style in lines:
            axes.plot(x, y, **style)
        axes.set(**axis)
        for x, y, label in texts:
            axes.text(x, y, label, fontsize=8, va="center", zorder=6)
        for name in percent:
            formatter = FuncFormatter(lambda value, _: f"{100 * value:.4g} %")
            (axes.xaxis if name == "x" else axes.yaxis).set_major_formatter(formatter)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
        return Drawing(slug, title, _svg(figure), _png(figure), note)


def _svg(figure: "Figure") -> str:
    """Return a figure as SVG with the page's CSS colours; the output is reproducible."""
    saved = _saved(figure, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = printable(saved.decode(), lines=True)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg


def _png(figure: "Figure") -> bytes:
    return _saved(figure, format="png", dpi=144, facecolor="white")


def _saved(figure: "Figure", **options: Any) -> bytes:
    sink = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(sink, **options)
    return sink.getvalue()


def named_rows(names: Sequence[str]) -> dict[str, Any]:
    """Return the axis properties for `plot` that label y = 0, 1, ... with names, from the top."""
    return {"yticks": range(len(names)), "yticklabels": names, "ylim": (len(names) - 0.5, -0.5)}


def metric_axis(metric: str, values: Iterable[float]) -> dict[str, Any]:
    """Return the axis properties for `plot` whose y values are a metric's.

    Shares near 1 are spread out: equal steps halve or double the error.
    """
    from matplotlib.scale import FuncScale

    found = [value for value in values if math.isfinite(value)]
    if not is_share(metric) or not found:
        return {}
    low, high = max(0.0, min(found)), min(NEAR_ONE, max(found))
    top = 1 - (1 - high) * 0.9
    scale = FuncScale(None, (_spread, _unspread))  # pyright: ignore[reportArgumentType]
    ticks = [tick for tick in SHARE_TICKS if low * 0.98 <= tick <= top]
    return {"yscale": scale, "ylim": (max(0.0, 1 - (1 - low) * 1.1), top), "yticks": ticks, "percent": "y"}


def _spread(share: Any) -> Any:
    return -np.log10(1 - np.clip(share, 0, NEAR_ONE))


def _unspread(place: Any) -> Any:
    return 1 - 10.0 ** -np.asarray(place)


def learning_curves(rows: Rows) -> list[Drawing]:
    """Draw the metrics of a history that have finite values, over optimizer steps.

    Args:
        rows: one mapping per recorded step, with `step` and metrics such as `train/loss` and `eval/loss`.
    """
    keys = {key for row in rows for key in row}
    names = ["loss", *sorted({key.removeprefix("eval/") for key in keys if key.startswith("eval/")} - {"loss"})]
    curves = [
        (name.replace("/", "-"), name.replace("_", " ").capitalize(), (f"train/{name}", f"eval/{name}"))
        for name in names
    ]
    drawings = (_learning_curve(rows, slug, title, keys) for slug, title, keys in [*curves, *SINGLE_CURVES])
    return [drawing for drawing in drawings if drawing]


def _learning_curve(rows: Rows, slug: str, title: str, keys: tuple[str, ...]) -> Drawing | None:
    """Draw one or two history keys; None if none of them has a finite value."""
    lines: list[Line] = []
    lost = drawn = 0
    for key, label, colour in zip(keys, ("training", "evaluation"), (FIRST, SECOND)):
        steps, values = series(rows, key)
        drawn, lost = drawn + len(steps), lost + int((~np.isfinite(values)).sum())
        if key.startswith("train/") and len(steps) >= SMOOTH_FROM:
            lines.append((steps, values, {"color": colour, "linewidth": 0.7, "alpha": 0.35}))
            values = smooth(values)
        style = {"color": colour, "linewidth": 1.6, "label": label if len(keys) > 1 else None}
        if len(steps) <= 40:
            style |= {"marker": "o", "markersize": 3.2}
        if len(steps):
            lines.append((steps, values, style))
    if lost == drawn:
        return None
    axis: dict[str, Any] = {} if len(keys) > 1 else {"ylim": (0, None)}
    axis["percent"] = "y" if "accuracy" in slug or slug == "data-wait" else ""
    note = f"{lost} of the recorded values are not finite and are left out." if lost else ""
    return plot(slug, title, lines, note, xlabel="optimizer step", **axis)


def series(rows: Rows, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return steps and values of one history key; values that are not finite numbers become NaN."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None and "step" in row]
    steps, values = (np.array([pair[index] for pair in pairs], dtype=np.float64) for index in (0, 1))
    return steps, np.where(np.isfinite(values), values, np.nan)


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a centred running mean over about 1/30 of the points; NaNs are left out of the means."""
    kernel = np.ones(max(3, len(values) // 30) | 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def draw_calibration(confidence: NDArray[np.floating], right: NDArray[np.bool_]) -> tuple[Drawing, float]:
    """Draw accuracy over confidence in ten bins; return it with the expected calibration error.

    Args:
        confidence: (B,) probability of the predicted class.
        right: (B,) whether the prediction is right.
    """
    bins = np.clip((confidence * 10).astype(int), 0, 9)
    counts = np.bincount(bins, minlength=10)
    used = counts > 0
    accuracy = np.bincount(bins, weights=right, minlength=10)[used] / counts[used]
    mean = np.bincount(bins, weights=confidence, minlength=10)[used] / counts[used]
    shares = counts[used] / counts.sum()
    lines: list[Line] = [([0, 1], [0, 1], {"color": RULE, "linewidth": 1.2, "dashes": (4, 3)})]
    for x, y, share in zip(mean, accuracy, shares, strict=True):
        lines.append((x, y, {**DOTS, "color": FIRST, "markersize": math.sqrt(12 + 180 * math.sqrt(share))}))
    axis: dict[str, Any] = {"xlabel": "confidence", "xlim": (0, 1.02), "ylim": (0, 1.06), "percent": "xy"}
    drawing = plot("calibration", "Accuracy over confidence", lines, **axis)
    return drawing, float(np.sum(shares * np.abs(accuracy - mean)))


def draw_errors(name: str, true: NDArray[np.floating], predicted: NDArray[np.floating]) -> Drawing:
    """Draw predicted over true values of one number, (B,) each; on the dashed line they are the same."""
    keep = np.isfinite(true) & np.isfinite(predicted)
    true, predicted = true[keep], predicted[keep]
    low, high = (float(f(np.concatenate([true, predicted]))) for f in (np.min, np.max)) if len(true) else (0.0, 1.0)
    chosen = np.linspace(0, len(true) - 1, min(len(true), MOST_DOTS)).astype(int)
    lines: list[Line] = [
        ([low, high], [low, high], {"color": RULE, "linewidth": 1.2, "dashes": (4, 3)}),
        (true[chosen], predicted[chosen], {**DOTS, "color": FIRST, "markersize": 3.2, "alpha": 0.5}),
    ]
    error = predicted - true
    note = f"{len(true):,} samples, mean absolute error {np.abs(error).mean():.4g}" if len(true) else "no sample"
    note += f"; {len(chosen):,} of them are drawn" * (len(chosen) < len(true))
    return plot(f"predicted-{name}", name, lines, f"{note}.", xlabel=f"true {name}", ylabel="predicted", grid="both")


def draw_confusion(matrix: NDArray[np.int64], names: Sequence[str]) -> bytes:
    """Return a confusion matrix as PNG: rows are labels, each scaled to its own sum, columns are predictions."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    with mpl.rc_context({"text.parse_math": False, "font.size": 9 if len(matrix) <= 12 else 6}):
        figure = Figure(figsize=(6.4, 6), layout="constrained")
        axes = figure.add_subplot(xlabel="prediction", ylabel="label")
        axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        if len(matrix) <= 30:
            short = [cut(name, 14) for name in names]
            axes.set_xticks(range(len(matrix)), short, rotation=0 if max(map(len, short)) <= 3 else 90)
            axes.set_yticks(range(len(matrix)), short)
            for row, column in zip(*np.nonzero(matrix), strict=True):
                colour = "white" if share[row, column] > 0.35 else TEXT
                axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour)
        return _png(figure)


def cut(name: str, length: int) -> str:
    """Return a name in at most `length` characters."""
    return name if len(name) <= length else name[: length - 1] + "…"


@dataclass(frozen=True)
class Column:
    """One axis of parallel coordinates.

    Attributes:
        name: label below the axis.
        places: position of each line on the axis, from 0 to 1; NaN if the line has no value.
        ticks: positions and their labels.
    """

    name: str
    places: Sequence[float]
    ticks: Sequence[tuple[float, str]]


def number_column(name: str, values: Sequence[float | None], low: float, high: float, *, log: bool = False) -> Column:
    """Return the axis of numbers from `low` to `high`: linear, logarithmic, or spread out near 1 for shares."""
    if not high > low:
        low, high = (low * 0.9 if low > 0 else low - 1), (high * 1.1 if high > 0 else high + 1)
    warp, unwarp = (_spread, _unspread) if is_share(name) else (np.log, np.exp) if log else (float, float)
    bottom, span = float(warp(low)), float(warp(high) - warp(low))
    marks = [(mark, float(unwarp(bottom + mark * span))) for mark in np.linspace(0, 1, TICKS)]
    ticks = [(mark, f"{100 * value:.1f} %" if is_share(name) else f"{value:.3g}") for mark, value in marks]
    return Column(name, [math.nan if value is None else (warp(value) - bottom) / span for value in values], ticks)


def label_column(name: str, values: Sequence[str | None], labels: Sequence[str]) -> Column:
    """Return the axis of categories, evenly spaced."""
    places = {label: (index + 0.5) / len(labels) for index, label in enumerate(labels)}
    ticks = [(place, cut(label, 18)) for label, place in places.items()]
    return Column(name, [math.nan if value is None else places[value] for value in values], ticks)


def draw_parallel(columns: Sequence[Column], best: int | None) -> Drawing:
    """Draw each line through its places on all columns.

    Args:
        columns: axes with one position per line; the worst line first.
        best: index of the highlighted line.
    """
    lines: list[Line] = [([x, x], [0, 1], {"color": RULE, "linewidth": 1.2, "zorder": 1}) for x in range(len(columns))]
    count = len(columns[0].places)
    for index in range(count):
        share = (index + 1) / count
        style: dict[str, Any] = {"color": FIRST, "linewidth": 0.8 + share, "alpha": 0.12 + 0.6 * share**2}
        if index == best:
            style = {"color": SECOND, "linewidth": 2.4, "zorder": 5}
        heights = [column.places[index] for column in columns]
        lines.append((range(len(columns)), heights, {**style, "marker": "o", "markersize": 3}))
    return plot(
        "coordinates",
        "Parallel coordinates",
        lines,
        "Stronger lines are better trials; the best trial has the second colour.",
        size=FULL,
        texts=[(x + 0.02, place, label) for x, column in enumerate(columns) for place, label in column.ticks],
        xticks=range(len(columns)),
        xticklabels=[column.name for column in columns],
        yticks=[],
        frame_on=False,
        xlim=(-0.15, len(columns) - 0.65),
        ylim=(-0.04, 1.04),
    )


def picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return pixels (H, W, C) or (H, W) as an image; of other than 3 or 4 channels the first one, in grey."""
    rgb = pixels.ndim == 2 or pixels.shape[2] in (3, 4)
    return Image.fromarray(np.ascontiguousarray(pixels if rgb else pixels[:, :, 0]))


def image_uri(image: Image.Image, longest: int = PICTURE) -> str:
    """Return an image as a data URI: exact as PNG if it is small, else at most `longest` pixels a side as JPEG."""
    sink = io.BytesIO()
    exact = min(image.size) < SMALL or image.mode not in ("L", "RGB")
    image = image.copy()
    image.thumbnail((longest, longest))
    image.save(sink, "PNG", optimize=True) if exact else image.save(sink, "JPEG", quality=85)
    return data_uri(sink.getvalue(), "image/png" if exact else "image/jpeg")


def montage(rows: Sequence[Sequence[Image.Image]], height: int, colour: Any = "white", gap: int = 6) -> Image.Image:
    """Return images in rows, each scaled to the same height; small ones are enlarged without smoothing."""
    filters = {True: Image.Resampling.NEAREST, False: Image.Resampling.BICUBIC}
    fitted = [
        [
            image.resize((max(1, round(image.width * height / image.height)), height), filters[image.height < height])
            for image in row
        ]
        for row in rows
    ]
    width = max(sum(image.width + gap for image in row) for row in fitted) - gap
    whole = Image.new("RGB", (width, len(fitted) * (height + gap) - gap), colour)
    for index, row in enumerate(fitted):
        left = 0
        for image in row:
            whole.paste(image, (left, index * (height + gap)))
            left += image.width + gap
    return whole


def png_bytes(image: Image.Image) -> bytes:
    """Return an image as PNG."""
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def attention_map(weights: NDArray[np.floating], image: Image.Image | None = None) -> Image.Image:
    """Return an attention map in colours from 0 to its own largest weight; the colour follows the square root.

    Args:
        weights: (H, W), of one latent or a mean; averaged over blocks to at most `MAP` pixels a side.
        image: the input image, shown dark beneath the weights; None: black.
    """
    from matplotlib import colormaps

    heat = _reduced(Image.fromarray(np.nan_to_num(weights).astype(np.float32)))
    below = _reduced(image.convert("L")) if image else Image.new("L", heat.size)
    size = (max(below.width, heat.width), max(below.height, heat.height))
    heat, below = (np.asarray(layer.resize(size, Image.Resampling.NEAREST), np.float64) for layer in (heat, below))
    share = np.sqrt(np.clip(heat / max(float(heat.max()), 1e-12), 0, 1))
    colour = colormaps["inferno"](0.35 + 0.65 * share if image else share)[:, :, :3] * 255
    share = share[:, :, None] if image else 1.0
    return Image.fromarray((share * colour + (1 - share) * 0.42 * below[:, :, None]).astype(np.uint8))


def score_map(scores: NDArray[np.floating]) -> Image.Image:
    """Return scores before the softmax (H, W) in colours from their smallest to their largest; black: no input."""
    from matplotlib import colormaps

    there = np.isfinite(scores)
    low, high = (scores[there].min(), scores[there].max()) if there.any() else (0.0, 0.0)
    share = np.where(there, (scores - low) / max(float(high - low), 1e-12), 0)
    seen, share = (np.asarray(_reduced(Image.fromarray(each.astype(np.float32)))) for each in (there, share))
    colour = colormaps["viridis"](share / np.maximum(seen, 1e-6))[:, :, :3] * (seen[:, :, None] > 0)
    return Image.fromarray((colour * 255).astype(np.uint8))


def _reduced(image: Image.Image) -> Image.Image:
    return image.reduce(math.ceil(max(image.size) / MAP))
