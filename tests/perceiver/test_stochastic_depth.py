"""Layers that training skips at random: against a loop over single samples."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver.attention import CrossAttend
from perceiver.factory import build_model, model_config

SMALL: dict[str, Any] = {
    "inputs": {"kind": "image", "size": [6, 6]},
    "latents": 3,
    "latent_channels": 8,
    "latent_init_std": 1.0,
    "heads": 2,
    "self_attends_per_block": 2,
}
IO = {"kind": "perceiver_io", "blocks": 3, "share_blocks": True}
PERCEIVER = {"kind": "perceiver", "cross_attends": 3}
ROWS, RATE = 16, 0.6


def built(kind: dict[str, Any], **changes: Any) -> Any:
    torch.manual_seed(0)
    return build_model(model_config({**SMALL, **kind, **changes}), classes=4)


def encoded(model: Any, raw: Tensor, seed: int = 7) -> Tensor:
    torch.manual_seed(seed)
    out = model.encode(raw)
    return out if isinstance(out, Tensor) else out[0]


def applied(model: Any) -> list[nn.Module]:
    """Return the layers in the order of the papers: 3 cross-attends and blocks, or one and 3 blocks."""
    block = list(model.blocks[0])
    if hasattr(model, "encoder"):
        return [model.encoder, *block, *block, *block]
    first, rest = model.cross_attends
    return [first, *block, rest, *block, rest, *block]


@pytest.mark.parametrize("kind", [PERCEIVER, IO])
def test_each_sample_skips_layers_by_the_linear_rule(kind: dict[str, Any]) -> None:
    raw = torch.rand(ROWS, 3, 6, 6)
    model = built(kind, stochastic_depth=RATE).train()
    layers = applied(model)
    found = encoded(model, raw)
    torch.manual_seed(7)
    drawn = [None if number == 0 else torch.rand(ROWS, 1, 1).flatten() for number in range(len(layers))]
    skipped = 0
    for row in range(ROWS):
        x, inputs = model.read(raw[row : row + 1])
        for number, (layer, draws) in enumerate(zip(layers, drawn, strict=True)):
            rate = RATE * number / (len(layers) - 1)
            y = layer(x, inputs) if isinstance(layer, CrossAttend) else layer(x)
            if draws is None:
                x = y
            elif draws[row] >= rate:
                x = x + (y - x) / (1 - rate)
            else:
                skipped += 1
        torch.testing.assert_close(found[row : row + 1], x, rtol=1e-4, atol=1e-5)
    assert 0.15 < skipped / (ROWS * len(layers)) < 0.45  # the mean of the rates is 0.3


@pytest.mark.parametrize("kind", [PERCEIVER, IO])
def test_evaluation_uses_all_layers_and_the_parameters_are_the_same(kind: dict[str, Any]) -> None:
    raw = torch.rand(2, 3, 6, 6)
    usual, model = built(kind), built(kind, stochastic_depth=RATE)
    assert [tensor.shape for tensor in usual.parameters()] == [tensor.shape for tensor in model.parameters()]
    assert torch.equal(encoded(usual.eval(), raw), encoded(model.eval(), raw))
    assert torch.equal(encoded(usual.train(), raw), encoded(usual.eval(), raw))
    assert not torch.equal(encoded(model.train(), raw), encoded(model.eval(), raw))


def test_recomputed_layers_are_the_ones_that_were_skipped() -> None:
    raw, grads = torch.rand(ROWS, 3, 6, 6), []
    for recomputed in (False, True):
        model = built(PERCEIVER, stochastic_depth=RATE, checkpoint_activations=recomputed).train()
        encoded(model, raw).square().sum().backward()
        grads.append({name: param.grad for name, param in model.named_parameters() if param.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])
