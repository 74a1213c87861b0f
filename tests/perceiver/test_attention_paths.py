"""The fast cross-attentions equal the plain one: same outputs, same gradients of every parameter."""

import pytest
import torch
from torch import nn

from perceiver.attention import CrossAttend, CrossAttention, choose_path
from perceiver.config import UserError
from perceiver.factory import attention_maps, build_model, input_maps, model_config
from perceiver.positions import Grid, Inputs, grid_tables


def inputs_of(shape: tuple[int, ...], data: int, *, trained: bool = False, dtype=torch.float64) -> Inputs:
    elements = torch.Size(shape).numel()
    values = torch.randn(2, elements, data, dtype=dtype, requires_grad=trained)
    table = grid_tables(shape, 3, tuple(float(s) for s in shape), dtype, torch.device("cpu"))
    return Inputs(values, Grid(shape, table))


def layer_for(inputs: Inputs, **options) -> CrossAttend:
    torch.manual_seed(1)
    layer = CrossAttend(CrossAttention(10, inputs.channels, **options)).to(inputs.data.dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def outputs_and_gradients(layer: CrossAttend, query: torch.Tensor, inputs: Inputs, kind: str):
    layer.attention.kind = kind  # type: ignore[assignment]
    layer.zero_grad()
    query = query.clone().requires_grad_()
    leaves = [query, *layer.parameters()]
    if inputs.data.requires_grad:
        leaves.append(inputs.data)
    fresh = Inputs(inputs.data, inputs.grid, inputs.mask, inputs.order)
    out = layer(query, fresh)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weight).sum(), leaves)


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (11,), (1, 9)])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["absorbed", "separable"])
def test_fast_path_equals_plain_path(shape, heads, kind):
    inputs = inputs_of(shape, 3)
    layer = layer_for(inputs, heads=heads, qk_channels=12, v_channels=8)
    query = torch.randn(2, 6, 10, dtype=torch.float64)
    expected, gradients = outputs_and_gradients(layer, query, inputs, "plain")
    got, fast = outputs_and_gradients(layer, query, inputs, kind)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(fast, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_absorbed_path_with_trained_inputs(masked):
    inputs = inputs_of((4, 6), 5, trained=True)
    if masked:
        inputs.mask = torch.rand(2, 24) > 0.4
        inputs.mask[1] = False
    layer = layer_for(inputs)
    query = torch.randn(2, 6, 10, dtype=torch.float64)
    expected, gradients = outputs_and_gradients(layer, query, inputs, "plain")
    got, fast = outputs_and_gradients(layer, query, inputs, "absorbed")
    rows = slice(0, 1) if masked else slice(None)
    torch.testing.assert_close(got[rows], expected[rows], rtol=1e-10, atol=1e-10)
    if not masked:
        for a, b in zip(fast, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert got.isfinite().all()


def test_float32_within_1e_4_of_float64():
    inputs = inputs_of((28, 28), 1)
    layer = layer_for(inputs)
    query = torch.randn(2, 6, 10, dtype=torch.float64)
    expected, gradients = outputs_and_gradients(layer, query, inputs, "plain")
    layer.float()
    assert inputs.grid is not None
    single = Inputs(inputs.data.float(), Grid(inputs.grid.shape, inputs.grid.table.float()))
    got, fast = outputs_and_gradients(layer, query.float(), single, "separable")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(fast, gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max().clamp(min=1)))


def test_tiles_do_not_change_the_result(monkeypatch):
    inputs = inputs_of((7, 5), 3)
    layer = layer_for(inputs)
    query = torch.randn(2, 6, 10, dtype=torch.float64)
    for kind in ("absorbed", "separable"):
        expected, gradients = outputs_and_gradients(layer, query, inputs, kind)
        monkeypatch.setattr("perceiver.kernels.shared_kv.CPU_SCORES", 35 * 4)
        got, fast = outputs_and_gradients(layer, query, inputs, kind)
        monkeypatch.undo()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(fast, gradients)


def test_choice_of_path():
    sizes = {"queries": 512, "qk_channels": 261, "v_channels": 261}
    grid = Grid((224, 224), torch.zeros(448, 258))
    data = torch.zeros(1, 224 * 224, 3)
    assert choose_path("auto", Inputs(data, grid), heads=1, **sizes) == "separable"
    assert choose_path("plain", Inputs(data, grid), heads=1, **sizes) == "plain"
    assert choose_path("auto", Inputs(torch.zeros(1, 2048, 387)), heads=1, **sizes) == "absorbed"
    assert (
        choose_path("auto", Inputs(torch.zeros(1, 2048, 768)), heads=8, queries=256, qk_channels=256, v_channels=1280)
        == "plain"
    )
    trained = Inputs(data.requires_grad_(), grid)
    assert choose_path("auto", trained, heads=1, **sizes) == "absorbed"
    with pytest.raises(UserError, match="separable"):
        choose_path("separable", trained, heads=1, **sizes)


def small(**changes) -> dict:
    inputs = {
        "kind": "image",
        "channels": 1,
        "size": [8, 6],
        "mean": [0.1],
        "std": [0.3],
        "positions": {"kind": "fourier", "bands": 3},
    }
    values = {
        "kind": "perceiver",
        "inputs": inputs,
        "latents": 5,
        "latent_channels": 8,
        "cross_attends": 3,
        "self_attends_per_block": 2,
        "heads": 2,
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"share": "none"},
        {"share": "all"},
        {"placement": "start"},
        {"blocks": 5},
        {"cross_heads": 2, "cross_qk_channels": 4},
        {"checkpoint_activations": True},
    ],
)
def test_whole_model_plain_and_fast_agree(change):
    pixels = torch.randint(0, 256, (3, 1, 8, 6), dtype=torch.uint8)
    results = []
    for kind in ("plain", "auto"):
        torch.manual_seed(0)
        model = build_model(model_config(small(attention=kind, latent_init_std=1.0, **change)), classes=4).double()
        nn.init.normal_(model.head.weight)  # type: ignore[arg-type]
        out = model(pixels)
        out.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(g is not None for g in gradients.values())
        results.append((out, gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "inputs",
    [
        small()["inputs"],
        {**small()["inputs"], "positions": {"kind": "learned", "channels": 9}},
        {"kind": "points", "points": 70, "bands": 5, "max_resolution": 20},
        {"kind": "audio", "samples": 320, "patch": 4, "positions": {"kind": "fourier", "bands": 3}},
    ],
)
@pytest.mark.parametrize("kind", ["perceiver", "perceiver_io"])
def test_whole_model_in_float32_by_kernels_is_the_plain_one_in_float64(inputs, kind, monkeypatch):
    """Every kernel that this machine has, whatever the size: outputs and the gradient of every parameter."""
    monkeypatch.setattr("perceiver.kernels.attend.MIN_SCORES", 1)
    monkeypatch.setattr("perceiver.kernels.dense.MIN_PRODUCT", 1)
    values = {
        "kind": kind,
        "inputs": inputs,
        "latents": 20,
        "latent_channels": 32,
        "heads": 2,
        "self_attends_per_block": 2,
        "latent_init_std": 1.0,
    }
    results = []
    for attention, dtype in (("plain", torch.float64), ("auto", torch.float32)):
        torch.manual_seed(0)
        model = build_model(model_config({**values, "attention": attention}), classes=4)
        for name, parameter in model.named_parameters():
            if "head" in name:
                nn.init.normal_(parameter)
        model.to(dtype)
        raw = next(iter(model.example(3, "cpu").values()))  # type: ignore[operator]
        torch.manual_seed(1)
        out = model(torch.rand(raw.shape))
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    # The key biases' true gradient is zero: they are compared with the largest gradient.
    largest = max(float(t.abs().max()) for t in results[0][1:])
    for expected, got in zip(*results, strict=True):
        scale = max(1e-3 * largest, float(expected.detach().abs().max()))
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4 * scale)


