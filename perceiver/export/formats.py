"""Export of a model as safetensors, transformers folder or ONNX, with a model card."""

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from perceiver.accounting import account
from perceiver.baselines.gpv import BertReader
from perceiver.config import Config, UserError
from perceiver.export.transformers_folder import read_transformers
from perceiver.export.transformers_layout import from_transformers, to_transformers
from perceiver.export.weights import DataFacts, Saved, class_count
from perceiver.factory import input_keys
from perceiver.tasks import Task, TaskConfig, build_task
from perceiver.tracking.printable import markdown_code, markdown_text
from perceiver.tracking.redaction import redact

BATCHES = (1, 3)
"""Batch sizes with which an ONNX model is tested; it is traced with another."""
CLASSES = "classes"
"""The key of an ONNX file's metadata with the names of the classes, as JSON."""
TARGETS = "targets"
"""The key with what the outputs mean, as JSON: names of a regression's columns, classes of each task of several."""
KEPT_FACTS = ("step", "evaluation", "mlflow_run", "data", "licence")
"""The facts of a run that are exported with its weights."""


def write_weights(saved: Saved, folder: Path) -> None:
    """Write `model.safetensors` with the model's config in its metadata, for `perceiver.load_model`."""
    saved.build()
    metadata = {"format": "pt", "model": json.dumps(cast(Config, saved.model).model_dump(mode="json"))}
    tensors = {name: tensor.contiguous() for name, tensor in saved.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata)


def export_safetensors(saved: Saved, folder: Path) -> dict[str, Any]:
    """Write the weights, with `recipe.yaml` and `run.json` if a run trained them; commands accept it like a run."""
    write_weights(saved, folder)
    files = ["model.safetensors"]
    if saved.recipe:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(redact(saved.recipe), sort_keys=False))
        facts = {name: saved.facts[name] for name in KEPT_FACTS if saved.facts.get(name) is not None}
        (folder / "run.json").write_text(json.dumps(redact(facts), indent=1) + "\n")
        files += ["recipe.yaml", "run.json"]
    return {"files": files}


def export_transformers(saved: Saved, folder: Path) -> dict[str, Any]:
    """Write a folder for `PerceiverFor....from_pretrained`, load it and compare every weight.

    Raises:
        UserError: the transformers library has no equivalent model.
    """
    theirs = to_transformers(saved.build())
    theirs.save_pretrained(folder)
    again, wanted = read_transformers(str(folder)).state_dict(), from_transformers(theirs).state_dict()
    different = [name for name, tensor in wanted.items() if not torch.equal(again[name], tensor)]
    if different:
        raise RuntimeError(f"transformers: {different[0]} differs after loading")
    return {"files": ["config.json", "model.safetensors"], "class": type(theirs).__name__}


