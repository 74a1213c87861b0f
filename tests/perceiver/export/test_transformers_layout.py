"""Parity with the transformers library's Perceiver: same outputs from its weights, and its weights back unchanged."""

import json
import math
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from perceiver.config import UserError  # noqa: E402
from perceiver.export.transformers_folder import read_transformers  # noqa: E402
from perceiver.export.transformers_layout import from_transformers, to_transformers  # noqa: E402
from perceiver.factory import build_model, create_model, model_config  # noqa: E402
from perceiver.modalities.frame_pair import neighbourhoods  # noqa: E402

SMALL = {
    "num_latents": 9,
    "d_latents": 32,
    "num_blocks": 2,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1,
    "num_labels": 6,
    "image_size": 16,
}
TEXT = {
    "num_latents": 9,
    "d_latents": 32,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
    "qk_channels": 16,
    "v_channels": 32,
    "d_model": 24,
    "max_position_embeddings": 20,
    "vocab_size": 50,
    "num_labels": 6,
}
FULL_TEXT = {"qk_channels": 256, "v_channels": 1280}
FULL_IMAGE = {
    "num_latents": 512,
    "d_latents": 1024,
    "num_blocks": 8,
    "num_self_attends_per_block": 6,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 1,
    "num_labels": 1000,
}
FULL_FLOW = {
    "num_latents": 2048,
    "d_latents": 512,
    "num_blocks": 1,
    "num_self_attends_per_block": 24,
    "num_self_attention_heads": 16,
    "num_cross_attention_heads": 1,
}
FULL_MULTIMODAL = {
    "num_latents": 784,
    "d_latents": 512,
    "num_blocks": 1,
    "num_self_attends_per_block": 8,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 1,
    "num_labels": 700,
}


def theirs_of(head: str, **values: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, head)(transformers.PerceiverConfig(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The library starts biases and norms at 0 and 1, which would hide a mix-up.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embedding" not in name and "latents" not in name and "padding" not in name and "mask" not in name:
                # Its 0.02 makes outputs nearly blind to the inputs.
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def check_there_and_back(theirs: Any, raw: Any, expected: Any, *asked: Any) -> None:
    """Check that our outputs equal theirs to 1e-4 of the largest, by the fast paths, and the export the original."""
    ours = from_transformers(theirs)
    with torch.no_grad():
        got = ours(raw, *asked)
    for name in expected if isinstance(expected, dict) else [None]:
        a: Any = got if name is None else got[name]
        b: Any = expected if name is None else expected[name]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    back = to_transformers(ours)
    assert type(back) is type(theirs)
    state = back.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=name)


def image_case(kind: str, batch: int, **values: Any) -> None:
    theirs = theirs_of(f"PerceiverForImageClassification{kind}", **values)
    pixels = torch.randn(batch, 3, values["image_size"], values["image_size"])
    with torch.no_grad():
        check_there_and_back(theirs, pixels, theirs(pixels).logits)


def masked_language_case(batch: int, length: int, **values: Any) -> None:
    theirs = theirs_of("PerceiverForMaskedLM", **values)
    ids = torch.randint(0, values.get("vocab_size", 262), (batch, length))
    mask = torch.rand(batch, length) > 0.3
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long()).logits[:, :length]
    check_there_and_back(theirs, {"text": ids, "text_mask": mask}, expected)


def flow_case(size: tuple[int, int], **values: Any) -> None:
    theirs = theirs_of("PerceiverForOpticalFlow", train_size=list(size), **values)
    frames = torch.randn(1, 2, 3, *size)
    patches = neighbourhoods(frames, 3).view(1, *size, 2, 27).permute(0, 3, 4, 1, 2)
    with torch.no_grad():
        expected = theirs(patches).logits.permute(0, 3, 1, 2)
    check_there_and_back(theirs, frames, expected)


