"""What a model was trained on: recorded with the run, so that it is known where the data cannot be read."""

from dataclasses import asdict
from typing import Any

from perceiver.config import UserError
from perceiver.export.weights import DataFacts, Saved
from perceiver.tracking.redaction import redact
from pipelines.shards.manifest import Manifest, load_manifest


def data_facts(manifest: Manifest) -> dict[str, Any]:
    """Return what run.json records of the data (key ``data``), fit for files and logs."""
    return redact(asdict(DataFacts(manifest.name, manifest.licence, manifest.source, manifest.classes)))


def trained_on(saved: Saved) -> DataFacts | None:
    """Return what the run recorded of its data, else what the data's own manifest says; None if neither is there."""
    section = saved.recipe.get("data", {})
    if saved.data or "url" not in section:
        return saved.data
    try:
        manifest = load_manifest(section["url"], section.get("storage_options"))
    except UserError:
        return None
    return DataFacts(manifest.name, manifest.licence, manifest.source, manifest.classes)
