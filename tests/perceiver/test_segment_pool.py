"""Pooling over segments: sizes of the published networks, and each kind of pooling against its definition."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perceiver.baselines.segment_pool import FrontConfig, mean_logits
from perceiver.config import UserError
from perceiver.factory import build_model, model_config
from perceiver.modalities.mel import MelConfig, log_mel

SMALL: dict[str, Any] = {"inputs": {"kind": "embeddings", "segments": 4, "channels": 6}, "widths": (5, 7)}
LATER = {"widths": (1024,) * 3, "norm": True, "bias": False, "attention": "sigmoid"}
YU = {"widths": (600,) * 3, "norm": True, "pool": "multi_level", "output_norm": True}
VGGISH: dict[str, Any] = {
    "kind": "mel",
    "samples": 160_000,
    "rate": 16_000,
    "window": 400,
    "fft": 512,
    "hop": 160,
    "bins": 64,
    "low": 125.0,
    "high": 7500.0,
    "log_offset": 0.01,
    "layout": "grid",
    "positions": {"kind": "none"},
}


def made(classes: int = 3, **changes: Any) -> Any:
    torch.manual_seed(0)
    return build_model(model_config({"kind": "segment_pool", **SMALL, **changes}), classes=classes).eval()


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"widths": (500,) * 3}, 1_093_554),  # Kong et al. 2018
        (LATER, 3_314_974),  # its later code
        ({**LATER, "pool": "multi_level", "shared": True}, 3_870_959),
        (YU, 2_630_619),  # Yu et al. 2018, levels 2 and 3
        ({**YU, "levels": (1, 2, 3)}, 3_543_910),
    ],
)
def test_published_sizes(changes: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        model = made(527, inputs={"kind": "embeddings"}, **changes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_front_is_vggish() -> None:
    with torch.device("meta"):
        model = made(527, inputs=VGGISH, front=FrontConfig())
        assert model.front(torch.zeros(2, 1, 1000, 64)).shape == (2, 10, 128)
    assert sum(p.numel() for p in model.front.parameters()) == 72_141_184


def by_hand(model: Any, states: list[Tensor]) -> Tensor:
    """Return the probabilities of one recording by the definition of its pooling, from states (T, C) of the layers."""
    c, top = model.config, states[-1]
    if c.pool in ("mean", "max"):
        scores = model.head(top).sigmoid()
        return scores.mean(0) if c.pool == "mean" else scores.max(0).values

    def pooled(pool: Any, state: Tensor, says: Any) -> Tensor:
        counts = pool.counts(state)
        counts = (counts.softmax(1) if c.attention == "softmax" else counts.sigmoid()).clamp(1e-7, 1 - 1e-7)
        return (counts / counts.sum(0) * says(pool.says(state))).sum(0)

    if c.pool == "attention":
        return pooled(model.pools[0], top, torch.sigmoid)
    if c.pool == "multi_level":
        parts = [
            pooled(pool, states[level - 1], torch.sigmoid) for pool, level in zip(model.pools, (1, 2), strict=True)
        ]
        return model.head(torch.cat(parts)).sigmoid()
    return model.head(model.norm_pooled(pooled(model.pools[0], top, lambda x: x)[None])[0].relu()).sigmoid()


@pytest.mark.parametrize("attention", ["softmax", "sigmoid"])
@pytest.mark.parametrize("pool", ["mean", "max", "attention", "multi_level", "feature_attention"])
def test_pooling_is_that_of_its_definition_over_the_segments_that_there_are(pool: str, attention: str) -> None:
    model = made(pool=pool, attention=attention, levels=(1, 2))
    raw = torch.randint(0, 256, (2, 4, 6), dtype=torch.uint8)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        found = model({"embeddings": raw, "embeddings_mask": mask}).sigmoid()
        for row in range(2):
            states = [raw[row][mask[row]] / 128 - 1]
            for layer in model.layers:
                states.append(nn.functional.relu(states[-1] @ layer[0].weight.T + layer[0].bias))
            torch.testing.assert_close(found[row], by_hand(model, states[1:]).to(found), rtol=1e-5, atol=1e-6)


def test_a_convex_mean_of_certain_segments_is_finite() -> None:
    logits = torch.tensor([[[200.0], [-200.0]], [[300.0], [300.0]]], requires_grad=True)
    found = mean_logits(logits, torch.tensor(0.5).log().expand(2, 2, 1))
    assert found[0].item() == pytest.approx(0) and found[1].item() == pytest.approx(300)
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_a_padding_row_without_segments_is_finite() -> None:
    for pool in ("mean", "max", "attention"):
        raw = {"embeddings": torch.zeros(1, 4, 6, dtype=torch.uint8), "embeddings_mask": torch.zeros(1, 4).bool()}
        assert made(pool=pool)(raw).isfinite().all()


def test_bytes_are_what_their_quantisation_says() -> None:
    raw = torch.tensor([[[0, 64, 128, 255, 0, 0]]], dtype=torch.uint8)
    for rule, wanted in (("unit", [-1, -0.5, 0, 127 / 128]), ("vggish", [-2, -2 + 256 / 255, -2 + 512 / 255, 2])):
        inputs = made(inputs={**SMALL["inputs"], "dequantise": rule}).inputs
        assert inputs({"embeddings": raw}, torch.float64).dense[0, 0, :4].tolist() == pytest.approx(wanted)


def vggish_spectrogram(samples: np.ndarray) -> np.ndarray:
    """Return VGGish's log-mel frames by its definition, in NumPy: whole frames, triangles in HTK mels."""
    frames = np.stack([samples[at : at + 400] for at in range(0, len(samples) - 399, 160)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    padded = np.pad(frames * window, ((0, 0), (0, 112)))
    turns = np.exp(-2j * np.pi * np.outer(np.arange(512), np.arange(257)) / 512)
    magnitude = np.abs(padded @ turns)

    def mel(hertz: float) -> float:
        return 1127 * np.log(1 + hertz / 700)

    edges = [mel(125) + (mel(7500) - mel(125)) * step / 65 for step in range(66)]
    filters = np.zeros((257, 64))
    for line in range(1, 257):
        for band in range(64):
            low, centre, high = edges[band : band + 3]
            place = mel(line * 16_000 / 512)
            filters[line, band] = max(0, min((place - low) / (centre - low), (high - place) / (high - centre)))
    return np.log(magnitude @ filters + 0.01)


def test_the_framing_is_vggishs() -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 16_000)
    wanted = vggish_spectrogram(samples)
    assert wanted.shape == (98, 64)
    found = log_mel(torch.from_numpy(samples)[None], MelConfig(**{**VGGISH, "samples": 16_000}))[0]
    np.testing.assert_allclose(found[:98].numpy(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "multi_level", "levels": (1, 3)}, r"model\.levels"),
        ({"pool": "multi_level", "levels": (1, 2), "shared": True}, r"model\.levels"),
        ({"inputs": VGGISH}, r"model\.front"),
        ({"front": {}}, r"model\.front"),
        ({"inputs": VGGISH, "front": {"frames": 2000}}, r"model\.front"),
        ({"inputs": VGGISH, "front": {"depths": (1,)}}, r"model\.front"),
        ({"inputs": {**VGGISH, "fft": 256}, "front": {}}, r"inputs\.fft"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message), torch.device("meta"):
        made(**changes)
