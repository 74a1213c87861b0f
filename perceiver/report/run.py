"""The report of a run: one HTML page, its figures as PNG and its per-class metrics as CSV.

A pure function of arrays: independent of models, data sets and trackers.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perceiver.report import figures
from perceiver.report.attention import CARD, AttentionMaps, attention_sections
from perceiver.report.boxes import Answered, answer_cards
from perceiver.report.page import Card, CardPart, data_uri, percent, render, text, yaml_text
from perceiver.tracking.printable import csv_cell

TABLE_CLASSES = 25
"""With more classes, the confusion matrix is a picture and only the worst classes are listed."""
LISTED_CLASSES, LISTED_PAIRS = 20, 8
WRONG_SHOWN, RIGHT_SHOWN = 24, 12


@dataclass(frozen=True)
class Classified:
    """Labels and predictions (B,) of a task that predicts one of the K named classes."""

    class_names: Sequence[str]
    labels: NDArray[Any]
    predictions: NDArray[Any]


@dataclass(frozen=True)
class ReportData:
    """The content of a report. Only name and history are required; a section without data is omitted.

    Shapes: B test samples, K classes.
    """

    name: str
    history: figures.Rows  # a mapping per recorded step: step, train/loss, eval/loss, train/lr, ...
    task: str = "classification"  # or "multilabel": a class table; any other: the curves only
    class_names: Sequence[str] = ()  # K
    sample_ids: NDArray[np.integer] | None = None  # (B,)
    labels: NDArray[Any] | None = None  # (B,) int class, or (B, K) 0/1 for "multilabel"
    predictions: NDArray[Any] | None = None  # (B,) int class; not used for "multilabel"
    probabilities: NDArray[np.floating] | None = None  # (B, K)
    numbers: Mapping[str, tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)  # name -> true, predicted
    several: Mapping[str, "Classified"] = field(default_factory=dict)  # of a multitask, by the tasks' names
    images: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)  # sample id -> (H, W, C), those to be shown
    parts: Mapping[int, Sequence[CardPart]] = field(default_factory=dict)  # of other samples: sound, texts, ...
    cards: Sequence[Card] = ()  # samples with what the model answers, such as masks, flow or filled-in words
    cards_note: str = ""  # what they show
    answered: Mapping[str, Answered] = field(default_factory=dict)  # of a general task, by the samples' keys
    keys: Mapping[int, str] = field(default_factory=dict)  # sample id -> where it came from, such as a file
    card_width: int | None = None  # of an example in pixels; None: a small picture's
    attention: AttentionMaps | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)  # as resolved; secrets are masked here
    facts: Mapping[str, Any] = field(default_factory=dict)  # caption -> value, in this order
    commands: Mapping[str, str] = field(default_factory=dict)  # caption -> command line
    checkpoints: Sequence[Mapping[str, Any]] = ()  # a mapping for each: step, path, ...
    profiles: Sequence[Mapping[str, Any]] = ()  # of the profiled ranks, see `perceiver.train.profiling`
    headline: tuple[str, str] | None = None  # a figure and what it is; None: a classification's test accuracy


def run_report(data: ReportData) -> dict[str, bytes]:
    """Return the files of a report by name: `index.html`, `figures/*.png` and, with classes, `per_class.csv`."""
    files: dict[str, bytes] = {}
    page: dict[str, Any] = {"headline": data.headline, "examples": None, "classes": None}
    curves = figures.learning_curves(data.history)
    if data.labels is not None and len(data.labels):
        if data.task == "classification" and data.predictions is not None:
            page |= _classification(data, data.labels, data.predictions, files)
        elif data.task == "multilabel" and data.probabilities is not None:
            page["classes"] = multilabel_table(data.labels, data.probabilities, data.class_names)
    if rows := page["classes"]:
        page["listed"] = rows if len(rows) <= TABLE_CLASSES else worst(rows)
        files["per_class.csv"] = _csv(rows)
    several = {}
    for number, (name, found) in enumerate(data.several.items(), 1):
        matrix = confusion(found.labels, found.predictions, len(found.class_names))
        several[name], files[f"figures/confusion-{number}.png"] = _confused(matrix, found.class_names)
    errors = [figures.draw_errors(name, true, predicted) for name, (true, predicted) in data.numbers.items()]
    drawings = [*curves, *errors, *([page["calibration"]] if page.get("calibration") else [])]
    files |= {f"figures/{drawing.slug}.png": drawing.png for drawing in drawings}
    columns = list(dict.fromkeys(key for row in data.checkpoints for key in row))
    page |= {
        "name": data.name,
        "facts": data.facts,
        "commands": data.commands,
        "curves": curves,
        "errors": errors,
        "several": several,
        "samples": data.cards,
        "samples_note": data.cards_note,
        "answered": answer_cards(data.answered),
        "attention": attention_sections(data.attention, data.images, data.parts, data.keys, files)
        if data.attention
        else [],
        "columns": columns,
        "checkpoints": [[text(row.get(key)) for key in columns] for row in data.checkpoints],
        "profiles": data.profiles,
        "recipe": yaml_text(data.recipe),
        "card_width": data.card_width,
        "points": any(part.kind == "points" for parts in data.parts.values() for part in parts),
    }
    files["index.html"] = render("run.html", kind="Training report", **page).encode()
    return files


def _classification(
    data: ReportData, labels: NDArray[Any], predictions: NDArray[Any], files: dict[str, bytes]
) -> dict[str, Any]:
    """Return the page's values for a classification; add its figures to `files`."""
    columns = data.probabilities.shape[1] if data.probabilities is not None else 0
    classes = max(int(labels.max()) + 1, int(predictions.max()) + 1, len(data.class_names), columns)
    names = class_names(data.class_names, classes)
    matrix = confusion(labels, predictions, classes)
    confused, files["figures/confusion.png"] = _confused(matrix, names)
    calibration, error, confidence = None, None, None
    if data.probabilities is not None:
        confidence = np.nan_to_num(data.probabilities[np.arange(len(labels)), predictions].astype(np.float64))
        calibration, error = figures.draw_calibration(confidence, labels == predictions)
    accuracy = percent(float(np.mean(labels == predictions)))
    return {
        "headline": data.headline or (accuracy, f"test accuracy, {len(labels):,} samples"),
        "confused": confused,
        "classes": class_table(matrix, names),
        "calibration": calibration,
        "calibration_error": error,
        "examples": _examples(data, labels, predictions, confidence, names, files),
    }