def autoencoding_case(video_points: int, audio_points: int, **values: Any) -> None:
    theirs = theirs_of("PerceiverForMultimodalAutoencoding", **values)
    c = theirs.config
    samples = c.num_frames * c.audio_samples_per_frame
    video = torch.randn(1, c.num_frames, 3, *c.output_shape[2:])
    audio = torch.randn(1, samples)
    points = {
        "image": torch.randperm(math.prod(c.output_shape))[:video_points],
        "audio": torch.randperm(samples // c.samples_per_patch)[:audio_points],
        "label": None,
    }
    with torch.no_grad():
        raw = {"image": video, "audio": audio[..., None], "label": torch.zeros(1, c.num_labels)}
        expected = dict(theirs(raw, subsampled_output_points=points).logits)
    expected["video"] = expected.pop("image")
    expected["audio"] = expected["audio"].unflatten(1, (-1, c.samples_per_patch))
    asked = {"video": points["image"], "audio": points["audio"]}
    check_there_and_back(theirs, {"video": video, "audio": audio}, expected, asked)


@pytest.mark.parametrize("kind", ["Fourier", "Learned", "ConvProcessing"])
def test_image_heads(kind):
    image_case(kind, 2, **SMALL, cross_attention_shape_for_attention="q" if kind == "Fourier" else "kv")


@pytest.mark.parametrize("name", ["relu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"])
def test_activations(name):
    masked_language_case(2, 17, **TEXT, hidden_act=name)


def test_another_activation_is_refused(tmp_path):
    """Once any other activation became the GELU's tanh form."""
    theirs_of("PerceiverForMaskedLM", **TEXT, hidden_act="silu").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: hidden_act: got 'silu'; wanted one of gelu,"):
        read_transformers(str(tmp_path))


def test_masked_language_head_with_padding():
    masked_language_case(2, 17, **TEXT)


def test_sequence_classification_head():
    theirs = theirs_of("PerceiverForSequenceClassification", **TEXT)
    ids = torch.randint(0, 50, (2, 17))
    with torch.no_grad():
        check_there_and_back(theirs, ids, theirs(ids).logits)


@pytest.mark.parametrize("shape", ["kv", "q"])
def test_optical_flow_head(shape):
    flow_case((6, 8), **{**SMALL, "num_blocks": 1, "cross_attention_shape_for_attention": shape})


@pytest.mark.parametrize("shape", ["kv", "q"])
def test_multimodal_autoencoding_head(shape):
    values = {
        **SMALL,
        "cross_attention_shape_for_attention": shape,
        "num_frames": 4,
        "audio_samples_per_frame": 64,
        "output_shape": [1, 4, 24, 16],
        "output_num_channels": 12,
        "_label_trainable_num_channels": 20,
    }
    autoencoding_case(50, 7, **values)


TINY: dict[str, Any] = {"latents": 4, "latent_channels": 8, "heads": 2, "blocks": 1, "self_attends_per_block": 1}


def exported(preset: str, **changes: Any) -> tuple[Any, Any]:
    """Return a small model of a preset with random weights, and the library's."""
    torch.manual_seed(0)
    ours: Any = create_model(preset, **(TINY | changes)).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return ours, to_transformers(ours)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("perceiver_io_imagenet_learned", {"inputs": {"size": (6, 6)}}),
        ("perceiver_io_imagenet_learned", {"inputs": {"size": (6, 6)}, "query_residual": True}),
        ("perceiver_io_imagenet_fourier", {"inputs": {"size": (5, 7)}, "query_residual": False}),
        ("perceiver_io_imagenet_fourier", {"inputs": {"size": (56, 56)}, "activation": "relu"}),
        ("perceiver_io_imagenet_conv", {"inputs": {"size": (40, 32), "conv_padding": "symmetric"}}),
    ],
)
def test_image_classifiers_are_expressed_there(preset, changes):
    """Once a classifier without the decoder's residual, and images that are not square, were refused."""
    ours, theirs = exported(preset, classes=5, **changes)
    pixels = torch.randn(2, 3, *ours.config.inputs.size)
    with torch.no_grad():
        wanted = ours(pixels)
        atol = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(theirs(pixels).logits, wanted, rtol=1e-4, atol=atol)
        again: Any = from_transformers(theirs)
        torch.testing.assert_close(again(pixels), wanted, rtol=1e-4, atol=atol)
    assert again.config.inputs.size == ours.config.inputs.size


def test_flow_of_any_scale_is_expressed_there():
    ours, theirs = exported("perceiver_io_flow", inputs={"size": (4, 6), "positions": {"max_resolution": None}})
    frames = torch.randn(1, 2, 3, 4, 6)
    patches = neighbourhoods(frames, 3).view(1, 4, 6, 2, 27).permute(0, 3, 4, 1, 2)
    with torch.no_grad():
        found = theirs(patches).logits.permute(0, 3, 1, 2)
        torch.testing.assert_close(found, ours(frames), rtol=1e-4, atol=1e-4 * float(found.abs().max()))


def test_what_the_library_cannot_express_is_refused():
    def refused(what: str, preset: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=what):
            exported(preset, **changes)

    refused(r"model\.inputs: .*bands", "perceiver_io_imagenet_fourier", inputs={"positions": {"bands": 3}})
    refused(r"model\.inputs: .*'same'", "perceiver_io_imagenet_conv")
    refused(r"model\.inputs\.size: .*square", "perceiver_io_imagenet_learned", inputs={"size": (4, 6)})
    refused(r"model\.decoder: .*'queries': 'inputs'", "perceiver_io_mlm_bytes", decoder={"queries": "inputs"})
    refused(r"model\.inputs: .*'normalise': 'pair'", "perceiver_io_flow", inputs={"size": (4, 6), "normalise": "pair"})
    refused(r"model\.share_blocks", "perceiver_io_imagenet_fourier", blocks=2, share_blocks=False)
    modalities = {"video": {"positions": {"bands": 3}}}
    refused(r"model\.inputs: ", "perceiver_io_kinetics", inputs={"modalities": modalities})
    modalities = {"video": {"max_resolution": (16, 224, 224)}}
    refused(r"model\.", "perceiver_io_kinetics", decoder={"modalities": modalities})
    points = build_model(model_config({"kind": "perceiver_io", **TINY, "inputs": {"kind": "points"}}), classes=3)
    with pytest.raises(UserError, match="points"):
        to_transformers(points)
    with pytest.raises(UserError, match="Linear"):
        from_transformers(torch.nn.Linear(1, 1))