def test_attention_maps_sum_to_one_in_order():
    model = build_model(model_config(small()), classes=4)
    maps = attention_maps(model, torch.randint(0, 256, (3, 1, 8, 6), dtype=torch.uint8))
    assert [tuple(m.shape) for m in maps] == [(3, 1, 5, 48)] * 3
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(3, 1, 5))


def test_scores_are_those_before_the_softmax_in_the_order_of_the_grid():
    pixels = torch.randint(0, 256, (3, 1, 8, 6), dtype=torch.uint8)
    found = []
    for permute in (None, 3):
        torch.manual_seed(0)
        values = small(cross_heads=3, latent_init_std=1.0)
        values["inputs"] = {**values["inputs"], "permute": permute}
        model = build_model(model_config(values), classes=4)
        found.append(attention_maps(model, pixels, scores=True))
        for weights, scores in zip(attention_maps(model, pixels), found[-1], strict=True):
            assert scores.shape == weights.shape and scores.min() < 0
            torch.testing.assert_close(scores.softmax(-1), weights)
    for plain, permuted in zip(*found, strict=True):
        torch.testing.assert_close(plain, permuted)


def test_maps_have_the_grids_of_their_modalities():
    """Elements are numbered by row, so that a map of their numbers shows where each is."""
    video = {"kind": "video", "frames": 4, "channels": 1, "size": (8, 6), "patch": (2, 2, 2), "mean": [0], "std": [1]}
    mel = {"kind": "mel", "samples": 64, "rate": 100, "window": 16, "hop": 16, "bins": 3, "low": 5, "high": 50}
    parts = {"a": mel, "b": {"kind": "text", "length": 5}, "c": video}
    model = build_model(model_config(small(inputs={"kind": "multimodal", "modalities": parts})), classes=4)
    maps = input_maps(model, torch.arange(12 + 5 + 24)[None])
    assert {name: tuple(each.shape) for name, each in maps.items()} == {"a": (1, 3, 4), "c": (1, 2, 4, 3)}
    assert maps["a"][0, :, 0].tolist() == [2, 1, 0] and maps["a"][0, 2].tolist() == [0, 3, 6, 9]
    assert maps["c"].flatten().tolist() == list(range(17, 41))
    learned = {**small()["inputs"], "positions": {"kind": "learned", "channels": 4, "init_std": 1.0}}
    model = build_model(model_config(small(inputs=learned)), classes=4)
    scores = attention_maps(model, {"image": torch.zeros(1, 1, 8, 6)}, scores=True)
    assert input_maps(model, scores[0])["image"].shape == (1, 1, 5, 8, 6)
    text = build_model(model_config(small(inputs={"kind": "text", "length": 5})), classes=4)
    assert input_maps(text, torch.zeros(1, 5)) == {}