def _confused(matrix: NDArray[np.int64], names: Sequence[str]) -> tuple[dict[str, Any], bytes]:
    """Return the page's values for a confusion matrix, and its picture."""
    png = figures.draw_confusion(matrix, names)
    return {
        "tested": int(matrix.sum()),
        "right": ratio(np.trace(matrix), matrix.sum()),
        "names": names,
        "matrix": _cells(matrix) if len(matrix) <= TABLE_CLASSES else None,
        "picture": data_uri(png),
        "pairs": confused_pairs(matrix, names, LISTED_PAIRS),
    }, png


def _cells(matrix: NDArray[np.int64]) -> list[list[tuple[int, float]]]:
    """Return counts and the strength of their colours (0 to 100), for mistakes relative to the most frequent one."""
    off = matrix - np.diag(np.diag(matrix))
    whole = np.where(np.eye(len(matrix), dtype=bool), matrix.sum(axis=1, keepdims=True), off.max())
    strength = np.where(matrix, 12 + 58 * np.sqrt(matrix / np.maximum(whole, 1)), 0)
    return [list(zip(*rows, strict=True)) for rows in zip(matrix.tolist(), strength.round().tolist(), strict=True)]


def _examples(
    data: ReportData,
    labels: NDArray[Any],
    predictions: NDArray[Any],
    confidence: NDArray[np.floating] | None,
    names: Sequence[str],
    files: dict[str, bytes],
) -> dict[str, list[dict[str, Any]]]:
    """Return the wrong and the right predictions to show, if there are images or other parts of them."""
    groups: dict[str, list[dict[str, Any]]] = {"wrong": [], "right": []}
    ids = data.sample_ids
    if ids is None:
        return groups
    sure = confidence if confidence is not None else np.zeros(len(labels))
    for (kind, group), indices in zip(groups.items(), choose_examples(labels, predictions, sure), strict=True):
        images = {i: figures.picture(data.images[i]) for i in map(int, ids[indices]) if i in data.images}
        if images:
            rows = [list(images.values())[start : start + 8] for start in range(0, len(images), 8)]
            files[f"figures/{kind}.png"] = figures.png_bytes(figures.montage(rows, figures.MAP))
        pictures = {i: [CardPart("picture", figures.image_uri(image, CARD))] for i, image in images.items()}
        parts = {**data.parts, **pictures}
        for index in indices:
            number = int(ids[index])
            if number not in parts:
                continue
            group.append(
                {
                    "id": number,
                    "key": data.keys.get(number, ""),
                    "parts": parts[number],
                    "label": names[int(labels[index])],
                    "prediction": names[int(predictions[index])],
                    "confidence": None if confidence is None else float(confidence[index]),
                }
            )
    return groups


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink)
    for row in (rows[0], *(row.values() for row in rows)):
        writer.writerow(map(csv_cell, row))
    return sink.getvalue().encode()


