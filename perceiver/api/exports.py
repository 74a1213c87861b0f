"""Exports: `perceiver.export`."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver.config import UserError

if TYPE_CHECKING:
    from perceiver.api.recipes import Place
    from perceiver.export.weights import Saved
    from perceiver.storage import Folder
    from perceiver.train.checkpoint.shards import Weights

LIST = "export.json"
"""The files that export wrote to a folder, with their checksums; only these are overwritten."""
FORMATS = ("safetensors", "transformers", "onnx", "mlflow")


def export(
    source: "Place",
    format: str,  # noqa: A002  the option's name
    to: "Place",
    *,
    tolerance: float = 1e-4,
    licence: str | None = None,
    register: str | None = None,
    weights: "Weights | None" = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Export a trained model with a model card (README.md), as `perceiver export` does.

    Args:
        source: a `Run` or its folder, a checkpoint, an earlier safetensors export, a .safetensors file next to its
            recipe.yaml, or a folder that transformers wrote.
        format: `safetensors`, `transformers`, `onnx` or `mlflow`.
        to: folder to write to, a path or an fsspec URL.
        tolerance: ONNX: largest difference allowed, relative to the largest output.
        licence: of the weights, for the model card.
        register: MLflow: log the model to the run's MLflow run and register it under this name.
        weights: of a run or checkpoint with `train.ema`: `ema`, the default, or `last`.
        overrides: keys of the model that its weights fit as well, such as `**{"model.inputs.size": (256, 256)}`.

    Returns:
        `to`, `format`, `files`, and the facts of the format, such as inputs and outputs.

    Raises:
        UserError: weights or folder cannot be used, or the format has no equivalent of the model.
    """
    from perceiver.api.recipes import words

    if format not in FORMATS:
        raise UserError(f"format {format!r}: wanted one of {', '.join(FORMATS)}")
    return write_export(
        os.fspath(source), format, os.fspath(to), tolerance, licence, register, words(overrides), weights
    )


def write_export(
    source: str,
    form: str,
    target: str,
    tolerance: float,
    licence: str | None,
    register: str | None,
    overrides: Sequence[str] = (),
    weights: "Weights | None" = None,
) -> dict[str, Any]:
    """Export as `export`, with overrides of the form `KEY=VALUE`."""
    # The transformers library reads these at import; its progress bars would fill the terminal.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from cluster.predict.scoring import trained_on
    from perceiver.export import formats
    from perceiver.export.weights import open_weights
    from perceiver.storage import open_target

    if register and form != "mlflow":
        raise UserError(f"--register: got it with --format {form}; wanted --format mlflow")
    _listed(open_target(target), target)
    saved = _changed(open_weights(source, weights), overrides)
    data = trained_on(saved)
    facts = {"data": asdict(data)} if data else {}
    saved = replace(saved, facts={**saved.facts, **facts, **({"licence": licence} if licence else {})})
    with tempfile.TemporaryDirectory(prefix="export-") as staging:
        folder = Path(staging)
        if form == "onnx":
            written = formats.export_onnx(saved, folder, tolerance)
        elif form == "mlflow":
            written = _mlflow(saved, folder, data, register)
        else:
            written = {"safetensors": formats.export_safetensors, "transformers": formats.export_transformers}[form](
                saved, folder
            )
        (folder / "README.md").write_text(formats.model_card(saved, written, data), encoding="utf-8")
        _put(folder, target)
    return {"to": target, "format": form, **written, "files": [*written["files"], "README.md", LIST]}


def _changed(saved: "Saved", overrides: Sequence[str]) -> "Saved":
    """Return weights with keys of their model replaced.

    Raises:
        UserError: an override is of another form or section, or its key or value is wrong.
    """
    from pydantic import ValidationError

    from cluster.recipe.file import apply_override, explain
    from perceiver.config import Config
    from perceiver.factory import ModelConfig

    class Section(Config):
        model: ModelConfig

    if not overrides or saved.model is None:
        return saved
    tree: dict[str, Any] = {"model": saved.model.model_dump(mode="json")}
    for override in overrides:
        apply_override(tree, override)
    if other := tree.keys() - {"model"}:
        raise UserError(f"override of {min(other)}: wanted keys of the model, such as model.inputs.size=[256,256]")
    try:
        model = Section.model_validate(tree).model
    except ValidationError as error:
        raise UserError(explain(error, Section)) from None
    recipe = {**saved.recipe, "model": model.model_dump(mode="json")} if saved.recipe else {}
    return replace(saved, model=model, recipe=recipe)


def _mlflow(saved: Any, folder: Path, data: Any, name: str | None) -> dict[str, Any]:
    """Write an MLflow model, and register it if a name is given."""
    from perceiver.export import mlflow_model

    classes = data.classes if data else ()
    written = mlflow_model.export_mlflow(saved, folder, classes)
    if name:
        written["registered"] = mlflow_model.register(saved, name, classes)
    return written


def _listed(place: "Folder", target: str) -> dict[str, str]:
    """Return the files that an earlier export wrote to a folder, and their checksums; of some, a new one too.

    Raises:
        UserError: the folder or its list cannot be read, or is another program's.
    """
    from perceiver.storage import NotRegularError, parse_json, refusing

    with refusing(f"--to {target}", "choose another folder"):
        if place.local and Path(place.file(LIST)).is_symlink():
            raise NotRegularError(f"{LIST} is a link")
        written = parse_json(place.fs.cat_file(place.existing(LIST)), f"{target}/{LIST}") if place.exists(LIST) else {}
    if not isinstance(written, dict) or not all(isinstance(sums, str) for sums in written.values()):
        raise UserError(f"--to {target}: has {LIST}, which export did not write there: choose another folder")
    return written


def _check_kept(place: "Folder", target: str, name: str, known: str) -> None:
    """Refuse to overwrite a file that is not one of ours; links are never followed.

    Raises:
        UserError: it exists with a checksum that is not known, or it or a folder on its way is a link.
    """
    from perceiver.storage import file_sha256

    parts = name.split("/")
    ways = [Path(place.path, *parts[: number + 1]) for number in range(len(parts))] if place.local else []
    linked = any(way.is_symlink() for way in ways)
    if linked or (place.exists(name) and file_sha256(place.existing(name), place.fs) not in known.split()):
        raise UserError(f"--to {target}: has {name}, which export did not write there: choose another folder")


def _put(folder: Path, target: str) -> None:
    """Copy the files of a folder to a path or URL, with the list `export.json` of them and their checksums.

    The list is written first, with the old and the new checksum of each file, so that an interrupted export can be
    repeated.

    Raises:
        UserError: a file exists there that is not listed or has been changed since, or the folder cannot be written.
    """
    from perceiver.storage import file_sha256, open_target, put_whole, refusing

    place = open_target(target)
    files = {each.relative_to(folder).as_posix(): each for each in sorted(folder.rglob("*")) if each.is_file()}
    sums = {name: file_sha256(file) for name, file in files.items()}
    written = _listed(place, target)
    with refusing(f"--to {target}", "choose another folder"):
        for name in files:
            _check_kept(place, target, name, written.get(name, ""))
        both = {name: f"{written.get(name, '')} {new}".strip() for name, new in sums.items()}
        place.write(LIST, json.dumps({**written, **both}, indent=1))
        for name, file in files.items():
            put_whole(file, place, name)
        place.write(LIST, json.dumps({**written, **sums}, indent=1))
