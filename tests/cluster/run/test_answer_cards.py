"""The report draws flow, filled-in words and reconstructions beside what stood there."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from PIL import Image

from cluster.recipe.config import Recipe, build_recipe
from cluster.record.run_folder import WEIGHTS, RunFolder
from cluster.run.report import build_report
from perceiver.factory import build_model
from perceiver.tasks.masked_language import MaskedLanguage
from pipelines.features import FlowFeature, LabelFeature, MediaFeature
from pipelines.shards.manifest import Manifest
from pipelines.sources.moving_photos import flo
from pipelines.transforms.optical_flow import pack
from tests.cluster.run.test_report import KINDS, folder, written
from tests.perceiver.report.pages import Page
from tests.pipelines.recordings import media_file, ramp

assert folder, "the fixture"
FEW = {"kind": "fourier", "bands": 2}
IO = {"kind": "perceiver_io", "latents": 4, "latent_channels": 8, "blocks": 1, "self_attends_per_block": 1, "heads": 2}


def page_of(recipe: Recipe, folder: RunFolder, manifest: Manifest) -> Page:
    """Write the report of a run with random weights."""
    torch.manual_seed(0)
    model = build_model(recipe.model, classes=2)
    folder.write(WEIGHTS, safetensors.torch.save(model.state_dict()))
    build_report(recipe, folder, manifest, {}, {})
    return Page((folder.local / "report" / "index.html").read_text())


def png(value: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 255, (8, 8, 3), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def test_flow_is_drawn_beside_the_true_one(
    folder: RunFolder, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = pack([png(0), png(1), flo(np.full((8, 8, 2), (3, 4), np.float32))], "flo")
    monkeypatch.setitem(KINDS, "flow", (FlowFeature(size=(8, 8)), lambda _: stored))
    recipe, manifest = written(tmp_path, "flow", tree, LabelFeature())
    inputs = {"kind": "flow_frames", "size": [8, 8], "positions": FEW, "normalise": "pair"}
    model = IO | {"inputs": inputs, "decoder": {"kind": "flow"}, "query_residual": False}
    recipe = build_recipe(tree | {"data": {"url": recipe.data.url}, "model": model, "task": {"kind": "flow"}})
    found = page_of(recipe, folder, manifest)
    notes = [word for tag, word in found.texts if word.startswith("end-point error")]
    assert notes == ["end-point error 5 pixels; of no motion 5"] * 6, "an untrained model predicts no motion"
    strips = [row["src"] for row in found.all("img") if row.get("class") == "strip"]
    with Image.open(io.BytesIO(base64.b64decode(strips[0].partition(",")[2]))) as strip:
        assert strip.width > 4 * strip.height * 0.95, "two frames, true flow, predicted flow"
        right = np.asarray(strip.convert("RGB"))[:, -strip.height // 2 :]
        assert (right > 240).all(), "no motion is white"


def test_masked_words_are_filled_and_marked(
    folder: RunFolder, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, manifest = written(tmp_path, "text", tree, LabelFeature())
    inputs = {"kind": "text", "length": 40, "channels": 8}
    model = IO | {"inputs": inputs, "decoder": {"kind": "tokens"}, "query_residual": False}
    task = {"kind": "masked_language", "probability": 0.5}
    data = {"url": recipe.data.url, "text_length": 40}
    recipe = build_recipe(tree | {"data": data, "model": model, "task": task})

    def right_but_one(self: MaskedLanguage, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Answer `the words of` and a wrong last letter, whatever the number was."""
        assert (batch["text"] == 3).any() and "sample_id" in batch
        ids = torch.zeros_like(batch["text"])
        ids[0, 1:15] = torch.tensor([byte + 6 for byte in b"the words of X"])
        return {"prediction": ids}

    monkeypatch.setattr(MaskedLanguage, "predict", right_but_one)
    found = page_of(recipe, folder, manifest)
    states = [row["class"] for row in found.all("span") if row.get("class") in ("right", "wrong")]
    marks = [(row["title"], state) for row, state in zip(found.all("b"), states, strict=True)]
    assert {words.removeprefix("was: ") for words, state in marks if state == "right"} == {"the", "words", "of"}
    wrong = {words.removeprefix("was: ") for words, state in marks if state == "wrong"}
    assert wrong and wrong <= {*"012345"}
    assert "masked words are right" in found.text and "words were masked" in found.text


def test_recordings_are_shown_and_played_with_their_reconstructions(
    folder: RunFolder, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = media_file([0, 100, 200, 300], [10, 90, 170, 250], sound=ramp(0.4, 8000), rate=8000, size=(8, 8))
    monkeypatch.setitem(KINDS, "media", (MediaFeature(channels=1, size=(8, 8)), lambda _: film))
    recipe, manifest = written(tmp_path, "media", tree, LabelFeature())
    audio = {"kind": "audio", "samples": 3200, "patch": 16, "positions": FEW}
    video = {"kind": "video", "frames": 4, "channels": 1, "size": [8, 8], "patch": [1, 4, 4], "positions": FEW}
    video |= {"mean": [0.0], "std": [1.0]}
    outputs = {
        "audio": {"grid": [200], "values": 16, "bands": 3, "max_resolution": [200]},
        "video": {"grid": [4, 8, 8], "values": 1, "bands": 3, "max_resolution": [4, 8, 8]},
        "label": {"classes": 2, "channels": 10},
    }
    model = IO | {
        "inputs": {"kind": "multimodal", "modalities": {"audio": audio, "video": video}},
        "decoder": {"kind": "multimodal", "answer_channels": 8, "modalities": outputs},
        "query_residual": False,
    }
    data = {"url": recipe.data.url, "audio": {"rate": 8000, "samples": 3200}, "video": {"frames": 4, "fps": 10}}
    recipe = build_recipe(tree | {"data": data, "model": model, "task": {"kind": "autoencoding"}})
    found = page_of(recipe, folder, manifest)
    players = [row["src"] for row in found.all("audio")]
    assert len(players) == 12, "original and reconstruction of six samples"
    sound, rate = soundfile.read(io.BytesIO(base64.b64decode(players[0].partition(",")[2])), dtype="int16")
    assert rate == 8000 and len(sound) == 3200 and sound[0] != sound[-1]
    notes = [word for _, word in found.texts if " dB" in word]
    assert len(notes) == 6 and all("video" in word and "audio" in word and "class" in word for word in notes)
    strip = next(row["src"] for row in found.all("img") if row["alt"] == "original, made")
    with Image.open(io.BytesIO(base64.b64decode(strip.partition(",")[2]))) as image:
        shades = np.asarray(image.convert("L"))[30, 30::68][:4]
        assert shades.tolist() == pytest.approx([10, 90, 170, 250], abs=3), "the frames in order, above"