class _Positional(nn.Module):
    """A model with positional inputs and a tuple of outputs, which `finish` maps to what its task gives."""

    def __init__(self, model: nn.Module, keys: tuple[str, ...], finish: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.keys, self.finish = model, keys, finish

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        output = self.finish(self.model(dict(zip(self.keys, tensors, strict=True))))
        return tuple(output.values()) if isinstance(output, dict) else (output,)


def export_onnx(saved: Saved, folder: Path, tolerance: float = 1e-4) -> dict[str, Any]:
    """Write `model.onnx` for any batch size, and compare it with the model.

    Args:
        saved: the weights.
        folder: folder to write to.
        tolerance: largest difference allowed, relative to the largest output.

    Raises:
        UserError: ONNX is not installed, or the outputs differ by more.
    """
    onnxruntime = _onnx()
    plain = {"attention": "plain"} if hasattr(saved.model, "attention") else {}
    model = saved.build(**plain)
    if any(isinstance(module, BertReader) for module in model.modules()):
        raise UserError(
            "onnx: got a model with model.reader.kind bert, which splits texts into word pieces outside of the graph; "
            "wanted kind bytes: export safetensors"
        )
    raw = example(model, 2)
    task = trained_task(saved)
    finish = getattr(task, "finish", _unchanged)
    net = _Positional(model, tuple(raw), finish)
    with torch.no_grad():
        # Run once before tracing: the model must not cache a tracer's proxy tensors.
        names = _output_names(finish(model(dict(raw))), raw)
        net(*raw.values())
    free = {0: torch.export.Dim.AUTO}
    with silent(), torch.no_grad():
        program = torch.export.export(net, tuple(raw.values()), dynamic_shapes=((free,) * len(raw),), strict=False)
        written = torch.onnx.export(program, input_names=list(raw), output_names=names, verbose=False)
        assert written is not None
        if classes := named_classes(saved):
            written.model.metadata_props[CLASSES] = json.dumps(classes)
        if targets := getattr(task, "described", ()):
            written.model.metadata_props[TARGETS] = json.dumps(targets)
        written.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    worst = max(_difference(session, saved.build(), batch, finish) for batch in BATCHES)
    if not worst <= tolerance:
        raise UserError(
            f"onnx: got outputs that differ by {worst:.1e} of the largest; wanted at most {tolerance:g}: raise"
            " --tolerance if that is acceptable"
        )
    files = sorted(path.name for path in folder.glob("model.onnx*"))
    described = {**describe_inputs(raw), "outputs": names}
    return {"files": files, **described, "max_difference": worst, "tolerance": tolerance}


def trained_task(saved: Saved) -> Task | None:
    """Return the task that the weights were trained for; None without a recipe that this version can read."""
    try:
        config = TypeAdapter(TaskConfig).validate_python(saved.recipe["task"])
        return build_task(config, classes=class_count(cast(Config, saved.model), saved.shapes) or 0)
    except (KeyError, ValidationError):
        return None


def _unchanged(output: Any) -> Any:
    return output


def named_classes(saved: Saved) -> list[str]:
    """Return the names of the model's classes; empty if they are not recorded."""
    names = saved.data.classes if saved.data and not predicted_numbers(saved) else ()
    return list(names) if saved.model and len(names) == class_count(saved.model, saved.shapes) else []


def predicted_numbers(saved: Saved) -> tuple[str, ...]:
    """Return the names of the numbers that a regression predicts; empty for other tasks."""
    found = ((saved.recipe.get("task") or {}).get("targets") or {}).get("names", ())
    return tuple(str(name) for name in found)


def describe_inputs(raw: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return shape and type of each raw input, for the model card and `--json`."""
    return {
        "inputs": {name: ["batch", *tensor.shape[1:]] for name, tensor in raw.items()},
        "dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in raw.items()},
    }


def _onnx() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name}: not installed; wanted for --format onnx: pip install '.[onnx]'") from error
    return onnxruntime


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Suppress a library's warnings and log messages."""
    logging.disable(logging.WARNING)
    try:
        # Recorded, because a library may set its own filters.
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _output_names(output: Any, inputs: Collection[str]) -> list[str]:
    """Return the names of the outputs; one that an input has too gets the ending `_output`."""
    names = list(output) if isinstance(output, dict) else ["output"]
    taken = {*inputs, *names}
    for place, name in enumerate(names):
        if name in inputs:
            while name in taken:
                name += "_output"
            names[place] = name
            taken.add(name)
    return names


def example(model: nn.Module, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random raw inputs of the configured size; masks are True with probability 0.75."""
    generator = torch.Generator().manual_seed(seed)
    zeros = cast(Any, model).example(batch, "cpu")
    net = cast(Any, model)
    raw = {key: _random(zeros[key], key, generator) for key in input_keys(model)}
    for key in net.optional_keys:
        like = raw[key.removesuffix("_mask")]
        raw[key] = torch.rand(like.shape, generator=generator) > 0.25
    return raw


def _random(like: Tensor, key: str, generator: torch.Generator) -> Tensor:
    if like.is_floating_point():
        return torch.rand(like.shape, generator=generator) * 2 - 1
    # Ids and labels of 0 and 1 exist in every vocabulary and set of classes.
    low, high = {torch.int16: (-9000, 9000), torch.uint8: (0, 256)}.get(like.dtype, (0, 2))
    return torch.randint(low, high, like.shape, generator=generator, dtype=like.dtype)


def _difference(session: Any, model: nn.Module, batch: int, finish: Callable[[Any], Any]) -> float:
    """Return the largest difference between onnxruntime's and the model's outputs, relative to the largest output."""
    raw = example(model, batch, seed=batch)
    with torch.no_grad():
        expected = _Positional(model, tuple(raw), finish)(*raw.values())
    got = session.run(None, {name: tensor.numpy() for name, tensor in raw.items()})
    pairs = [(torch.from_numpy(a), b) for a, b in zip(got, expected, strict=True)]
    return max(float((a - b).abs().max()) / (float(b.abs().max()) or 1.0) for a, b in pairs)


def model_card(saved: Saved, written: Mapping[str, Any], data: DataFacts | None) -> str:
    """Return the model card: model, training data, metrics, limits, usage and recipe, as Markdown."""
    config = cast(Config, saved.model)
    classes = class_count(config, saved.shapes)
    costs = account(config, classes=classes)
    name = saved.recipe.get("name") or Path(saved.place.rstrip("/")).name
    numbers = predicted_numbers(saved)
    what = _what_numbers(config, numbers) if numbers else _what(config, classes, data)
    lines = [f"# {markdown_text(str(name))}", "", what, "", "| | |", "|---|---|"]
    rows = {
        "Model": f"`{cast(Any, config).kind}` on `{cast(Any, config).inputs.kind}` inputs",
        "Parameters": f"{costs.parameters:,}",
        "GFLOP of a forward pass": f"{costs.forward_flops / 1e9:.4g} (one sample; 2 per multiply-add)",
        "Files": ", ".join(map(markdown_code, written["files"])),
        "Weights from": markdown_code(saved.place) + (f", step {step}" if (step := saved.facts.get("step")) else ""),
        "Licence of the weights": markdown_text(_licence(saved, data)),
    }
    if "max_difference" in written:
        rows["ONNX against PyTorch"] = f"difference of at most {written['max_difference']:.1e} of the largest output"
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    lines += ["", "## Data", "", _data(data, saved)]
    lines += ["", "## Metrics", "", *_figures(saved)]
    lines += ["", "## Intended use and limits", "", *_limits(saved, None if numbers else classes, data)]
    lines += ["", "## Use", "", *_use(written, saved)]
    left_out = ("output", "cluster", "tracking")
    section = {key: value for key, value in saved.recipe.items() if key not in left_out}
    section = section or {"model": config.model_dump(mode="json")}
    # Within a fence of this length no text of the recipe ends it.
    lines += ["", "## Recipe", "", "`````yaml", yaml.safe_dump(redact(section), sort_keys=False).rstrip(), "`````", ""]
    return "\n".join(lines)


def _what(config: Any, classes: int | None, data: DataFacts | None) -> str:
    kind = config.inputs.kind
    task = f"sorts {kind} inputs into {classes} classes" if classes else f"reads {kind} inputs"
    names = (
        f" ({markdown_text(', '.join(data.classes[:20]))}{', ...' * (len(data.classes) > 20)})"
        if data and data.classes
        else ""
    )
    return f"A model that {task}{names}."


def _what_numbers(config: Any, names: tuple[str, ...]) -> str:
    named = markdown_text(", ".join(names[:20])) + ", ..." * (len(names) > 20)
    return f"A model that predicts {named} from {config.inputs.kind} inputs, in the units of its training data."


def _licence(saved: Saved, data: DataFacts | None) -> str:
    if saved.facts.get("licence"):
        return str(saved.facts["licence"])
    return "not stated by the run" + (f"; the data's is: {data.licence}" if data else "")


def _limits(saved: Saved, classes: int | None, data: DataFacts | None) -> list[str]:
    """Return the intended use and the limits of the model as a list."""
    task = (saved.recipe.get("task") or {}).get("kind")
    url = saved.recipe.get("data", {}).get("url")
    known = markdown_code(url) if url else "its training data, of which there is no record"
    like = markdown_text(data.name) if data else known
    lines = [f"Intended for inputs like those of {like}, resized, scaled and cropped as in the recipe below."]
    if saved.facts.get("evaluation"):
        lines += [
            "The metrics above are for the whole split. Inputs from other sources, damaged inputs and subgroups of the "
            "data were not evaluated separately."
        ]
    else:
        lines += ["No metrics are recorded: evaluate the model before you rely on it (`perceiver evaluate`)."]
    if classes and task == "tagging":
        lines += [
            "Each class has its own probability, with a threshold of 0.5 for `prediction`. The model knows no other "
            "classes, and the probabilities are not calibrated."
        ]
    elif classes:
        lines += [
            "It predicts one of its classes for any input, also for one of no class; its probabilities are not "
            "calibrated."
        ]
    if task == "regression":
        lines += ["It predicts numbers for any input, also for one unlike its training data, without a range of error."]
    if task == "masked_language":
        lines += ["It may reproduce biased or wrong statements of its training text."]
    lines += ["It must be tested before it is used for decisions about people or safety; no such test is recorded."]
    return [f"- {line}" for line in lines]


def _data(data: DataFacts | None, saved: Saved) -> str:
    if data is None:
        url = saved.recipe.get("data", {}).get("url")
        return (
            f"Trained on {markdown_code(url)}, which could not be read at export."
            if url
            else "The training data is not recorded."
        )
    return markdown_text(f"Trained on {data.name} (licence: {data.licence}; source: {data.source}).")


def _figures(saved: Saved) -> list[str]:
    figures = saved.facts.get("evaluation") or {}
    if not figures:
        return ["No metrics were recorded."]
    split = saved.recipe.get("data", {}).get("eval_split", "test")
    known = {markdown_text(name.replace("_", " ")): value for name, value in figures.items() if math.isfinite(value)}
    rows = [f"| {name} | {value:.4g} |" for name, value in known.items()]
    return [f"| on {markdown_code(split)} | |", "|---|---|", *rows]


VALUES = {
    "image": "pixels of 0 to 255, not divided by 255",
    "video": "pixels of 0 to 255, not divided by 255",
    "audio": "samples of -32,768 to 32,767",
    "text": "bytes + 6 between 4 (start) and 5 (end), then 0; or the ids of the model's own vocabulary",
    "series": "numbers as in the data, not normalised",
    "points": "centred coordinates in -1 to 1",
    "embeddings": "bytes, quantised as in the data",
}
"""What the numbers of a raw input mean, by its key."""


CLIENT = {
    "image": (
        "`image` also takes encoded images (JPEG, PNG, ...) as base64 texts; they are resized and cropped as in "
        "training's evaluations.",
        "BASE64",
    ),
    "text": ("`text` also takes texts, of a model of bytes.", "A text."),
}
"""What a served model takes instead of arrays, in words and in a request."""


def _use(written: Mapping[str, Any], saved: Saved) -> list[str]:
    if "inputs" in written:
        return _use_arrays(written, saved)
    if "class" in written:
        head = written["class"]
        code = [f"from transformers import {head}", "", f'model = {head}.from_pretrained(".")']
        return ["```python", *code, "```"]
    return ["```python", "import perceiver", "", 'model = perceiver.load_model("model.safetensors")', "```"]


def _use_arrays(written: Mapping[str, Any], saved: Saved) -> list[str]:
    """Return inputs, outputs and an example of a model that takes arrays: ONNX, or an MLflow model."""
    named = bool(named_classes(saved))
    rows = ["| input | type | shape | values |", "|---|---|---|---|"]
    for name, shape in written["inputs"].items():
        kind = written["dtypes"][name]
        values = VALUES.get(name, "True where there is an element" if kind == "bool" else "")
        if name in ("image", "video") and kind != "uint8":
            values = ""
        rows.append(f"| `{name}` | {kind} | {', '.join(map(str, shape))} | {values} |")
    outputs = ", ".join(f"`{name}`" for name in written["outputs"])
    lines = [*rows, "", f"Outputs: {outputs}."]
    served = "MLmodel" in written["files"]
    if "uint8" in written["dtypes"].values():
        wrong = "are refused" if served else "give a wrong result: as uint8 they are all 0 or 1"
        lines += ["", f"The model normalises the pixels itself. Pixels divided by 255 {wrong}."]
    if served:
        lines += [line for name in CLIENT if name in written["inputs"] for line in ("", CLIENT[name][0])]
        shown = {name: [CLIENT[name][1]] if name in CLIENT else "..." for name in written["inputs"]}
        body = json.dumps({"inputs": {name: values for name, values in shown.items() if name != "text_mask"}})
        code = [
            "```",
            "mlflow models serve -m . --env-manager local --port 5001",
            f"curl -H 'Content-Type: application/json' -d '{body}' http://127.0.0.1:5001/invocations",
        ]
    else:
        arrays = [
            f'    "{name}": np.zeros({tuple(1 if side == "batch" else side for side in shape)}, np.{_numpy(kind)}),'
            for (name, shape), kind in zip(written["inputs"].items(), written["dtypes"].values(), strict=True)
        ]
        json_used = named or written["outputs"] == ["prediction"]
        code = ["```python", *["import json", ""] * json_used, "import numpy as np", "import onnxruntime", ""]
        code += ["inputs = {  # one sample", *arrays, "}"]
        code += ['session = onnxruntime.InferenceSession("model.onnx")', "outputs = session.run(None, inputs)"]
        if written["outputs"] == ["prediction"]:
            code += [f'print(json.loads(session.get_modelmeta().custom_metadata_map["{TARGETS}"]), outputs[0])']
        if named:
            code += [f'classes = json.loads(session.get_modelmeta().custom_metadata_map["{CLASSES}"])']
            each = {
                "tagging": "print([classes[number] for number in np.flatnonzero(outputs[0][0] > 0)])  # above 0.5",
                "segmentation": "mask = outputs[0][0].argmax(0)  # the class of each pixel",
            }
            kind = (saved.recipe.get("task") or {}).get("kind")
            code += [each.get(str(kind), "print(classes[outputs[0][0].argmax()])")]
    return [*lines, "", *code, "```"]


def _numpy(kind: str) -> str:
    return "bool_" if kind == "bool" else kind
