"""Collect the results of a run and write its report."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cluster.recipe.config import Recipe, kind_of
from cluster.record.run_folder import RunFolder
from cluster.run.answer_cards import drawn_cards
from cluster.run.answers import SEGMENTED_NOTE, answered, segmented
from cluster.run.samples import built_model, load_final, one_batch, read_samples
from perceiver.factory import attention_maps, input_keys, input_maps
from perceiver.model import Encoder
from perceiver.report.attention import AttentionMaps
from perceiver.report.run import Classified, ReportData, choose_examples, run_report
from perceiver.storage import open_url
from perceiver.tasks import known_classes, label_key
from perceiver.tracking.redaction import redact
from perceiver.train.hooks import History
from pipelines.inspect.page import card_width
from pipelines.shards.manifest import Manifest

ATTENTION_EXAMPLES = 4
MASKED = -1e29
"""Scores below it are those of inputs that do not exist."""
LARGE_EXAMPLES = (12, 6)
"""Wrong and right samples that are shown where each is a text, a recording or a cloud of points."""


def build_report(
    recipe: Recipe, folder: RunFolder, manifest: Manifest, facts: Mapping[str, Any], commands: Mapping[str, str]
) -> str:
    """Write ``report/index.html`` of a finished run and its figures; return its URL."""
    predictions = _labelled(recipe, read_predictions(folder))
    steps = folder.checkpoints.steps()
    history = History(folder.checkpoints.history(steps[-1])).rows
    wanted, shown = _examples(recipe, manifest, predictions)
    found = read_samples(recipe, manifest, wanted | set(shown), shown)
    cards, cards_note = segmented(recipe, manifest, predictions), SEGMENTED_NOTE
    if not cards:
        cards, cards_note = drawn_cards(recipe, folder, manifest)
    images = {number: sample.image for number, sample in found.items() if sample.image is not None}
    views = {i: found[i].view for i in shown if i in found}
    data = ReportData(
        name=folder.name,
        history=history,
        task="multilabel" if kind_of(recipe.task) == "tagging" else kind_of(recipe.task),
        class_names=manifest.classes,
        sample_ids=predictions.get("sample_id"),
        labels=predictions.get("label"),
        predictions=predictions.get("prediction"),
        probabilities=predictions.get("probability"),
        numbers=_numbers(predictions),
        several=_several(recipe, predictions),
        cards=cards,
        cards_note=cards_note,
        answered=answered(recipe, folder, manifest, predictions),
        images=images,
        parts={number: sample.parts for number, sample in found.items() if sample.parts},
        keys={number: sample.key for number, sample in found.items()},
        card_width=None if images else card_width(manifest),
        attention=_attention(recipe, folder, manifest, views),
        profiles=read_profiles(folder),
        recipe=redact(recipe.model_dump(mode="json")),
        facts={**facts, **_rates(history)},
        commands=commands,
        checkpoints=[{"step": step, "path": folder.checkpoints.location(step)} for step in steps],
    )
    for name, content in run_report(data).items():
        folder.write(f"report/{name}", content)
    return folder.location("report", "index.html")


def read_predictions(folder: RunFolder) -> dict[str, np.ndarray]:
    """Return the columns of the workers' predictions, sorted by sample id; empty if there are none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, root = open_url(folder.location("predictions"))
    parts = sorted(fs.glob(f"{root}/part-*.parquet"))
    if not parts:
        return {}
    table = pa.concat_tables(pq.read_table(io.BytesIO(fs.cat_file(part))) for part in parts)
    table = table.sort_by("sample_id")
    kinds = {column.name: object if pa.types.is_binary(column.type) else None for column in table.schema}
    return {name: np.array(table[name].to_pylist(), kinds[name]) for name in table.column_names}