def choose_examples(
    labels: NDArray[Any],
    predictions: NDArray[Any],
    confidence: NDArray[np.floating],
    wrong: int = WRONG_SHOWN,
    right: int = RIGHT_SHOWN,
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return indices of the samples to show: the most confident mistakes, and right ones spread over the classes.

    Args:
        labels: (B,) int.
        predictions: (B,) int.
        confidence: (B,) probability of the predicted class.
        wrong: greatest number of mistakes.
        right: greatest number of right ones: of each class in turn the least confident first.
    """
    mistakes = np.flatnonzero(labels != predictions)
    mistakes = mistakes[np.argsort(-confidence[mistakes], kind="stable")][:wrong]
    hits = np.flatnonzero(labels == predictions)
    hits = hits[np.argsort(confidence[hits], kind="stable")]
    rank = np.zeros(len(hits), dtype=np.intp)
    for label in np.unique(labels[hits]):
        own = np.flatnonzero(labels[hits] == label)
        rank[own] = np.arange(len(own))
    return mistakes, hits[np.lexsort((labels[hits], rank))][:right]


def confusion(labels: NDArray[Any], predictions: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """Return (K, K) counts: row = label, column = prediction."""
    flat = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def class_table(matrix: NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return precision, recall, F1 and count of each class; None where a figure has no denominator."""
    rows = []
    for name, hit, count, guessed in zip(names, np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0), strict=True):
        rates = {"precision": ratio(hit, guessed), "recall": ratio(hit, count), "F1": ratio(2 * hit, count + guessed)}
        rows.append({"name": str(name), **rates, "count": int(count)})
    return rows


def multilabel_table(
    labels: NDArray[Any], probabilities: NDArray[np.floating], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return precision and recall at probability 0.5, average precision and count of positives of each class."""
    rows = []
    for index, name in enumerate(class_names(names, labels.shape[1])):
        truth, score = labels[:, index] > 0.5, probabilities[:, index]
        hit, count, guessed = (truth & (score >= 0.5)).sum(), truth.sum(), (score >= 0.5).sum()
        rates = {"precision": ratio(hit, guessed), "recall": ratio(hit, count)}
        rows.append({"name": name, **rates, "average precision": average_precision(truth, score), "count": int(count)})
    return rows


def average_precision(truth: NDArray[np.bool_], score: NDArray[np.floating]) -> float | None:
    """Return the mean of the precision at each positive's score, equal scores together; None without positives."""
    if not truth.any():
        return None
    order = np.argsort(-score, kind="stable")
    ranked, falling = truth[order], score[order]
    ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    precision = np.cumsum(ranked)[ends] / (ends + 1)
    return float(precision[np.searchsorted(ends, np.flatnonzero(ranked))].mean())


def worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the classes with the lowest recall among those that occur, lowest first."""
    return sorted((row for row in rows if row["count"]), key=lambda row: row["recall"])[:LISTED_CLASSES]


def confused_pairs(matrix: NDArray[np.int64], names: Sequence[str], limit: int = 12) -> list[dict[str, Any]]:
    """Return the most frequent mistakes: label, prediction, how often, and as a share of the label's samples."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = [(int(row), int(column)) for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    return [
        {"label": names[i], "prediction": names[j], "count": int(wrong[i, j]), "share": wrong[i, j] / matrix[i].sum()}
        for i, j in pairs
        if wrong[i, j]
    ]


def class_names(names: Sequence[str], classes: int) -> list[str]:
    """Return as many names as there are classes: the given ones, and the number of a class that has none."""
    return [str(names[index]) if index < len(names) else str(index) for index in range(classes)]


def ratio(part: float, whole: float) -> float | None:
    """Return the quotient, or None without a denominator."""
    return float(part / whole) if whole else None
