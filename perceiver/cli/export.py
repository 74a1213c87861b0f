"""`perceiver export`: a trained model as safetensors, transformers folder, ONNX file or MLflow model."""

from typing import Any

import click

from perceiver.cli._types import WEIGHTS, Number
from perceiver.tracking.printable import say, say_json

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
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
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
@WEIGHTS
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON line.")
def command(
    source: str,
    overrides: tuple[str, ...],
    form: str,
    target: str,
    tolerance: float,
    licence: str | None,
    register: str | None,
    weights: Any,
    as_json: bool,
) -> int:
    """Export a trained model with a model card (README.md).

    SOURCE is a run's folder, one of its checkpoints, an earlier safetensors export, a .safetensors file next to its
    recipe.yaml, or a folder that transformers wrote; a path or an fsspec URL. The exported model is loaded and compared
    with the original. Files in FOLDER that export did not write are not overwritten. evaluate, predict and
    train.init_from accept a safetensors export like a run; transformers, onnx and mlflow are for other programs.
    KEY=VALUE changes the model, such as model.inputs.size=[256,256]; the weights must fit as they are.
    """
    from perceiver.api.exports import write_export

    written = write_export(source, form, target, tolerance, licence, register, overrides, weights)
    if as_json:
        say_json(written)
        return 0
    say(f"{target}: {', '.join(written['files'])}")
    if "max_difference" in written:
        say(f"outputs differ by at most {written['max_difference']:.1e} of the largest (onnxruntime)")
    if "registered" in written:
        say("registered in MLflow as {name}, version {version}".format(**written["registered"]))
    return 0
