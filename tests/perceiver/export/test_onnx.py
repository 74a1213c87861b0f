"""ONNX of each kind of output, with inputs and outputs of distinct names."""

import typing
from typing import Any

import pytest
import torch

from perceiver.config import Config
from perceiver.decoders import DecoderConfig
from perceiver.export.formats import _output_names, example, export_onnx
from perceiver.export.weights import Saved
from perceiver.factory import build_model, model_config

FEW = {"kind": "fourier", "bands": 2}
IMAGE: dict[str, Any] = {"kind": "image", "size": [4, 4], "positions": FEW}
TEXT: dict[str, Any] = {"kind": "text", "vocabulary": 20, "length": 6, "channels": 8}
FRAMES: dict[str, Any] = {"kind": "flow_frames", "size": [3, 4], "front_end_channels": 4, "positions": FEW}
SIGNALS: dict[str, Any] = {
    "kind": "multimodal",
    "modalities": {
        "audio": {"kind": "audio", "samples": 16, "patch": 4, "positions": FEW},
        "video": {"kind": "video", "frames": 2, "size": [2, 2], "patch": [1, 2, 2], "positions": FEW},
        "label": {"kind": "label", "classes": 3},
    },
    "mask": {"label": 0.5},
}
ANSWERS: dict[str, Any] = {
    "kind": "multimodal",
    "answer_channels": 8,
    "modalities": {
        "audio": {"grid": [4], "values": 4, "bands": 2, "max_resolution": [4]},
        "video": {"grid": [2, 2, 2], "values": 3, "bands": 2, "max_resolution": [2, 2, 2]},
        "label": {"classes": 3, "channels": 6},
    },
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "class": (IMAGE, {"kind": "class"}, ["output"]),
    "multitask": (IMAGE, {"kind": "multitask", "tasks": {"image": 3, "kind": 2}}, ["image_output", "kind"]),
    "tokens": (TEXT, {"kind": "tokens"}, ["output"]),
    "tokens by inputs": (TEXT, {"kind": "tokens", "queries": "inputs"}, ["output"]),
    "flow": (FRAMES, {"kind": "flow"}, ["output"]),
    "flow of normalised pairs": ({**FRAMES, "normalise": "pair"}, {"kind": "flow"}, ["output"]),
    "pixels": (IMAGE, {"kind": "pixels"}, ["output"]),
    "multimodal": (SIGNALS, ANSWERS, ["audio_output", "label_output", "video_output"]),
    "general": (
        {"kind": "multimodal", "modalities": {"image": IMAGE, "text": TEXT}},
        {"kind": "general", "boxes": 2, "length": 3},
        ["boxes", "relevance", "text_output"],
    ),
    "autoencoding": ({**SIGNALS, "hide": ["label"]}, ANSWERS, ["audio_output", "label", "video_output"]),
}
"""Inputs, decoder and names of the outputs."""
EXPORTED = ("multitask", "tokens by inputs", "flow of normalised pairs", "pixels", "autoencoding")
"""The others: test_formats.py exports a classifier and a language model; `autoencoding` has the multimodal decoder."""


def test_each_kind_of_output_is_tested():
    kinds = [config.model_fields["kind"].default for config in typing.get_args(typing.get_args(DecoderConfig)[0])]
    assert set(kinds) <= CASES.keys()


def test_each_output_is_named():
    for inputs, decoder, names in CASES.values():
        model = build_model(config_of(inputs, decoder), classes=3).eval()
        raw = example(model, 2)
        assert _output_names(model(dict(raw)), raw) == names


def config_of(inputs: dict[str, Any], decoder: dict[str, Any]) -> Config:
    values = {"kind": "perceiver_io", "inputs": inputs, "decoder": decoder, "latents": 3, "latent_channels": 8}
    sizes = {"blocks": 1, "self_attends_per_block": 1, "heads": 2, "query_residual": False}
    return model_config(values | sizes)


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED)
def test_a_head_is_exported(tmp_path, case):
    pytest.importorskip("onnxruntime")
    inputs, decoder, names = CASES[case]
    config = config_of(inputs, decoder)
    torch.manual_seed(0)
    model = build_model(config, classes=3)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    written = export_onnx(Saved("here", dict(model.state_dict()), config), tmp_path)
    assert written["outputs"] == names
    assert written["max_difference"] <= written["tolerance"]


def test_an_output_with_the_name_of_an_input_gets_another():
    assert _output_names({"a": 0, "a_output": 0, "b": 0}, {"a"}) == ["a_output_output", "a_output", "b"]
