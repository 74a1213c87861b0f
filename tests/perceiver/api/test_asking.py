"""A general model is asked about a photograph: `perceiver predict --ask`, `perceiver.ask`, exports, served answers."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import perceiver
from perceiver.cli import cli
from perceiver.config import UserError
from perceiver.export.formats import export_onnx, export_safetensors
from perceiver.export.serving import Answers
from perceiver.export.weights import Saved, open_weights
from perceiver.factory import build_model, model_config
from tests.perceiver.test_gpv import SMALL as GPV

IO: dict[str, Any] = {
    "kind": "perceiver_io",
    "inputs": {
        "kind": "multimodal",
        "modalities": {
            "image": {"kind": "image", "size": (16, 16), "positions": {"kind": "fourier", "bands": 2}},
            "text": {"kind": "text", "length": 12, "channels": 8},
        },
    },
    "decoder": {"kind": "general", "boxes": 3, "length": 5},
    "latents": 3,
    "latent_channels": 8,
    "blocks": 1,
    "self_attends_per_block": 1,
    "heads": 2,
    "query_residual": False,
}
MODELS = {"perceiver_io": IO, "gpv": GPV}


def saved(kind: str, task: str = "general") -> Saved:
    """Return random weights of which every box is relevant."""
    torch.manual_seed(0)
    config = model_config(MODELS[kind])
    model: Any = build_model(config)
    head = model.decoder.relevance if kind == "perceiver_io" else model.detector.objectness
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([9.0, -9.0]))
    recipe = {"name": "asked", "task": {"kind": task, "skills": ["ask"]}, "model": config.model_dump(mode="json")}
    return Saved("here", dict(model.state_dict()), config, recipe)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_boxes_are_in_pixels_of_the_photograph(tmp_path, photo, kind):
    export_safetensors(saved(kind), tmp_path)
    [reply] = perceiver.ask(str(tmp_path), photo, "a task")
    assert reply.boxes.shape == (len(reply.relevance), 4) and (reply.relevance > 0.5).all()
    assert (np.diff(reply.relevance) <= 0).all(), "the most relevant first"
    # The model sees the middle 32 of 64 columns.
    centres = (reply.boxes[:, 0] + reply.boxes[:, 2]) / 2
    assert (centres > 8).all() and (centres < 56).all()
    assert reply.picture.width >= 64 and reply.picture.height > 32
    answers = Answers(open_weights(str(tmp_path)), {"kind": "general", "skills": ["ask"]})
    encoded = base64.b64encode(photo.read_bytes()).decode()
    served = answers({"image": [encoded], "text": ["a task"]})
    assert served["answer"].tolist() == [reply.answer]
    np.testing.assert_allclose(np.sort(served["relevance"][0])[::-1], reply.relevance, rtol=1e-5)


def test_the_command_prints_and_draws(tmp_path, photo):
    export_safetensors(saved("perceiver_io"), tmp_path)
    command = ["predict", str(tmp_path), str(photo), "--ask", "a task", "--to", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False)
    row = json.loads(result.stdout)
    assert row["task"] == "a task" and len(row["boxes"]) == 3
    assert Image.open(io.BytesIO(Path(row["picture"]).read_bytes())).width >= 64
    assert CliRunner().invoke(cli, command, catch_exceptions=False).stdout.count("box ") == 3


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        ("far too long a task", "photo.png", "21 tokens"),
        (" ", "photo.png", "3 to 12"),
        ("a task", "none.png", "none.png cannot be read"),
        ("a task", "text.txt", "text.txt: image 0 cannot be decoded"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, photo, task, name, message):
    export_safetensors(saved("perceiver_io"), tmp_path)
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(UserError, match=message):
        perceiver.ask(str(tmp_path), tmp_path / name, task)


def test_other_models_cannot_be_asked(tmp_path, photo):
    export_safetensors(saved("perceiver_io", "masked_language"), tmp_path)
    with pytest.raises(UserError, match="masked_language"):
        perceiver.ask(str(tmp_path), photo, "a task")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_onnx_gives_boxes_relevance_and_logits(tmp_path, kind):
    pytest.importorskip("onnxruntime")
    written = export_onnx(saved(kind), tmp_path)
    assert written["outputs"] == ["boxes", "relevance", "answer"]
    assert list(written["inputs"]) == ["image", "text", "text_mask"]
