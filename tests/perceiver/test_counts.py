"""Parameter counts of the papers' models, to the unit."""

import functools
import re
from typing import Any

import pytest
import torch

import perceiver
from perceiver.accounting import account, count_activation_bytes, count_flops, count_parameters, preset_cost
from perceiver.config import UserError
from perceiver.factory import build_model, model_config, on_meta, preset_config
from perceiver.presets import PRESETS

IO = {"kind": "perceiver_io"}
LEARNED = {
    "kind": "image",
    "front_end": "1x1",
    "positions": {"kind": "learned", "channels": 256, "init_std": 0.02, "projection": 256},
}


def count(**values) -> int:
    config = model_config({"kind": "perceiver", "inputs": {"kind": "image"}, **values})
    with on_meta():
        model = build_model(config, classes=1000)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 44_912_254),
        ({"cross_attends": 1, "blocks": 8}, 42_135_859),
        ({"share": "none"}, 326_241_856),
        ({"share": "none", "blocks": 0, "cross_attends": 4}, 12_654_868),
        ({"share": "none", "blocks": 0, "cross_attends": 8}, 23_760_448),
        ({"share": "none", "blocks": 0, "cross_attends": 12}, 34_866_028),
        (IO, 48_440_627),
        ({**IO, "inputs": {"kind": "image", "front_end": "conv"}}, 48_646_522),
        ({**IO, "inputs": LEARNED, "query_residual": False}, 62_255_848),
    ],
)
def test_parameter_counts(changes, expected):
    """Published: 44.9, 42.1, 326.2, 12.7, 23.8, 34.9, 48.4, 48.6, 62.3 million."""
    assert count(**changes) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("perceiver_imagenet", 44_912_254),
        ("perceiver_imagenet_1cross", 42_135_859),
        ("perceiver_imagenet_unshared", 326_241_856),
        ("perceiver_io_imagenet_fourier", 48_440_627),
        ("perceiver_io_imagenet_conv", 48_646_522),
        ("perceiver_io_imagenet_learned", 62_255_848),
        ("perceiver_io_flow", 41_057_134),
        ("perceiver_io_kinetics", 19_858_855),
        ("resnet50", 25_557_032),
        ("vit_b16", 86_567_656),
        ("cnn14_audioset", 80_753_615),
        ("gblend_audio_audioset", 42_532_208 + 2049 * 527),
        ("gblend_audioset", 143_589_870),
    ],
)
def test_preset_counts(name, expected):
    """The baselines' published counts are torchvision's, timm's and PANNs'."""
    assert count_parameters(perceiver.create_model(name, device="meta")) == expected


def test_the_parts_of_g_blend_have_the_published_sizes():
    """Wang et al.: 23.5 and 42.5 million without the classifier for 50 and 101 layers; 13.7 million of the fusion."""
    whole: Any = perceiver.create_model("gblend_audioset", device="meta")
    fifty: Any = perceiver.create_model("gblend_audio_audioset", device="meta", depths=(3, 4, 6, 3))
    audio = whole.branches["audio"]
    sizes = [count_parameters(one) - count_parameters(one.head) for one in (fifty, audio)]
    assert [round(size / 1e6, 1) for size in sizes] == [23.5, 42.5]
    assert round(count_parameters(whole.head) / 1e6, 1) == 13.7 and audio.inputs.grid == (100, 40)
    stages = [layer.shape for layer in (block_output(audio), block_output(whole.branches["video"]))]
    assert stages == [(2, 2048, 4, 2), (2, 2048, 2, 14, 14)], "the pooled places of the source"


def block_output(model: Any) -> torch.Tensor:
    """Return what the last block gives for two samples."""
    found: list[torch.Tensor] = []
    model.blocks[-1].register_forward_hook(lambda layer, given, output: found.append(output))
    model(model.example(2, "meta"))
    return found[0]


def test_attention_over_two_models_has_4_k_squared_and_2_k_values():
    """1,111,970 for 527 classes; regression has half."""
    heads: list[Any] = []
    for combine in ("attention", "regression"):
        heads.append(perceiver.create_model("fayek_audioset", device="meta", combine=combine))
    assert [count_parameters(one.head) for one in heads] == [1_111_970, 555_985]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("perceiver_io_mlm_bytes", 201.1),
        ("perceiver_io_mlm_bytes_plus", 425.6),
        ("perceiver_io_mlm_sentencepiece", 223.2),
        ("perceiver_io_audioset", 24.9),
        ("perceiver_io_imagenet_fourier_b", 212.2),
        ("perceiver_modelnet40", 44.8),
        ("perceiver_audioset_av_raw_12", 21.0),
        ("perceiver_audioset_av_mel_12", 21.0),
    ],
)
def test_preset_counts_in_millions(name, millions):
    assert round(count_parameters(perceiver.create_model(name, device="meta")) / 1e6, 1) == millions