OFFICIAL: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "ImageClassificationFourier": ("perceiver_io_imagenet_fourier", {}, set()),
    "ImageClassificationLearned": ("perceiver_io_imagenet_learned", {"image_size": 224}, {"query_residual"}),
    "ImageClassificationConvProcessing": ("perceiver_io_imagenet_conv", {}, {"inputs.conv_padding"}),
    "MaskedLM": ("perceiver_io_mlm_bytes", FULL_TEXT, set()),
    "OpticalFlow": ("perceiver_io_flow", FULL_FLOW, {"decoder.scale"}),
    "MultimodalAutoencoding": ("perceiver_io_kinetics", FULL_MULTIMODAL, set()),
}
"""Preset, DeepMind's values of the config, and in what the library's models differ from the released code's."""


@pytest.mark.parametrize("head", OFFICIAL)
def test_a_preset_is_the_model_of_the_official_config(head):
    """DeepMind's configs keep the default `image_size` of 56, although the models take images of 224."""
    preset, values, different = OFFICIAL[head]
    values = FULL_IMAGE | values if "Image" in head else values
    with torch.device("meta"):
        theirs = getattr(transformers, f"PerceiverFor{head}")(transformers.PerceiverConfig(**values))
        imported: Any = from_transformers(theirs)
    ours: Any = create_model(preset, device="meta")
    assert {n: t.shape for n, t in imported.state_dict().items()} == {n: t.shape for n, t in ours.state_dict().items()}
    assert imported.example(2, "meta").keys() == ours.example(2, "meta").keys()
    for name, tensor in ours.example(2, "meta").items():
        assert imported.example(2, "meta")[name].shape == tensor.shape
    mine, other = (flat(model.config.model_dump()) for model in (ours, imported))
    widths = {"cross_qk_channels", "decoder_qk_channels", "decoder_v_channels"}
    assert {key for key in mine if mine[key] != other[key]} - widths == {"activation", *different}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def test_the_size_of_images(tmp_path):
    """From the preprocessor, else the config, else the head; of learned positions from their table."""

    def size(kind: str, processor: dict[str, Any] | None = None, **values: Any) -> Any:
        theirs_of(f"PerceiverForImageClassification{kind}", **SMALL | values).save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)
        if processor is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        model: Any = read_transformers(str(tmp_path))
        inputs = model.config.inputs
        return (*inputs.size, *inputs.mean, *inputs.std)

    usual = (0.485, 0.456, 0.406, 0.229, 0.224, 0.225)
    for kind in ("Fourier", "ConvProcessing"):
        assert size(kind, image_size=56) == (224, 224, *usual)
        assert size(kind, image_size=[56, 48]) == (56, 48, *usual)
        assert size(kind, {"size": 128, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}) == (
            128,
            128,
            *[0.5] * 3,
            *[0.25] * 3,
        )
    assert size("Learned", {"size": {"height": 3, "width": 4}}) == (16, 16, *usual)
    pixels = {"do_rescale": False, "do_normalize": False, "size": {"shortest_edge": 9}}
    assert size("Fourier", pixels) == (16, 16, 0, 0, 0, *[1 / 255] * 3)
    for wrong, what in (({"size": "big"}, "size"), ({"image_std": 3}, "image_std"), ([], "dictionary")):
        with pytest.raises(UserError, match=rf"preprocessor_config\.json.*{what}"):
            size("Fourier", wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_image_head_at_full_size():
    """The model with 50,176 inputs; the small case covers what is specific to the other two."""
    image_case("Fourier", 1, **FULL_IMAGE, image_size=224)


@pytest.mark.slow
def test_masked_language_head_at_full_size():
    masked_language_case(1, 2048, **FULL_TEXT)


@pytest.mark.slow
def test_optical_flow_head_at_full_width():
    """The published depth and widths; frames of a quarter of the side, as 368 x 496 takes minutes."""
    flow_case((92, 124), **FULL_FLOW)


@pytest.mark.slow
def test_multimodal_autoencoding_head_at_full_size():
    autoencoding_case(6272, 15, **FULL_MULTIMODAL)
