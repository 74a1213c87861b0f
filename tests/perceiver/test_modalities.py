"""Every modality: shapes, a classifier that trains on it, and what each one computes, calculated independently."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from perceiver import registry
from perceiver.config import UserError
from perceiver.factory import build_model, model_config
from perceiver.modalities.frame_pair import neighbourhoods
from perceiver.modalities.mel import MelConfig, log_mel
from perceiver.modalities.video import space_time_patches
from perceiver.tasks import model_inputs
from perceiver.tasks.masked_language import word_numbers

FEW = {"kind": "fourier", "bands": 3}
SMALL: dict[str, dict[str, Any]] = {
    "image": {"kind": "image", "size": (8, 6), "positions": FEW},
    "audio": {"kind": "audio", "samples": 100, "patch": 16, "positions": FEW},
    "mel": {
        "kind": "mel",
        "samples": 256,
        "window": 64,
        "hop": 32,
        "bins": 8,
        "rate": 16_000,
        "positions": FEW,
        "layout": "grid",
        "time_masks": 1,
        "frequency_masks": 1,
    },
    "video": {"kind": "video", "frames": 4, "size": (8, 8), "patch": (2, 4, 4), "positions": FEW},
    "points": {"kind": "points", "points": 11, "bands": 3},
    "series": {"kind": "series", "length": 10, "channels": 2, "patch": 3, "embedding": 5, "positions": FEW},
    "embeddings": {"kind": "embeddings", "segments": 5, "channels": 7, "positions": FEW},
    "text": {"kind": "text", "length": 20, "channels": 12},
    "label": {"kind": "label", "classes": 5},
    "flow_frames": {"kind": "flow_frames", "size": (6, 8), "positions": FEW},
}
SMALL["multimodal"] = {
    "kind": "multimodal",
    "modalities": {k: SMALL[k] for k in ("audio", "text", "video")},
    "dropout": {"video": 0.5},
}
MODEL = {"latents": 5, "latent_channels": 8, "cross_attends": 2, "self_attends_per_block": 1, "heads": 2}


def model_of(inputs: dict[str, Any], **changes: Any) -> Any:
    return build_model(model_config({"kind": "perceiver", "inputs": inputs, **MODEL, **changes}), classes=3)


def batch_of(model: Any, size: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    batch = {}
    for key, value in model.example(size, "cpu").items():
        high = 5 if key == "label" else 250
        batch[key] = torch.randn_like(value) if value.is_floating_point() else torch.randint_like(value, 0, high)
    return batch


def test_every_modality_has_a_case():
    assert set(SMALL) == set(registry.members("perceiver.modalities"))


@pytest.mark.parametrize("kind", list(SMALL))
def test_contract(kind):
    """The announced sizes are the real ones, every parameter learns, and both paths agree."""
    model = model_of(SMALL[kind])
    batch = batch_of(model)
    _, inputs = model.read(batch)
    assert tuple(inputs.dense.shape) == (2, model.inputs.elements, model.inputs.channels)
    torch.nn.init.normal_(model.head.weight)
    model(model_inputs(model, batch)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.manual_seed(0)
    model = model_of(SMALL[kind], latent_init_std=1.0).double().eval()
    fast = model.encode(batch)
    for layer in model.cross_attends:
        layer.attention.kind = "plain"
    torch.testing.assert_close(fast, model.encode(batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["image", "audio", "mel", "video"])
def test_learned_and_no_positions(kind):
    for positions in ({"kind": "learned", "channels": 4}, {"kind": "none"}):
        model = model_of({**SMALL[kind], "positions": positions})
        assert model(batch_of(model)).shape == (2, 3)


@pytest.mark.parametrize(("front_end", "channels"), [("conv", None), ("1x1", 5), ("patch", None), ("patch", 5)])
def test_image_front_ends(front_end, channels):
    values = {
        "kind": "image",
        "size": (16, 8),
        "front_end": front_end,
        "front_end_channels": channels,
        "patch": 2,
        "positions": FEW,
    }
    model = model_of(values)
    _, inputs = model.read(batch_of(model))
    assert tuple(inputs.dense.shape) == (2, model.inputs.elements, model.inputs.channels)


def test_uint8_pixels_are_normalised():
    model = model_of({**SMALL["image"], "mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0)})
    _, inputs = model.read(torch.full((1, 3, 8, 6), 255, dtype=torch.uint8))
    torch.testing.assert_close(inputs.data[0, 0], torch.tensor([1.0, 3.0, 1.0]))


@pytest.mark.parametrize("elements", ["steps", "values"])
def test_series_are_normalised_and_masked(elements):
    values = {"kind": "series", "length": 4, "channels": 2, "elements": elements, "mean": (1.0, 2.0), "std": (2.0, 4.0)}
    model = model_of({**values, "positions": {"kind": "learned", "channels": 4}})
    series, mask = torch.randn(3, 4, 2), torch.arange(4) < torch.tensor([[4], [2], [1]])
    _, inputs = model.read({"series": series, "series_mask": mask})
    wanted = (series - torch.tensor([1.0, 2.0])) / torch.tensor([2.0, 4.0])
    size = 1 if elements == "values" else 2
    torch.testing.assert_close(inputs.data[0, :, :size].reshape(4, 2), wanted[0])
    assert inputs.mask.sum(1).tolist() == [count * (2 if elements == "values" else 1) for count in (4, 2, 1)]
    hidden = torch.where(mask[..., None], series, 99.0)
    torch.testing.assert_close(
        model({"series": series, "series_mask": mask}), model({"series": hidden, "series_mask": mask})
    )
    row = model_of({**values, "length": 1, "elements": "values"})
    assert row.inputs.grid == (2,) and row({"series": torch.randn(3, 1, 2)}).shape == (3, 3)


def test_a_finer_image_than_configured():
    for positions in (FEW, {"kind": "learned", "channels": 4}):
        model = model_of({**SMALL["image"], "positions": positions})
        assert model(torch.zeros(2, 3, 16, 12)).shape == (2, 3)


def test_log_mel_against_numpy():
    """STFT by numpy on the padded signal, HTK filters by their triangles."""
    config = MelConfig(samples=3000, rate=16_000, window=256, hop=128, bins=10, low=80, high=7600)
    x = np.random.default_rng(0).normal(size=3000)
    frames = math.ceil(3000 / 128)
    padded = np.concatenate([x, np.zeros((frames - 1) * 128 + 256 - 3000)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    spectrum = np.stack([np.abs(np.fft.rfft(padded[i * 128 : i * 128 + 256] * window)) for i in range(frames)])
    mel = 1127 * np.log(1 + np.arange(129) * 16_000 / 256 / 700)
    edges = np.linspace(1127 * np.log(1 + 80 / 700), 1127 * np.log(1 + 7600 / 700), 12)
    filters = np.stack([np.interp(mel, edges[i : i + 3], [0, 1, 0], left=0, right=0) for i in range(10)], axis=1)
    expected = np.log(spectrum @ filters + 1e-6)
    got = log_mel(torch.tensor(x)[None], config)[0]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize(("spectrum", "power"), [("power", 2.0), ("magnitude", 1.0)])
@pytest.mark.parametrize(("log", "offset"), [("db", 1e-10), ("db", 0.5), ("ln", 0.01)])
def test_other_front_ends_against_transformers(scale, spectrum, power, log, offset):
    """Slaney, power, db and 1e-10 are those of CNN-14, at its rate, window and hop: 10 s are 1,001 frames."""
    audio = pytest.importorskip("transformers.audio_utils")
    given = {"scale": scale, "spectrum": spectrum, "log": log, "log_offset": offset, "centre": True, "layout": "grid"}
    mel = {"rate": 32_000, "window": 1024, "hop": 320, "bins": 64, "low": 50.0, "high": 14_000.0}
    config = MelConfig.model_validate({"samples": 3300, **mel, **given})
    x = np.random.default_rng(0).normal(size=3300)
    norm = "slaney" if scale == "slaney" else None
    hertz = {"min_frequency": 50, "max_frequency": 14_000, "sampling_rate": 32_000}
    kaldi = {"mel_scale": "kaldi", "triangularize_in_mel_space": True} if scale == "htk" else {"mel_scale": "slaney"}
    filters = audio.mel_filter_bank(513, 64, **hertz, norm=norm, **kaldi)
    window = audio.window_function(1024, "hann")
    floor = offset if log == "db" else 1e-300
    found = audio.spectrogram(
        x, window, 1024, 320, power=power, mel_filters=filters, mel_floor=floor, pad_mode="reflect", dtype=np.float64
    )
    expected = 10 * np.log10(found.T) if log == "db" else np.log(found.T + offset)
    got = log_mel(torch.tensor(x)[None], config)[0]
    assert got.shape == (11, 64) and config.model_copy(update={"samples": 320_000}).build().grid == (1001, 64)  # type: ignore[attr-defined]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert config.build()({"audio": torch.tensor(x)[None].float()}, torch.float32).elements == 11 * 64


def test_papers_audio_and_video_sizes():
    """Perceiver §4.2: 480 audio inputs, 4,800 of the spectrogram, 12,544 of video, 487 channels."""
    meta = {"cross_attends": 1, "self_attends_per_block": 0}
    with torch.device("meta"):
        audio, mel, video = (
            model_of({"kind": k, "positions": {"kind": "fourier", "bands": 16}}, **meta).inputs
            for k in ("audio", "mel", "video")
        )
    assert (audio.elements, mel.elements, video.elements) == (480, 4800, 12_544)
    assert video.channels == 483


def test_patches_contain_frames_rows_columns_channels():
    x = torch.arange(2 * 4 * 3 * 4 * 6).view(2, 4, 3, 4, 6)
    patches, grid = space_time_patches(x, (2, 2, 3))
    assert grid == (2, 2, 2)
    expected = x[1, 2:4, :, 0:2, 3:6].permute(0, 2, 3, 1).flatten()
    assert torch.equal(patches[1, 1 * 4 + 0 * 2 + 1], expected)


def test_flow_neighbourhoods():
    x = torch.randn(1, 2, 3, 5, 6)
    got = neighbourhoods(x, 3)[0, 2 * 6 + 3].view(2, 3, 3, 3)
    torch.testing.assert_close(got, x[0, :, :, 1:4, 2:5].permute(0, 2, 3, 1))


def test_frames_apart_are_inputs_of_their_own():
    """Twice the inputs, the frame on the first axis of their positions; the queries are those of the first frame."""
    model = build_model(
        model_config(
            {
                "kind": "perceiver_io",
                "inputs": {**SMALL["flow_frames"], "frames_apart": True},
                "decoder": {"kind": "flow"},
                "latents": 5,
                "latent_channels": 8,
                "blocks": 1,
                "self_attends_per_block": 1,
                "heads": 2,
            }
        ),
        classes=None,
    ).eval()
    frames = torch.randint(0, 256, (2, 2, 3, 6, 8), dtype=torch.uint8)
    read = model.inputs({"video": frames}, torch.float32)
    dense = read.dense
    assert dense.shape[1] == 2 * 6 * 8 and model.inputs.elements == 96
    swapped = model.inputs({"video": frames.flip(1)}, torch.float32).dense
    torch.testing.assert_close(swapped[:, :48, :64], dense[:, 48:, :64])
    place = dense[0, :, 64:]
    assert not torch.equal(place[:48], place[48:]) and torch.equal(place, swapped[0, :, 64:])
    queries = model.decoder.queries(read, None).dense
    torch.testing.assert_close(queries, dense[:, :48])
    torch.testing.assert_close(
        model.decoder.queries(read, {"flow": torch.arange(48)[None].expand(2, -1)}).dense, queries
    )
    assert model({"video": frames}).shape == (2, 2, 6, 8)


def test_pairs_of_frames_are_normalised_by_their_own_mean_and_deviation():
    """A pair of one grey value becomes zeros, and floats are taken as they are."""
    inputs = model_of({**SMALL["flow_frames"], "normalise": "pair"}).inputs
    frames = torch.randint(0, 120, (3, 2, 3, 6, 8), dtype=torch.uint8)
    frames[2] = 77
    x = frames.double().flatten(1) / 127.5 - 1
    x = (x - x.mean(1, keepdim=True)) / (x.std(1, correction=0, keepdim=True) + 1 / 127.5)
    x[2] = 0
    wanted = inputs({"video": x.view(3, 2, 3, 6, 8).float()}, torch.float32).data
    torch.testing.assert_close(inputs({"video": frames}, torch.float32).data, wanted, rtol=1e-4, atol=1e-4)
    brighter = inputs({"video": frames + 100}, torch.float32).data
    torch.testing.assert_close(brighter, wanted, rtol=1e-4, atol=1e-4)


def test_embeddings_and_positions_of_texts_start_at_their_scales():
    inputs = model_of({"kind": "text", "length": 400, "channels": 64, "init_std": 0.3, "position_init_std": 2.0}).inputs
    for values, scale in ((inputs.tokens.weight, 0.3), (inputs.positions, 2.0)):
        assert float(values.detach().std()) == pytest.approx(0.88 * scale, rel=0.02) and values.abs().max() <= 2 * scale


@pytest.mark.parametrize("front_end", ["none", "conv"])
def test_masked_text_does_not_see_padding(front_end):
    model = model_of({**SMALL["text"], "front_end": front_end}, latent_init_std=1.0).double().eval()
    torch.nn.init.normal_(model.head.weight)
    ids = torch.randint(0, 250, (2, 9))
    padded = torch.cat([ids, torch.randint(0, 250, (2, 5))], dim=1)
    mask = torch.arange(14).expand(2, -1) < 9
    torch.testing.assert_close(model({"text": padded, "text_mask": mask}), model(ids), rtol=1e-9, atol=1e-9)


def test_the_convolution_of_text_adds_what_it_makes_of_the_tokens_around():
    inputs = (
        model_of({"kind": "text", "length": 6, "channels": 4, "front_end": "conv", "conv_width": 3}).double().inputs
    )
    ids = torch.randint(0, 262, (1, 6))
    embedded = torch.nn.functional.embedding(ids, inputs.tokens.weight)[0]
    around = torch.cat([torch.zeros(1, 4), embedded, torch.zeros(1, 4)]).double()
    wanted = torch.stack(
        [sum(inputs.conv.weight[:, :, k] @ around[m + k] for k in range(3)) + inputs.conv.bias for m in range(6)]
    )
    wanted = embedded + torch.nn.functional.gelu(wanted, approximate="tanh") + inputs.positions
    torch.testing.assert_close(inputs({"text": ids}, torch.float64).data[0], wanted)


def test_an_even_width_of_the_convolution_of_text_is_refused():
    with pytest.raises(ValidationError, match="conv_width = 4 is even"):
        model_of({**SMALL["text"], "front_end": "conv", "conv_width": 4})


def test_modality_dropout_zeroes_whole_samples_in_training_only():
    values = {**SMALL["multimodal"], "dropout": {"video": 0.5}}
    model = model_of(values)
    batch = batch_of(model, 64)
    video = 2 * 2 * 2
    straight = model.eval().read(batch)[1].dense[:, -video:, : 2 * 4 * 4 * 3]
    assert (straight != 0).flatten(1).any(1).all()
    dropped = model.train().read(batch)[1].dense[:, -video:, : 2 * 4 * 4 * 3]
    gone = (dropped == 0).flatten(1).all(1)
    assert 15 < int(gone.sum()) < 49
    torch.testing.assert_close(dropped[~gone], straight[~gone])


@pytest.mark.parametrize("unit", ["sample", "token"])
def test_a_learned_vector_stands_for_samples_or_for_tokens(unit):
    model = model_of({**SMALL["multimodal"], "mask": {"video": 0.5}, "mask_unit": unit}).train()
    batch, video = batch_of(model, 64), 2 * 2 * 2
    masked = (model.read(batch)[1].dense[:, -video:] == model.inputs.masks["video"]).all(-1)
    assert abs(float(masked.float().mean()) - 0.5) < 0.2
    whole = masked.all(1) | ~masked.any(1)
    assert whole.all() if unit == "sample" else whole.sum() < 5


def test_what_is_outside_of_attention_starts_as_in_haiku():
    """Truncated normals of scale 1 / sqrt(fan-in), realised 0.88 of it, and zero biases; once they were torch's."""
    learned = {"kind": "learned", "channels": 100, "projection": 90}
    one = {"kind": "image", "size": (4, 4), "front_end": "1x1", "front_end_channels": 2000, "positions": learned}
    image = model_of(one).inputs
    conv = model_of({"kind": "image", "size": (16, 16), "front_end": "conv"}).inputs.front_end.conv
    frames = model_of({**SMALL["flow_frames"], "front_end_channels": 200}).inputs.front_end
    for layer, fan_in in ((image.front_end, 3), (image.positions.projection, 100), (conv, 147), (frames, 54)):
        std = fan_in**-0.5
        assert layer.weight.detach().std().item() == pytest.approx(0.8796 * std, rel=0.04)
        assert layer.weight.abs().max() <= 2 * std
        assert layer.bias is None or not layer.bias.any()


