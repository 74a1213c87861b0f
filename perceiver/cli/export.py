"""`perceiver export`: a trained model as safetensors, transformers folder, ONNX file or MLflow model."""

import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from perceiver.cli._types import Number
from perceiver.tracking.printable import say, say_json

if TYPE_CHECKING:
    from perceiver.storage import Folder

LIST = "export.json"
"""The files that export wrote to a folder, with their checksums; only these are overwritten."""
FORMATS = ("safetensors", "transformers", "onnx", "mlflow")


@click.command(
    epilog="""\b
Examples:
  perceiver export runs/quickstart-001 --format onnx --to exported/digits
  perceiver export runs/quickstart-001 --format safetensors --to exported/digits --licence CC-BY-4.0
  perceiver export runs/quickstart-001/checkpoints/step-00001875 --format safetensors --to s3://bucket/digits
  perceiver export runs/quickstart-001 --format mlflow --to exported/served --register digits"""
)
@click.argument("source")
@click.option("--format", "form", type=click.Choice(FORMATS), required=True, help="Format to write.")
@click.option("--to", "target", required=True, metavar="FOLDER", help="Folder to write to; a path or an fsspec URL.")
@click.option(
    "--tolerance",
    type=Number(0, 1),
    default=1e-4,
    show_default=True,
    help="ONNX: largest difference allowed, relative to the largest output.",
)
@click.option("--licence", metavar="TEXT", help="Licence of the weights, for the model card.")
@click.option(
    "--register", metavar="NAME", help="MLflow: log the model to the run's MLflow run and register it as NAME."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON line.")
def command(
    source: str, form: str, target: str, tolerance: float, licence: str | None, register: str | None, as_json: bool
) -> int:
    """Export a trained model with a model card (README.md).

    SOURCE is a run's folder, one of its checkpoints, an earlier safetensors export, a .safetensors file next to its
    recipe.yaml, or a folder that transformers wrote; a path or an fsspec URL. The exported model is loaded and compared
    with the original. Files in FOLDER that export did not write are not overwritten. evaluate, predict and
    train.init_from accept a safetensors export like a run; transformers, onnx and mlflow are for other programs.
    """
    # The transformers library reads these at import; its progress bars would fill the terminal.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from cluster.predict.scoring import trained_on
    from perceiver.config import UserError
    from perceiver.export import formats as export
    from perceiver.export.weights import open_weights
    from perceiver.storage import open_target

    if register and form != "mlflow":
        raise UserError(f"--register: got it with --format {form}; wanted --format mlflow")
    _listed(open_target(target), target)
    saved = open_weights(source)
    data = trained_on(saved)
    facts = {"data": asdict(data)} if data else {}
    saved = replace(saved, facts={**saved.facts, **facts, **({"licence": licence} if licence else {})})
    with tempfile.TemporaryDirectory(prefix="export-") as staging:
        folder = Path(staging)
        if form == "onnx":
            written = export.export_onnx(saved, folder, tolerance)
        elif form == "mlflow":
            written = _mlflow(saved, folder, data, register)
        else:
            written = {"safetensors": export.export_safetensors, "transformers": export.export_transformers}[form](
                saved, folder
            )
        (folder / "README.md").write_text(export.model_card(saved, written, data), encoding="utf-8")
        _put(folder, target)
    files = [*written.pop("files"), "README.md", LIST]
    if as_json:
        say_json({"to": target, "format": form, "files": files, **written})
        return 0
    say(f"{target}: {', '.join(files)}")
    if "max_difference" in written:
        say(f"outputs differ by at most {written['max_difference']:.1e} of the largest (onnxruntime)")
    if "registered" in written:
        say("registered in MLflow as {name}, version {version}".format(**written["registered"]))
    return 0


def _mlflow(saved: Any, folder: Path, data: Any, name: str | None) -> dict[str, Any]:
    """Write an MLflow model, and register it if a name is given."""
    from perceiver.export import mlflow_model as export_mlflow

    classes = data.classes if data else ()
    written = export_mlflow.export_mlflow(saved, folder, classes)
    if name:
        written["registered"] = export_mlflow.register(saved, name, classes)
    return written


def _listed(place: "Folder", target: str) -> dict[str, str]:
    """Return the files that an earlier export wrote to a folder, and their checksums; of some, a new one too.

    Raises:
        UserError: the folder or its list cannot be read, or is another program's.
    """
    from perceiver.config import UserError
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
    from perceiver.config import UserError
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
