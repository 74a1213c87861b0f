"""Collect the results of a run and write its report."""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from cluster.recipe.config import Recipe, kind_of
from cluster.record.run_folder import RunFolder
from perceiver.factory import attention_maps, build_model
from perceiver.report.run import ReportData, choose_examples, run_report
from perceiver.storage import open_url
from perceiver.tracking.redaction import redact
from perceiver.train.hooks import History
from pipelines.feed.ingest import EvalShare, eval_batches
from pipelines.shards.manifest import Manifest

ATTENTION_EXAMPLES = 4
SEARCHED_SAMPLES = 20_000


def build_report(
    recipe: Recipe, folder: RunFolder, manifest: Manifest, facts: Mapping[str, Any], commands: Mapping[str, str]
) -> str:
    """Write ``report/index.html`` of a finished run and its figures; return its URL."""
    predictions = read_predictions(folder)
    steps = folder.checkpoints.steps()
    history = History(folder.checkpoints.history(steps[-1])).rows
    wanted, shown = _examples(predictions)
    images = read_images(recipe, manifest, wanted | set(shown)) if "image" in manifest.features else {}
    shown = [i for i in shown if i in images]
    data = ReportData(
        name=folder.name,
        history=history,
        task=kind_of(recipe.task),
        class_names=manifest.classes,
        sample_ids=predictions.get("sample_id"),
        labels=predictions.get("label"),
        predictions=predictions.get("prediction"),
        probabilities=predictions.get("probability"),
        images=images,
        attention_ids=shown,
        attention=_attention(recipe, folder, manifest, [images[i] for i in shown]) if shown else None,
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
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def _examples(predictions: Mapping[str, np.ndarray]) -> tuple[set[int], list[int]]:
    """Return the ids of the samples in the image grid, and of those whose attention maps are shown."""
    if "prediction" not in predictions or "label" not in predictions:
        return set(), []
    ids, labels, guesses = (predictions[k] for k in ("sample_id", "label", "prediction"))
    near = ids < SEARCHED_SAMPLES
    wrong, right = choose_examples(labels[near], guesses[near], predictions["probability"][near].max(1))
    # One image per class, for a variety of maps.
    first = [int(ids[near][labels[near] == k][0]) for k in np.unique(labels[near])[:ATTENTION_EXAMPLES]]
    return {int(ids[near][i]) for i in (*wrong, *right)}, first


def read_images(recipe: Recipe, manifest: Manifest, ids: Iterable[int]) -> dict[int, np.ndarray]:
    """Return evaluation images (H, W, C), uint8, by sample id, as the evaluation reads them."""
    missing, found = set(ids), {}
    data = recipe.data.model_copy(update={"executor": "inline"})
    for batch in eval_batches(data, manifest, EvalShare(data.eval_split, 256), "cpu"):
        for index, number in enumerate(batch["sample_id"].tolist()):
            if number in missing:
                found[number] = batch["image"][index].permute(1, 2, 0).numpy()
                missing.discard(number)
        if not missing or int(batch["sample_id"].max()) >= SEARCHED_SAMPLES:
            break
    return found


def _attention(recipe: Recipe, folder: RunFolder, manifest: Manifest, images: list[np.ndarray]) -> np.ndarray | None:
    """Return the attention maps of the latents, (example, cross-attend, head, latent, H, W), None for other models."""
    import safetensors.torch

    model = build_model(recipe.model, classes=len(manifest.classes))
    fs, path = open_url(folder.location("model.safetensors"))
    model.load_state_dict(safetensors.torch.load(fs.cat_file(path)))
    model.eval()
    grid = getattr(getattr(model, "inputs", None), "grid", None)
    maps = attention_maps(model, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    if grid is None or not maps:
        return None
    return torch.stack(maps, 1).unflatten(-1, tuple(grid)).numpy()


def _rates(history: list[dict[str, float]]) -> dict[str, str]:
    """Return the throughput, and the shares of the training time spent on checkpoints and recording."""
    rates = [row["train/samples_per_s"] for row in history if "train/samples_per_s" in row]
    found = {"samples/s": f"{np.median(rates) if rates else np.nan:,.0f}"}
    for caption, key in (("checkpoints", "train/checkpoint_stall_share"), ("recording", "train/recording_share")):
        shares = [row[key] for row in history if key in row]
        found |= {caption: f"{shares[-1]:.2%} of the training time"} if shares else {}
    return found
