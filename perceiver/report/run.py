"""The report of a run: one self-contained HTML page and its figures as PNG files.

A pure function of plain arrays: it knows no model, no data set and no tracker.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perceiver.report import figures as figures
from perceiver.report import numbers as numbers
from perceiver.tracking.redaction import redact, redact_text

TABLE_CLASSES = 25
ATTENDS_SHOWN, ATTENTION_EXAMPLES = 8, 6
OPTIONAL = (
    *("accuracy", "tested", "names", "matrix", "confusion_png", "pairs", "classes", "listed"),
    *("calibration", "calibration_error", "wrong", "right"),
)


@dataclass(frozen=True)
class ReportData:
    """What a report is made of. Everything but the name and the history may be left out; its section is then, too.

    Shapes: B test samples, K classes, E examples, A cross-attends, h heads, N latents, H x W positions.

    Attributes:
        name: of the run.
        history: one dict a recorded moment, with `step` and any of `train/loss`, `eval/loss`, `eval/accuracy` (and
            other `eval/...`), `train/lr`, `train/grad_norm`, `train/samples_per_s`, `train/data_wait`.
        task: "classification" gives confusion matrix, class table, example grid; "multilabel" gives a class table; any
            other gives the curves only.
        class_names: K names.
        sample_ids: (B,) int, names the test samples.
        labels: (B,) int class, or (B, K) 0/1 for "multilabel".
        predictions: (B,) int class; not used for "multilabel".
        probabilities: (B, K) float.
        images: by sample id, uint8 (H, W, C); those of `report_numbers.choose_examples` and of `attention_ids` are
            shown.
        attention_ids: E sample ids.
        attention: (E, A, h, N, H, W) float, weights of each latent over the positions of the input.
        recipe: the resolved recipe; secrets are redacted here.
        facts: label -> value, shown as tiles in this order, such as samples/s, steps, wall time, parameters, machine.
        commands: caption -> command line, such as `mlflow ui ...` and the next step.
        checkpoints: one dict a checkpoint, such as step, path, size.
        headline: label and value of the one figure that matters; the test accuracy for a classification if None.
    """

    name: str
    history: Sequence[Mapping[str, Any]]
    task: str = "classification"
    class_names: Sequence[str] = ()
    sample_ids: NDArray[np.integer] | None = None
    labels: NDArray[Any] | None = None
    predictions: NDArray[Any] | None = None
    probabilities: NDArray[np.floating] | None = None
    images: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)
    attention_ids: Sequence[int] = ()
    attention: NDArray[np.floating] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    checkpoints: Sequence[Mapping[str, Any]] = ()
    headline: tuple[str, str] | None = None


def write_report(data: ReportData, folder: Path) -> Path:
    """Write `index.html`, `figures/*.png` and, with classes, `per_class.csv` into the folder; return the page."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    page: dict[str, Any] = {"data": data, "curves": _curves(data, folder), "headline": data.headline}
    if data.task == "classification" and data.labels is not None and data.predictions is not None and len(data.labels):
        page.update(_classification(data, folder))
        page["headline"] = data.headline or ("test accuracy", f"{100 * page['accuracy']:.1f} %")
    if data.task == "multilabel" and data.labels is not None and data.probabilities is not None and len(data.labels):
        page["classes"] = numbers.multilabel_table(data.labels, data.probabilities, data.class_names)
    if "classes" in page:
        _write_csv(page["classes"], folder / "per_class.csv")
        page["listed"] = page["classes"] if len(page["classes"]) <= TABLE_CLASSES else numbers.worst(page["classes"])
    page["attention"] = _attention(data, folder)
    page["recipe"] = _yaml(data.recipe)
    page["facts"] = {key: text(value) for key, value in data.facts.items()}
    page["commands"] = {key: redact_text(command) for key, command in data.commands.items()}
    page["checkpoints"] = _table(data.checkpoints)
    path = folder / "index.html"
    path.write_text(_render(page), encoding="utf-8")
    return path


def text(value: Any) -> str:
    """A value as a reader wants it: thousands separated, four significant digits, nothing for None."""
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        return f"{float(value):,.0f}" if abs(value) >= 1e4 else f"{float(value):.4g}"
    return redact_text(str(value))


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    return "–" if value is None else f"{100 * value:.1f} %"


def _curves(data: ReportData, folder: Path) -> list[figures.Drawing]:
    drawings = [figures.draw_curve(curve, data.history) for curve in figures.curves(data.history)]
    return [_save(drawing, folder) for drawing in drawings if drawing is not None]


def _save(drawing: figures.Drawing, folder: Path) -> figures.Drawing:
    (folder / "figures" / f"{drawing.slug}.png").write_bytes(drawing.png)
    return drawing


