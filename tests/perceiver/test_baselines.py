"""Every baseline trains through the same interface; which ones depend on the order of the pixels."""

from typing import Any

import pytest
import torch

from perceiver import registry
from perceiver.baselines.pointnet2 import farthest_points
from perceiver.config import UserError
from perceiver.factory import attention_maps, build_model, create_model, input_keys, model_config

FEW = {"kind": "fourier", "bands": 3}
IMAGE: dict[str, Any] = {"kind": "image", "size": (32, 32), "positions": FEW}
POINTS = {"kind": "points", "points": 60, "bands": 3}
NET = {"depths": (1, 1), "widths": (16, 32), "stem": 8}
VIT = {"width": 16, "layers": 2, "heads": 2}
LEVELS = ({"centres": 16, "radius": 0.5, "neighbours": 4, "widths": (8, 8)},)
CASES: dict[str, list[dict[str, Any]]] = {
    "resnet": [{"inputs": IMAGE, **NET}, {"inputs": POINTS, "grid": (8, 8), **NET}],
    "vit": [{"inputs": IMAGE, "patch": 8, **VIT}, {"inputs": POINTS, "grid": (10, 10), "patch": 4, **VIT}],
    "transformer": [
        {"inputs": {**IMAGE, "size": (8, 8), "resize": True}, "width": 16, "layers": 2, "heads": 2},
        {"inputs": {"kind": "text", "length": 12, "channels": 8}, "width": 16, "layers": 1, "heads": 2},
    ],
    "cnn14": [
        {
            "inputs": {
                "kind": "mel",
                "samples": 2048,
                "window": 128,
                "hop": 64,
                "bins": 16,
                "rate": 16_000,
                "layout": "grid",
                "positions": {"kind": "none"},
            },
            "widths": (4, 8, 8),
        }
    ],
    "segment_pool": [
        {"inputs": {"kind": "embeddings", "segments": 4, "channels": 6}, "widths": (5, 5), "norm": True, "pool": pool}
        for pool in ("mean", "max", "attention", "feature_attention")
    ],
    "pointnet2": [{"inputs": POINTS, "levels": LEVELS, "last": (16,), "head": (8,)}],
}

CASES["segment_pool"].append(
    {
        "inputs": CASES["cnn14"][0]["inputs"],
        "front": {"frames": 8, "widths": (4, 6), "depths": (1, 2), "hidden": (9,), "channels": 5},
        "widths": (6, 6),
        "pool": "multi_level",
        "levels": (1, 2),
        "norm": True,
        "output_norm": True,
    }
)
MEL = CASES["cnn14"][0]["inputs"]
VIDEO = {"kind": "video", "frames": 4, "size": (16, 16), "channels": 1, "patch": (1, 1, 1), "mean": [0], "std": [1]}
CASES["audio_resnet"] = [{"inputs": MEL, "stem": 4, "simple": 6, "depths": (1, 2), "widths": (8, 12)}]
CASES["r2plus1d"] = [
    {"inputs": {**VIDEO, "positions": {"kind": "none"}}, "stem": (4, 6), "depths": (1, 2), "widths": (8, 12)}
]
BRANCHES = {
    "audio": {"kind": "audio_resnet", **CASES["audio_resnet"][0]},
    "video": {"kind": "r2plus1d", **CASES["r2plus1d"][0]},
}
CASES["late_fusion"] = [
    {"branches": BRANCHES, "combine": combine, "hidden": hidden}
    for combine, hidden in (("average", ()), ("regression", ()), ("attention", (7,)), ("joint", (7, 7)))
]


def build(kind: str, values: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return build_model(model_config({"kind": kind, **values}), classes=3)


def test_every_baseline_has_a_case():
    """GPV-1 is no classifier: see `test_gpv`."""
    assert {*CASES, "gpv"} == set(registry.members("perceiver.baselines"))


@pytest.mark.parametrize(("kind", "values"), [(k, v) for k, cases in CASES.items() for v in cases])
def test_contract(kind, values):
    model = build(kind, values)
    raw = {
        key: torch.randn_like(x) if x.is_floating_point() else torch.randint_like(x, 0, 99)
        for key, x in model.example(4, "cpu").items()
    }
    assert input_keys(model) == tuple(raw)
    logits = model(raw if len(raw) > 1 else next(iter(raw.values())))
    assert logits.shape == (4, 3)
    logits.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing, missing
    assert attention_maps(model, raw) == []


@pytest.mark.parametrize(("kind", "indifferent"), [("transformer", True), ("resnet", False), ("vit", False)])
def test_permuted_pixels(kind, indifferent):
    values = CASES[kind][0]
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    outs = []
    for permute in (None, 5):
        model = build(kind, {**values, "inputs": {**values["inputs"], "permute": permute}}).eval()
        if kind == "transformer":
            torch.nn.init.normal_(model.head.weight)
        with torch.no_grad():
            outs.append(model(pixels))
    assert torch.allclose(outs[0], outs[1], rtol=1e-3, atol=1e-4) == indifferent


def test_transformer_ignores_padding():
    model = build("transformer", CASES["transformer"][1]).double().eval()
    torch.nn.init.normal_(model.head.weight)
    ids = torch.randint(0, 200, (2, 7))
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.int64)], 1)
    mask = torch.arange(11).expand(2, -1) < 7
    torch.testing.assert_close(model({"text": padded, "text_mask": mask}), model(ids))


def test_farthest_points_by_hand():
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [10, 0, 0], [4, 0, 0], [9, 0, 0]]])
    assert farthest_points(line, 4).tolist() == [[0, 2, 3, 1]]


def test_images_only_where_there_is_one():
    with pytest.raises(UserError, match=r"model\.grid"):
        build("vit", {"inputs": POINTS, **VIT})
    with pytest.raises(UserError, match="kind points"):
        build("pointnet2", {"inputs": IMAGE})


def test_cnn14_halves_frames_and_bins_as_published():
    """Kong et al.: 1,001 frames of 64 bins for 10 s, a rest left out at each pooling."""
    sizes = []
    with torch.device("meta"):
        model: Any = create_model("cnn14_audioset", device="meta").eval()
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
        assert model(model.example(2, "meta")).shape == (2, 527)
    assert sizes == [(1001, 64), (500, 32), (250, 16), (125, 8), (62, 4), (31, 2)]


def test_cnn14_needs_a_frame_and_a_bin_after_each_halving():
    with pytest.raises(UserError, match=r"32 frames of 16 bins for 6 blocks.*model\.widths"):
        build("cnn14", {**CASES["cnn14"][0], "widths": (4,) * 6})