def read_profiles(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the summaries of the profiled ranks, see `perceiver.train.profiling`."""
    fs, root = open_url(folder.location("profile"))
    return [json.loads(fs.cat_file(part)) for part in sorted(fs.glob(f"{root}/rank-*.json"))]


def _labelled(recipe: Recipe, predictions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the rows of a classification that have a label."""
    if kind_of(recipe.task) != "classification" or "label" not in predictions:
        return predictions
    there = predictions["label"] >= 0
    return {name: column[there] for name, column in predictions.items()}


def _numbers(predictions: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return true and predicted values of each number that was predicted."""
    names = [name.removeprefix("target_") for name in predictions if name.startswith("target_")]
    return {name: (predictions[f"target_{name}"], predictions[f"prediction_{name}"]) for name in names}


def _several(recipe: Recipe, predictions: Mapping[str, np.ndarray]) -> dict[str, Classified]:
    """Return labels and predictions of each task of a multitask that predicts a class, of the samples with a label."""
    found = {}
    for name, classes in known_classes(recipe.task).items():
        labels = predictions.get(label_key(name))
        if labels is not None and (there := labels >= 0).any():
            found[name] = Classified(classes, labels[there], predictions[f"prediction_{name}"][there])
    return found


def _examples(recipe: Recipe, manifest: Manifest, predictions: Mapping[str, np.ndarray]) -> tuple[set[int], list[int]]:
    """Return the ids of the wrong and right samples to show, and of those whose attention maps are shown."""
    if kind_of(recipe.task) in ("tagging", "general") and predictions:
        return set(), [int(number) for number in predictions["sample_id"][:ATTENTION_EXAMPLES]]
    if kind_of(recipe.task) != "classification" or not predictions:
        return set(), []
    ids, labels, guesses = (predictions[k] for k in ("sample_id", "label", "prediction"))
    counts = () if "image" in manifest.features else LARGE_EXAMPLES
    wrong, right = choose_examples(labels, guesses, predictions["probability"].max(1), *counts)
    # One sample per class, for a variety of maps.
    first = [int(ids[labels == k][0]) for k in np.unique(labels)[:ATTENTION_EXAMPLES]]
    return {int(ids[i]) for i in (*wrong, *right)}, first


def _attention(
    recipe: Recipe, folder: RunFolder, manifest: Manifest, views: Mapping[int, Mapping[str, Any]]
) -> AttentionMaps | None:
    """Return the attention of the first and the last cross-attend to the samples; None if there is nothing to draw."""
    model = built_model(recipe, manifest)
    keys = input_keys(model)
    if not isinstance(model, Encoder) or not views or any(set(keys) - set(view) for view in views.values()):
        return None
    load_final(model, folder)
    attends = list[int]()
    found: dict[str, dict[str, list[np.ndarray]]] = {"scores": {}, "weights": {}}
    for view in views.values():
        scores = attention_maps(model, one_batch(model, view), scores=True)
        attends = sorted({1, len(scores)})
        chosen = torch.cat([scores[attend - 1] for attend in attends])
        drawn = {"scores": chosen.masked_fill(chosen < MASKED, torch.nan), "weights": chosen.softmax(-1)}
        for kind, values in drawn.items():
            for name, each in input_maps(model, values.mean(1)).items():
                found[kind].setdefault(name, []).append(each.numpy())
    stacked = {kind: {name: np.stack(each) for name, each in parts.items()} for kind, parts in found.items()}
    return AttentionMaps(list(views), attends, **stacked) if stacked["scores"] else None


def _rates(history: list[dict[str, float]]) -> dict[str, str]:
    """Return the throughput, and the shares of the training time spent on checkpoints and recording."""
    rates = [row["train/samples_per_s"] for row in history if "train/samples_per_s" in row]
    found = {"samples/s": f"{np.median(rates) if rates else np.nan:,.0f}"}
    for caption, key in (("checkpoints", "train/checkpoint_stall_share"), ("recording", "train/recording_share")):
        shares = [row[key] for row in history if key in row]
        found |= {caption: f"{shares[-1]:.2%} of the training time"} if shares else {}
    return found