def _classification(data: ReportData, folder: Path) -> dict[str, Any]:
    """Confusion matrix, class table, calibration and examples of a classification."""
    labels, predictions = np.asarray(data.labels), np.asarray(data.predictions)
    columns = data.probabilities.shape[1] if data.probabilities is not None else 0
    classes = max(int(labels.max()) + 1, int(predictions.max()) + 1, len(data.class_names), columns)
    names = numbers.class_names(data.class_names, classes)
    matrix = numbers.confusion(labels, predictions, classes)
    confidence = _confidence(data, predictions)
    png = figures.draw_confusion(matrix, names)
    (folder / "figures" / "confusion.png").write_bytes(png)
    page: dict[str, Any] = {
        "accuracy": float(np.mean(labels == predictions)),
        "tested": len(labels),
        "names": names,
        "matrix": _cells(matrix) if classes <= TABLE_CLASSES else None,
        "confusion_png": figures.data_uri(png) if classes > TABLE_CLASSES else None,
        "pairs": numbers.confused_pairs(matrix, names),
        "classes": numbers.class_table(matrix, names),
    }
    if confidence is not None:
        drawing, page["calibration_error"] = figures.draw_calibration(confidence, labels == predictions)
        page["calibration"] = _save(drawing, folder)
    page["wrong"], page["right"] = _examples(data, labels, predictions, confidence, names, folder)
    return page


def _confidence(data: ReportData, predictions: NDArray[Any]) -> NDArray[np.floating] | None:
    """(B,) probability of the predicted class."""
    if data.probabilities is None:
        return None
    return np.nan_to_num(data.probabilities[np.arange(len(predictions)), predictions].astype(np.float64))


def _cells(matrix: NDArray[np.int64]) -> list[list[dict[str, Any]]]:
    """The confusion matrix with the strength of each cell's colour (0 to 100), mistakes against the worst mistake."""
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    rows = matrix.sum(axis=1)
    return [
        [
            {
                "count": int(count),
                "right": row == column,
                "strength": round(_strength(int(count), int(rows[row] if row == column else off.max()))),
            }
            for column, count in enumerate(line)
        ]
        for row, line in enumerate(matrix)
    ]


def _strength(count: int, whole: int) -> float:
    return 0.0 if count == 0 else 12 + 58 * (count / whole) ** 0.5


def _examples(
    data: ReportData,
    labels: NDArray[Any],
    predictions: NDArray[Any],
    confidence: NDArray[np.floating] | None,
    names: Sequence[str],
    folder: Path,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The cards of wrong and right predictions whose image was given."""
    if data.sample_ids is None or not data.images:
        return [], []
    sure = confidence if confidence is not None else np.zeros(len(labels))
    groups = []
    for slug, indices in zip(("wrong", "right"), numbers.choose_examples(labels, predictions, sure), strict=True):
        shown = [int(index) for index in indices if int(data.sample_ids[index]) in data.images]
        pictures = [figures.shrink(data.images[int(data.sample_ids[index])], 2 * figures.MAP_PIXELS) for index in shown]
        if pictures:
            rows = [pictures[start : start + 8] for start in range(0, len(pictures), 8)]
            (folder / "figures" / f"{slug}.png").write_bytes(figures.image_png(figures.montage(rows)))
        groups.append(
            [
                {
                    "id": int(data.sample_ids[index]),
                    "label": names[int(labels[index])],
                    "prediction": names[int(predictions[index])],
                    "confidence": None if confidence is None else float(confidence[index]),
                    "image": figures.data_uri(figures.image_png(picture)),
                }
                for index, picture in zip(shown, pictures, strict=True)
            ]
        )
    return groups[0], groups[1]


def _attention(data: ReportData, folder: Path) -> list[dict[str, Any]]:
    """For each example: its image, and per cross-attend the mean map and those of some latents, mean over heads."""
    if data.attention is None or not len(data.attention_ids):
        return []
    latents = numbers.choose_latents(data.attention)
    attends = np.unique(np.linspace(0, data.attention.shape[1] - 1, ATTENDS_SHOWN).round().astype(int))
    sections = []
    for example, sample in list(enumerate(data.attention_ids))[:ATTENTION_EXAMPLES]:
        maps = data.attention[example].mean(axis=1, dtype=np.float64)
        picture = figures.shrink(data.images[sample], 2 * figures.MAP_PIXELS) if sample in data.images else None
        rows, pixels = [], []
        for attend in attends:
            weights = [maps[attend].mean(axis=0), *(maps[attend, latent] for latent in latents)]
            cells = [figures.map_pixels(weight, picture) for weight in weights]
            pixels.append(([picture] if picture is not None else []) + cells)
            peaks = [float(np.nanmax(weight)) * weight.size for weight in weights]
            uris = [figures.data_uri(figures.image_png(cell)) for cell in cells]
            rows.append({"attend": int(attend) + 1, "cells": list(zip(uris, peaks, strict=True))})
        (folder / "figures" / f"attention-{sample}.png").write_bytes(figures.image_png(figures.montage(pixels)))
        image = figures.data_uri(figures.image_png(picture)) if picture is not None else None
        sections.append({"id": sample, "image": image, "rows": rows, "latents": latents})
    return sections


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Dicts as columns and texts; a column that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "rows": [[text(row.get(key)) for key in columns] for row in rows]} if rows else None


def _yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(redact(recipe), sort_keys=False, allow_unicode=True) if recipe else ""


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _render(page: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(text=text, percent=percent)
    return environment.get_template("run.html").render({**dict.fromkeys(OPTIONAL), **page})
