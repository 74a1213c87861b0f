"""Collect the results of a run and write its report."""

import io
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cluster.recipe.config import Recipe, kind_of
from cluster.record.run_folder import WEIGHTS, RunFolder
from perceiver.factory import attention_maps, build_model, input_keys, input_maps
from perceiver.model import Encoder, PerceiverIO
from perceiver.report.attention import AttentionMaps
from perceiver.report.boxes import RELEVANT, Answered
from perceiver.report.figures import picture
from perceiver.report.page import CardPart
from perceiver.report.run import Classified, ReportData, choose_examples, run_report
from perceiver.storage import open_url
from perceiver.tasks import known_classes, label_key, output_count
from perceiver.text_ids import byte_text
from perceiver.tracking.redaction import redact
from perceiver.train.hooks import History
from pipelines.feed.ingest import DataConfig, sample_spec
from pipelines.feed.samples import make_sample
from pipelines.inspect.inspection import stored_row
from pipelines.inspect.page import card_width
from pipelines.inspect.samples import show, strip
from pipelines.shards.manifest import Manifest
from pipelines.shards.reader import Reader
from pipelines.transforms import BadSample
from pipelines.transforms.mask import IGNORED, decode_mask, mask_colours

ATTENTION_EXAMPLES = 4
ANSWERS_SHOWN = 6
"""Samples of each skill of a general task that are shown, as many of pairs that training did not show."""
SEGMENTED = 12
"""Samples of a segmentation that are shown."""
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
    masks = _segmented(recipe, manifest, predictions)
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
        cards=masks,
        answered=_answered(recipe, folder, manifest, predictions),
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


def _segmented(recipe: Recipe, manifest: Manifest, predictions: Mapping[str, np.ndarray]) -> list[tuple[str, CardPart]]:
    """Return key and picture (image, mask, predicted mask) of some evaluation samples of a segmentation."""
    if kind_of(recipe.task) != "segmentation" or not predictions:
        return []
    ids = predictions["sample_id"]
    chosen = np.unique(np.linspace(0, len(ids) - 1, SEGMENTED).astype(int))
    found = read_samples(recipe, manifest, {int(ids[place]) for place in chosen})
    guesses = {int(ids[place]): predictions["prediction"][place] for place in chosen}
    cards = []
    for number, sample in found.items():
        if sample.image is not None and sample.mask is not None:
            guess = decode_mask(bytes(guesses[number]), sample.mask.size, IGNORED)
            colours = [mask_colours(mask) for mask in (sample.mask, guess)]
            cards.append((sample.key, strip([picture(sample.image).convert("RGB"), *colours], sample.key)))
    return cards


