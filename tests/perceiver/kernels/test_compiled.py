"""Compiled layers are the same function; where they cannot be compiled, training goes on without."""

import pickle
from typing import Any, cast

import pytest
import torch

from perceiver.factory import build_model, model_config
from perceiver.kernels import compiled
from perceiver.kernels.compiled import CompiledLayers
from perceiver.model import Encoder
from perceiver.train.engine.protocol import Compile, set_layers

SMALL: dict[str, Any] = {
    "inputs": {"kind": "image", "size": [8, 8]},
    "latents": 8,
    "latent_channels": 16,
    "heads": 2,
    "self_attends_per_block": 2,
}
MODELS = {
    "shared": {"kind": "perceiver", "cross_attends": 3},
    "checkpointed": {"kind": "perceiver", "cross_attends": 2, "checkpoint_activations": True},
    "absorbed": {"kind": "perceiver", "cross_attends": 2, "attention": "absorbed"},
    "io": {"kind": "perceiver_io", "blocks": 2},
}
IMAGES = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def model_of(name: str) -> Encoder:
    torch.manual_seed(0)
    model = build_model(model_config({**SMALL, **MODELS[name]}), classes=5)
    for param in model.parameters():
        if param.dim() > 1:
            torch.nn.init.normal_(param, std=0.05)
    return cast(Encoder, model)


def gradients(model: Encoder) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IMAGES).square().sum().backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_uncompiled_model(name):
    torch.compiler.reset()
    model = model_of(name)
    wanted = gradients(model)
    model.compiled = CompiledLayers("aot_eager")
    for _ in range(2):
        got = gradients(model)
        assert got.keys() == wanted.keys()
        for key, gradient in wanted.items():
            torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-5)
    assert model.compiled.works
    assert model.state_dict().keys() == model_of(name).state_dict().keys()


def test_each_kind_of_layer_is_compiled_once():
    torch.compiler.reset()
    graphs = []

    def backend(module: Any, example: Any) -> Any:
        graphs.append(module)
        return module.forward

    model = model_of("shared")
    model.compiled = CompiledLayers(cast(Any, backend))
    for _ in range(2):
        model(IMAGES).sum().backward()
    # 6 self-attends, and cross-attends that read into the initial latents and into those of the batch.
    assert len(graphs) == 3


def test_evaluation_is_not_compiled():
    torch.compiler.reset()
    model = model_of("shared")
    model.compiled = CompiledLayers("aot_eager")
    with torch.no_grad():
        model(IMAGES)
    assert model.compiled.works is None


def test_a_compiler_that_fails_is_reported_once_and_not_used(caplog):
    torch.compiler.reset()

    def broken(module: Any, example: Any) -> Any:
        raise RuntimeError("no C compiler\nmore")

    model = model_of("shared")
    wanted = gradients(model)
    model.compiled = CompiledLayers(cast(Any, broken))
    got = gradients(model)
    for key, gradient in wanted.items():
        torch.testing.assert_close(got[key], gradient)
    (record,) = [record for record in caplog.records if record.name == compiled.__name__]
    assert "train.compile: layers run uncompiled" in record.getMessage() and "\n" not in record.getMessage()


def test_a_backward_pass_that_cannot_be_compiled_is_found_in_the_first_forward_pass(caplog):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
            return out.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            raise RuntimeError("no Triton")

    def backend(module: Any, example: Any) -> Any:
        return lambda *args: [Broken.apply(out) for out in module.forward(*args)]

    torch.compiler.reset()
    model = model_of("shared")
    wanted = gradients(model)
    model.compiled = CompiledLayers(backend)
    got = gradients(model)
    assert model.compiled.works is False and "layers run uncompiled" in caplog.text
    for key, gradient in wanted.items():
        torch.testing.assert_close(got[key], gradient)


def test_many_models_in_a_process_and_a_pickled_one():
    torch.compiler.reset()
    counted = []

    def backend(module: Any, example: Any) -> Any:
        counted.append(module)
        return module.forward

    for number in range(4):
        model = model_of("shared")
        model.compiled = CompiledLayers(backend)
        model(IMAGES).sum().backward()
        assert len(counted) == 3 * (number + 1)
    assert pickle.loads(pickle.dumps(CompiledLayers("aot_eager"))).works is None


def test_an_error_of_the_model_is_raised():
    torch.compiler.reset()
    model = model_of("shared")
    model.compiled = CompiledLayers("aot_eager")
    layer = cast(Any, model.blocks)[0][0]
    layer.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="shape"):
        model(IMAGES)


@pytest.mark.parametrize(
    ("value", "stage", "device", "wanted"),
    [
        ("auto", 1, "cpu", False),
        ("auto", 2, "cuda", True),
        ("auto", 3, "cuda", False),
        (True, 1, "cpu", True),
        (False, 0, "cuda", False),
    ],
)
def test_when_layers_are_compiled(value: Compile, stage, device, wanted):
    model = model_of("io")
    set_layers(model, value, half_residual=True, zero_stage=stage, device=torch.device(device))
    assert (model.compiled is not None) == wanted
    assert model.half_residual


def test_a_bf16_residual_keeps_the_latents_in_bf16_and_is_close():
    model = model_of("shared")
    seen: list[torch.dtype] = []
    cast(Any, model.blocks)[0][0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    wanted = model(IMAGES)
    model.half_residual = True
    assert torch.equal(model(IMAGES), wanted)  # without autocast it has no effect
    with torch.autocast("cpu", torch.bfloat16):
        got = model(IMAGES)
    assert seen == [torch.float32] * 6 + [torch.bfloat16] * 3
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)