def test_audioset_count_to_the_unit():
    """20,972,126 is the count with one channel of audio (a mel scalar without position) next to video's 483."""
    mel = {"modalities": {"audio": {"positions": {"kind": "none"}}}}
    model = perceiver.create_model("perceiver_audioset_av_mel_12", device="meta", inputs=mel)
    assert count_parameters(model) == 20_972_126


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("perceiver_imagenet", 707.2),
        ("perceiver_imagenet_1cross", 404.3),
        ("perceiver_imagenet_2cross", 447.6),
        ("perceiver_imagenet_4cross", 534.1),
        ("perceiver_imagenet_4cross_only", 173.1),
        ("perceiver_imagenet_8cross_only", 346.1),
        ("perceiver_io_imagenet_fourier", 407.0),
        ("perceiver_io_imagenet_conv", 369.0),
    ],
)
def test_flops_within_one_percent(name, published):
    """Perceiver Tables 5 and 6, Perceiver IO Tables 1 and 7: billions, multiply and add counted separately."""
    assert abs(plain_flops(name) / 1e9 / published - 1) < 0.01


@functools.cache
def plain_flops(name: str) -> int:
    _, flops = preset_cost(name)
    assert flops is not None
    return flops


def test_fast_path_saves_flops_and_activations():
    config, classes = preset_config("perceiver_imagenet_4cross_only")
    fast = account(config, classes=classes)
    plain = account(config.model_copy(update={"attention": "plain"}), classes=classes)
    assert plain.executed_flops == plain.forward_flops == fast.forward_flops
    assert fast.executed_flops < 0.1 * plain.forward_flops
    assert fast.activation_bytes < 0.2 * plain.activation_bytes


def test_activation_bytes_are_what_autograd_keeps_on_a_cpu():
    """Counted on meta, within 2 % of the storages that a real forward pass saves."""
    sizes = {"latents": 64, "latent_channels": 128, "cross_attends": 2, "inputs": {"size": (64, 64)}}
    estimate = count_activation_bytes(perceiver.create_model("perceiver_imagenet", device="meta", **sizes), 4)
    model = perceiver.create_model("perceiver_imagenet", **sizes)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(4, 3, 64, 64, dtype=torch.uint8))
    assert estimate == pytest.approx(sum(t.untyped_storage().nbytes() for t in kept.values()), rel=0.02)


def test_only_tensors_on_meta_have_no_initial_values():
    with on_meta():
        layer, table = torch.nn.Embedding(2, 3), torch.zeros(4, device="cpu").fill_(2.0)
    assert layer.weight.is_meta and layer.weight.shape == (2, 3)
    assert table.sum() == 8 and torch.nn.init.ones_(torch.empty(3)).sum() == 3


def test_every_preset_is_made_on_meta_in_a_second_and_overrides_work():
    for name in perceiver.list_models():
        perceiver.create_model(name, device="meta", **({"classes": 3} if "imagenet" in name else {}))
    model = perceiver.create_model(
        "perceiver_imagenet", classes=7, latents=4, latent_channels=16, cross_attends=1, inputs={"size": (8, 8)}
    )
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    with pytest.raises(UserError, match="perceiver_imagenet_learned"):
        perceiver.create_model("perceiver_imagenet_learnt")
    assert "vit_b16_ff" in perceiver.list_models("vit_*")


def test_printed_flops_that_are_others_have_a_remark():
    """Within 5 % the sources' GFLOP are the model's; the remarks' own figures are."""
    checked = 0
    for name, preset in PRESETS.items():
        printed = re.search(r"\b(\d+)G\b", preset.note)
        if printed is None:
            assert not preset.remark, name
            continue
        flops = plain_flops(name)
        near = abs(flops / 1e9 / int(printed[1]) - 1) <= 0.05
        assert near != bool(preset.remark), f"{name}: {flops / 1e9:.0f}"
        assert near or preset.remark.startswith(f"{flops / 1e9:.0f} GFLOP here"), name
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize(
    ("name", "layers", "printed"),
    [
        ("perceiver_io_imagenet_fourier_b", 12, 213),
        ("perceiver_io_imagenet_conv_b", 12, 176),
        ("perceiver_io_mlm_bytes", 24, 113),
    ],
)
def test_printed_flops_of_fewer_layers(name, layers, printed):
    config, classes = preset_config(name, self_attends_per_block=layers, attention="plain")
    with on_meta():
        model = build_model(config, classes=classes)
    assert count_flops(model) / 1e9 == pytest.approx(printed, rel=0.005)
