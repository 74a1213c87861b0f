"""What a run's final model answers to some evaluation samples, as its report shows it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cluster.recipe.config import Recipe, kind_of
from cluster.record.run_folder import RunFolder
from cluster.run.samples import built_model, load_final, one_batch, read_samples, spread
from perceiver.factory import input_maps
from perceiver.model import PerceiverIO
from perceiver.report.boxes import RELEVANT, Answered
from perceiver.report.figures import picture
from perceiver.report.page import Card
from perceiver.text_ids import byte_text
from pipelines.inspect.samples import strip
from pipelines.shards.manifest import Manifest
from pipelines.transforms.mask import IGNORED, decode_mask, mask_colours

ANSWERS_SHOWN = 6
"""Samples of each skill of a general task that are shown, as many of pairs that training did not show."""
SEGMENTED, SEGMENTED_NOTE = 12, "the image, its mask, the prediction. Grey does not count."
"""Samples of a segmentation that are shown, and what their cards show."""


def segmented(recipe: Recipe, manifest: Manifest, predictions: Mapping[str, np.ndarray]) -> list[Card]:
    """Return pictures (image, mask, predicted mask) of some evaluation samples of a segmentation."""
    if kind_of(recipe.task) != "segmentation" or not predictions:
        return []
    ids = predictions["sample_id"]
    chosen = spread(len(ids), SEGMENTED)
    found = read_samples(recipe, manifest, {int(ids[place]) for place in chosen})
    guesses = {int(ids[place]): predictions["prediction"][place] for place in chosen}
    cards = []
    for number, sample in found.items():
        if sample.image is not None and sample.mask is not None:
            guess = decode_mask(bytes(guesses[number]), sample.mask.size, IGNORED)
            colours = [mask_colours(mask) for mask in (sample.mask, guess)]
            cards.append(Card(sample.key, [strip([picture(sample.image).convert("RGB"), *colours], sample.key)]))
    return cards


def answered(
    recipe: Recipe, folder: RunFolder, manifest: Manifest, predictions: Mapping[str, np.ndarray]
) -> dict[str, Answered]:
    """Return image, task and answer of some evaluation samples of each skill of a general task, by key."""
    if kind_of(recipe.task) != "general" or not predictions:
        return {}
    skills, hidden = predictions["label"], predictions.get("held_out", np.zeros(len(predictions["label"]), bool))
    groups = [np.flatnonzero((skills == skill) & (hidden == part)) for skill in np.unique(skills) for part in (0, 1)]
    chosen = np.concatenate([group[:ANSWERS_SHOWN] for group in groups])
    ids = predictions["sample_id"][chosen].astype(int)
    found = read_samples(recipe, manifest, ids.tolist(), ids.tolist())
    model = built_model(recipe, manifest)
    load_final(model, folder)
    answers = {}
    for place, number in zip(chosen, ids.tolist(), strict=True):
        if (sample := found.get(number)) is None or sample.image is None:
            continue
        row = {name: column[place] for name, column in predictions.items()}
        count = int(row.get("true_count", -1))
        one = Answered(
            image=sample.image,
            task=byte_text(sample.view["text"].tolist()),
            boxes=np.asarray(row["boxes"]),
            relevance=np.asarray(row["relevance"]),
            answer=byte_text(list(row["answer"])),
            ended=bool(row["ended"]),
            true_boxes=np.asarray(row["true_boxes"])[:count] if count >= 0 else None,
            true_answer=byte_text(list(row.get("true_answer", ()))),
        )
        answers[sample.key] = replace(one, maps=_answer_map(model, sample.view, one))
    return answers


def _answer_map(model: torch.nn.Module, view: Mapping[str, Any], answered: Answered) -> np.ndarray | None:
    """Return what the relevant boxes, or the text up to its end, attend to in the image; None if it is not known."""
    if not isinstance(model, PerceiverIO) or not hasattr(model.decoder, "box"):
        return None
    weights = model.output_attention(one_batch(model, view))[0]
    boxes = len(answered.relevance)
    chosen = torch.as_tensor(answered.relevance >= RELEVANT).nonzero()[:, 0]
    if answered.true_boxes is None:
        chosen = boxes + torch.arange(min(len(answered.answer.encode()) + 1, len(weights) - boxes))
    maps = input_maps(model, weights[chosen].mean(0)) if len(chosen) else {}
    return next((each.numpy() for each in maps.values() if each.dim() == 2), None)