def test_permuted_pixels_leave_the_perceiver_unchanged():
    pixels = torch.randint(0, 256, (2, 1, 8, 6), dtype=torch.uint8)
    outs = []
    for permute in (None, 3):
        for kind in ("plain", "absorbed", "auto"):
            torch.manual_seed(0)
            values = small(attention=kind, latent_init_std=1.0)
            values["inputs"] = {**values["inputs"], "permute": permute}
            model = build_model(model_config(values), classes=4).double()
            outs.append(model.encode(pixels))  # type: ignore[operator]
    for other in outs[1:]:
        torch.testing.assert_close(other, outs[0], rtol=1e-9, atol=1e-9)


def test_permutation_moves_the_elements():
    values = small()
    values["inputs"] = {**values["inputs"], "permute": 3}
    model = build_model(model_config(values), classes=4)
    _, inputs = model.read(torch.randint(0, 256, (2, 1, 8, 6), dtype=torch.uint8))  # type: ignore[operator]
    straight = Inputs(inputs.data, inputs.grid).dense
    assert not torch.equal(inputs.dense, straight)
    assert torch.equal(inputs.dense[:, inputs.order.argsort()], straight)


@pytest.mark.parametrize("kind", ["plain", "absorbed", "separable"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_close_to_float32(kind, autocast):
    """Weights in bfloat16, or float32 weights under autocast: within bfloat16's rounding, gradients of its type."""
    pixels = torch.randint(0, 256, (3, 1, 8, 6), dtype=torch.uint8)
    torch.manual_seed(0)
    model = build_model(model_config(small(attention=kind, latent_init_std=1.0)), classes=4)
    nn.init.normal_(model.head.weight)  # type: ignore[arg-type]
    expected = model(pixels)
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = model(pixels)
    got.float().square().sum().backward()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1 * float(expected.detach().abs().max()))
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.slow
def test_full_size_separable_within_1e_4_of_plain():
    """The paper's ImageNet cross-attend, float32: outputs and every gradient, relative to the largest value.

    The key bias, whose true gradient is zero, is compared by absolute size.
    """
    table = grid_tables((224, 224), 64, (224.0, 224.0), torch.float32, torch.device("cpu"))
    inputs = Inputs(torch.randn(1, 224 * 224, 3), Grid((224, 224), table))
    torch.manual_seed(0)
    layer = CrossAttend(CrossAttention(1024, 261))
    query = torch.randn(1, 512, 1024)
    expected, gradients = outputs_and_gradients(layer, query, inputs, "plain")
    got, fast = outputs_and_gradients(layer, query, inputs, "separable")
    for a, b in zip((got, *fast), (expected, *gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(float(b.detach().abs().max()), 0.1))