def _answered(
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
    model = _built(recipe, manifest)
    _load_final(model, folder)
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
    weights = model.output_attention(_batch(model, view))[0]
    boxes = len(answered.relevance)
    chosen = torch.as_tensor(answered.relevance >= RELEVANT).nonzero()[:, 0]
    if answered.true_boxes is None:
        chosen = boxes + torch.arange(min(len(answered.answer.encode()) + 1, len(weights) - boxes))
    maps = input_maps(model, weights[chosen].mean(0)) if len(chosen) else {}
    return next((each.numpy() for each in maps.values() if each.dim() == 2), None)


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


@dataclass(frozen=True)
class Sample:
    """An evaluation sample as the report shows it.

    Attributes:
        key: where it came from.
        image: pixels (H, W, C), uint8, as the model reads them; None for other kinds of data.
        parts: text, spectrogram and player, frames or points of other kinds of data.
        mask: classes of the pixels (H, W), if the data have them.
        view: what the model reads, by the batch's keys, of samples whose attention is shown.
    """

    key: str
    image: np.ndarray | None
    parts: list[CardPart]
    mask: np.ndarray | None = None
    view: Mapping[str, Any] = field(default_factory=dict)


def read_samples(
    recipe: Recipe, manifest: Manifest, ids: Iterable[int], views: Collection[int] = ()
) -> dict[int, Sample]:
    """Return evaluation samples by id, those of `views` as the model reads them, too; without unreadable ones."""
    data, found = recipe.data, dict[int, Sample]()
    split = manifest.split(data.eval_split)
    spec = sample_spec(data, manifest, split=data.eval_split, training=False)
    reader = Reader.of(data.url, manifest, split, data.storage_options, policy=data.read)
    for number in sorted(ids):
        place = np.array([number])
        shard, index, row = reader.locate(place)[0]
        group = reader.row_groups({(shard, index)})[shard, index]
        if group.error:
            continue
        try:
            pictures, key = "image" in manifest.features, reader.keys(place)[0]
            view = make_sample(spec, group, row, np.random.default_rng) if pictures or number in views else {}
            if pictures:
                found[number] = Sample(key, view["image"].transpose(1, 2, 0), [], view.get("mask"), view)
            else:
                found[number] = Sample(key, None, _parts(stored_row(group, row), manifest, data), view=view)
        except BadSample:
            continue
    return found


def _parts(row: Mapping[str, Any], manifest: Manifest, data: DataConfig) -> list[CardPart]:
    """Return the parts that show a stored row."""
    parts: list[CardPart] = []
    for name, feature in manifest.features.items():
        parts += show(feature.kind, row[name], feature.decode(row[name], data, len(manifest.classes)))
    return parts


def _built(recipe: Recipe, manifest: Manifest) -> torch.nn.Module:
    """Return the run's model with random weights."""
    return build_model(recipe.model, classes=output_count(recipe.task, len(manifest.classes))).eval()


def _load_final(model: torch.nn.Module, folder: RunFolder) -> None:
    """Load the final weights of a run."""
    import safetensors.torch

    fs, path = open_url(folder.location(WEIGHTS))
    model.load_state_dict(safetensors.torch.load(fs.cat_file(path)))


def _attention(
    recipe: Recipe, folder: RunFolder, manifest: Manifest, views: Mapping[int, Mapping[str, Any]]
) -> AttentionMaps | None:
    """Return the attention of the first and the last cross-attend to the samples; None if there is nothing to draw."""
    model = _built(recipe, manifest)
    keys = input_keys(model)
    if not isinstance(model, Encoder) or not views or any(set(keys) - set(view) for view in views.values()):
        return None
    _load_final(model, folder)
    attends = list[int]()
    found: dict[str, dict[str, list[np.ndarray]]] = {"scores": {}, "weights": {}}
    for view in views.values():
        scores = attention_maps(model, _batch(model, view), scores=True)
        attends = sorted({1, len(scores)})
        chosen = torch.cat([scores[attend - 1] for attend in attends])
        drawn = {"scores": chosen.masked_fill(chosen < MASKED, torch.nan), "weights": chosen.softmax(-1)}
        for kind, values in drawn.items():
            for name, each in input_maps(model, values.mean(1)).items():
                found[kind].setdefault(name, []).append(each.numpy())
    stacked = {kind: {name: np.stack(each) for name, each in parts.items()} for kind, parts in found.items()}
    return AttentionMaps(list(views), attends, **stacked) if stacked["scores"] else None


def _batch(model: Encoder, view: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return a batch of one sample; of several clips, as in an evaluation, the first one."""
    axes = {key: tensor.ndim for key, tensor in model.example(1, "cpu").items()}
    keys = (*model.input_keys, *model.optional_keys)
    batch = {key: torch.as_tensor(np.asarray(view[key]))[None] for key in keys if key in view}
    return {key: value[:, 0] if value.ndim > axes.get(key, value.ndim) else value for key, value in batch.items()}


def _rates(history: list[dict[str, float]]) -> dict[str, str]:
    """Return the throughput, and the shares of the training time spent on checkpoints and recording."""
    rates = [row["train/samples_per_s"] for row in history if "train/samples_per_s" in row]
    found = {"samples/s": f"{np.median(rates) if rates else np.nan:,.0f}"}
    for caption, key in (("checkpoints", "train/checkpoint_stall_share"), ("recording", "train/recording_share")):
        shares = [row[key] for row in history if key in row]
        found |= {caption: f"{shares[-1]:.2%} of the training time"} if shares else {}
    return found