def test_hidden_label_is_not_needed_and_not_seen_in_evaluation():
    values = {
        "kind": "multimodal",
        "modalities": {"audio": SMALL["audio"], "label": SMALL["label"]},
        "mask": {"label": 0.5},
        "hide": ["label"],
    }
    model = model_of(values, latent_init_std=1.0)
    batch = batch_of(model)
    assert model.train().input_keys == ("audio", "label")
    assert model.eval().input_keys == ("audio",)
    torch.testing.assert_close(model.encode(batch), model.encode({"audio": batch["audio"]}))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "video", "patch": (3, 4, 4)},
        {"kind": "image", "mean": (0.5,)},
        {"kind": "mel", "high": 30_000.0},
        {"kind": "mel", "centre": True, "samples": 32, "window": 64},
        {"kind": "multimodal", "dropout": {"smell": 0.1}},
        {"kind": "audio", "patch": 101},
        {"kind": "image", "front_end": "patch", "patch": 5},
        {"kind": "flow_frames", "window": 2},
    ],
)
def test_settings_that_do_not_fit_are_refused(change):
    with pytest.raises(UserError, match="wanted"):
        model_of({**SMALL[change["kind"]], **change})


def test_words():
    ids = torch.tensor([[4, 103, 104, 38, 38, 105, 5, 0]])
    numbers = word_numbers(ids, torch.tensor([38]), torch.tensor([], dtype=torch.int64), 6)
    assert numbers.tolist() == [[0, 1, 1, 0, 0, 2, 0, 0]]
    pieces = torch.tensor([[4, 50, 60, 51, 61, 61, 5]])
    numbers = word_numbers(pieces, torch.tensor([38]), torch.tensor([50, 51]), 6)
    assert numbers.tolist() == [[0, 1, 1, 2, 2, 2, 0]]
