"""Named models: every row of the papers' tables that the sources give, and small ones to start from.

A preset is a recipe's `model:` section, the number of classes and where it comes from; a recipe may contain
`model: {preset: NAME}` and add keys. What the papers leave open is marked OPEN in the note. Sources:
P = Perceiver (arXiv 2103.03206v2), IO = Perceiver IO (arXiv 2107.14795).
"""

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perceiver.config import UserError

Values = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A named model: values of its `model:` section, number of classes (None without labels), and its source.

    `remark` gives the reason, as far as computing finds one, where the source's GFLOP are others than the model's.
    """

    model: Values
    classes: int | None
    note: str
    remark: str = ""


_TWELVE = "the printed GFLOP are those of 12 layers, the parameters those of 16"
_REMARKS = {
    "perceiver_io_imagenet_fourier_b": f"269 GFLOP here: {_TWELVE}",
    "perceiver_io_imagenet_conv_b": f"232 GFLOP here: {_TWELVE}",
    "perceiver_io_imagenet_learned": "478 GFLOP here, as its inputs have 512 channels: printed are those of the 261 of "
    "Fourier positions",
    "perceiver_io_mlm_bytes": "121 GFLOP here: the printed ones are those of 24 layers, the parameters those of 26",
    "perceiver_io_mlm_sentencepiece": "134 GFLOP here, 121 with one FLOP per multiply-add in the logits: then BERT "
    "Base has its printed 109 too",
}


def _fourier(bands: int, *rates: float) -> Values:
    return {"kind": "fourier", "bands": bands, **({"max_resolution": rates} if rates else {})}


_NONE = {"kind": "none"}
_IMAGE: Values = {"kind": "image", "positions": _fourier(64, 224, 224)}
_PIXELS: Values = {"kind": "image", "positions": _NONE}
_LEARNED: Values = {"kind": "image", "positions": {"kind": "learned", "channels": 128, "init_std": 1.0}}
_IO_LEARNED: Values = {
    "kind": "image",
    "front_end": "1x1",
    "front_end_channels": 256,
    "positions": {"kind": "learned", "channels": 256, "init_std": 0.02, "projection": 256},
}
_CONV: Values = {"kind": "image", "front_end": "conv", "positions": _fourier(64, 56, 56)}
_RAW: Values = {"kind": "audio", "samples": 61_440, "patch": 128, "positions": _fourier(64, 480)}
_MEL: Values = {"kind": "mel", "samples": 61_440, "positions": _fourier(64, 4800)}
_PANNS: Values = {
    "kind": "mel",
    "samples": 320_000,
    "rate": 32_000,
    "window": 1024,
    "hop": 320,
    "bins": 64,
    "low": 50.0,
    "high": 14_000.0,
    "centre": True,
    "spectrum": "power",
    "scale": "slaney",
    "log": "db",
    "log_offset": 1e-10,
    "layout": "grid",
    "time_masks": 2,
    "time_width": 64,
    "frequency_masks": 2,
    "frequency_width": 8,
    "positions": _NONE,
}
"""Log-mel spectrograms of PANNs: 1,001 frames of 64 bins for 10 s, with their SpecAugment."""
_FORTY: Values = {
    **{key: _PANNS[key] for key in ("kind", "spectrum", "layout", "positions")},
    "samples": 16_000,
    "rate": 16_000,
    "window": 256,
    "hop": 160,
    "bins": 40,
}
"""Log-mel spectrograms of G-blend: 100 frames of 40 bins for a second, as long as its 16 video frames."""
_SIXTY_FOUR: Values = {**_PANNS, "samples": 160_000, "rate": 16_000, "window": 512, "hop": 160, "high": 8000.0}
_FRAMES: Values = {"kind": "video", "frames": 16, "patch": (1, 1, 1), "positions": _NONE}
_VIDEO: Values = {"kind": "video", "frames": 32, "patch": (2, 8, 8), "positions": _fourier(16, 16, 28, 28)}
_POINTS: Values = {"kind": "points", "points": 2048, "bands": 64, "max_resolution": 2240.0}


def _audio_video(sound: Values, /, **dropout: float) -> Values:
    return {
        "kind": "multimodal",
        "modalities": {"audio": sound, "video": _VIDEO},
        "dropout": {"video": 0.3, **dropout},
    }


def _perceiver(inputs: Values, **changes: Any) -> Values:
    return {"kind": "perceiver", "inputs": inputs, **changes}


def _io(inputs: Values, **changes: Any) -> Values:
    return {"kind": "perceiver_io", "inputs": inputs, **changes}


def _audioset(inputs: Values) -> Values:
    return _perceiver(inputs, cross_attends=2, self_attends_per_block=8, share="none")


def _language(vocabulary: int, length: int, latent_channels: int, layers: int) -> Values:
    return _io(
        {"kind": "text", "vocabulary": vocabulary, "length": length, "channels": 768},
        latents=256,
        latent_channels=latent_channels,
        blocks=1,
        self_attends_per_block=layers,
        heads=8,
        cross_heads=8,
        qk_channels=256,
        v_channels=latent_channels,
        cross_qk_channels=256,
        cross_v_channels=latent_channels,
        decoder={"kind": "tokens"},
        query_residual=False,
        decoder_heads=8,
        decoder_qk_channels=256,
        decoder_v_channels=768,
    )


def _kinetics(latents: int) -> Values:
    video = {
        "kind": "video",
        "frames": 16,
        "patch": (1, 4, 4),
        "positions": _fourier(32, 16, 56, 56),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }
    audio = {"kind": "audio", "samples": 30_720, "patch": 16, "positions": _fourier(192, 30_720)}
    outputs = {
        "audio": {"grid": (1920,), "values": 16, "bands": 192, "max_resolution": (30_720,)},
        "video": {"grid": (16, 224, 224), "values": 3, "bands": 32, "max_resolution": (16, 56, 56)},
        "label": {"classes": 700, "channels": 1024},
    }
    inputs = {
        "kind": "multimodal",
        "modalities": {"audio": audio, "video": video, "label": {"kind": "label"}},
        "mask": {"audio": 0.0, "video": 0.0, "label": 0.5},
        "hide": ("label",),
    }
    return _io(
        inputs,
        latents=latents,
        latent_channels=512,
        blocks=1,
        self_attends_per_block=8,
        query_residual=False,
        decoder={"kind": "multimodal", "modalities": outputs},
    )


def _imagenet() -> dict[str, Preset]:
    one = {"cross_attends": 1, "blocks": 8}
    rows = {
        "perceiver_imagenet": (_perceiver(_IMAGE), "P §4.1: 78.0 top-1, 44.9M, 707G"),
        "perceiver_imagenet_1cross": (_perceiver(_IMAGE, **one), "P Table 6: 76.7, 404G; IO Table 7: 78.6, 42.1M"),
        "perceiver_imagenet_unshared": (_perceiver(_IMAGE, share="none"), "P Table 7: 72.9, 326.2M"),
        "perceiver_imagenet_learned": (_perceiver(_LEARNED, **one), "P Table 2: 70.9; one cross-attend"),
        "perceiver_imagenet_permuted": (_perceiver({**_IMAGE, "permute": 0}), "P Table 2: 78.0 permuted"),
        "perceiver_io_imagenet_fourier": (_io(_IMAGE), "IO Table 7, config A: 79.0, 48.4M, 407G"),
        "perceiver_io_imagenet_learned": (_io(_IO_LEARNED, query_residual=False), "IO Table 7: 72.7, 62.3M, 407G"),
        "perceiver_io_imagenet_conv": (_io(_CONV), "IO Table 7: 82.1, 48.6M, 369G"),
        "resnet50": ({"kind": "resnet", "inputs": _PIXELS}, "P Table 1: 77.6 (Cubuk et al.)"),
        "resnet50_ff": ({"kind": "resnet", "inputs": _IMAGE}, "P Table 1: 73.5; 39.4 permuted"),
        "vit_b16": ({"kind": "vit", "inputs": _PIXELS}, "P Table 1: 77.9 (Dosovitskiy et al.)"),
        "vit_b16_ff": ({"kind": "vit", "inputs": _IMAGE}, "P Table 1: 76.7; 61.7 permuted"),
        "transformer_64x64": (
            {
                "kind": "transformer",
                "inputs": {"kind": "image", "size": (64, 64), "resize": True, "positions": _fourier(64, 64, 64)},
            },
            "P Table 1: 57.0; OPEN: depth and width",
        ),
    }
    for crosses in (4, 8, 12):
        values = _perceiver(_IMAGE, cross_attends=crosses, blocks=0, share="none")
        rows[f"perceiver_imagenet_{crosses}cross_only"] = (values, "P Table 5: cross-attends only")
    for crosses in (2, 4):
        values = _perceiver(_IMAGE, cross_attends=crosses, blocks=8)
        rows[f"perceiver_imagenet_{crosses}cross"] = (values, "P Table 6: interleaved")
    for crosses in (2, 4, 8):
        values = _perceiver(_IMAGE, cross_attends=crosses, blocks=8, placement="start")
        rows[f"perceiver_imagenet_{crosses}cross_start"] = (values, "P Table 6: all at the start")
    large = {"blocks": 1, "self_attends_per_block": 16, "widening": 4}
    rows["perceiver_io_imagenet_fourier_b"] = (_io(_IMAGE, **large), "IO Table 7, config B (JFT): 84.5, 212M, 213G")
    rows["perceiver_io_imagenet_conv_b"] = (_io(_CONV, **large), "IO Table 7, config B (JFT): 86.4, 212M, 176G")
    return {name: Preset(values, 1000, note, _REMARKS.get(name, "")) for name, (values, note) in rows.items()}


def _audio() -> dict[str, Preset]:
    tuned = {"audio": 0.1}
    twelve = {"latent_channels": 512, "cross_attends": 1, "self_attends_per_block": 12}
    io_twelve: Values = {"latent_channels": 512, "blocks": 1, "self_attends_per_block": 12, "query_residual": False}
    io_twelve["decoder"] = {"kind": "class", "channels": 1024}
    open_size = "OPEN: N, D and audio bands"
    rows = {
        "perceiver_audioset_raw": (_audioset(_RAW), f"P Table 3: 38.3 mAP; {open_size}"),
        "perceiver_audioset_mel": (_audioset(_MEL), f"P Table 3: 38.4 mAP; {open_size}"),
        "perceiver_audioset_video": (_audioset(_VIDEO), f"P Table 3: 25.8 mAP; {open_size}"),
        "perceiver_audioset_av_raw": (_audioset(_audio_video(_RAW)), f"P Table 3: 43.5 mAP; {open_size}"),
        "perceiver_audioset_av_mel": (_audioset(_audio_video(_MEL)), f"P Table 3: 43.2 mAP; {open_size}"),
        "perceiver_audioset_av_mel_tuned": (_audioset(_audio_video(_MEL, **tuned)), f"P Table 3: 44.2; {open_size}"),
        "perceiver_audioset_av_raw_12": (_perceiver(_audio_video(_RAW), **twelve), "IO Table 10: 42.4, 21.0M"),
        "perceiver_audioset_av_mel_12": (_perceiver(_audio_video(_MEL), **twelve), "IO Table 10: 43.6, 21.0M"),
        "perceiver_io_audioset": (_io(_audio_video(_RAW), **io_twelve), "IO Table 10: 43.3, raw audio, 25.0M"),
        "perceiver_io_audioset_mel": (
            _io(_audio_video(_MEL), **{**io_twelve, "latent_channels": 1024}),
            "IO Table 10: 44.9, 88.2M",
        ),
    }
    return {name: Preset(values, 527, note) for name, (values, note) in {**rows, **_other_audio()}.items()}


def _other_audio() -> dict[str, tuple[Values, str]]:
    """Return the other papers' models of sound in P Table 3."""
    pool: Values = {"kind": "segment_pool", "inputs": {"kind": "embeddings"}}
    levels: Values = {"widths": (600, 600, 600), "dropout": 0.4, "norm": True, "pool": "multi_level", "levels": (2, 3)}
    mel = {**_PANNS, "hop": 640, "bins": 128, "high": 16_000.0}
    sound: Values = {"kind": "audio_resnet", "inputs": _FORTY}
    sight: Values = {"kind": "r2plus1d", "inputs": _FRAMES}
    vgg: Values = {"kind": "cnn14", "inputs": _SIXTY_FOUR, "widths": (16, 32, 64, 128, 256, 512, 1024)}
    deep: Values = {**sight, "depths": (3, 8, 36, 3)}
    joint: Values = {"combine": "joint", "hidden": (2048, 2048), "heads": True}
    return {
        "gblend_audio_audioset": (sound, "P Table 3: 32.4 (Wang et al.); OPEN: length of a clip"),
        "gblend_video_audioset": (sight, "P Table 3: 18.8 (Wang et al.); OPEN: length of a clip"),
        "gblend_audioset": (
            {"kind": "late_fusion", "branches": {"audio": sound, "video": sight}, **joint},
            "P Table 3: 41.8 (Wang et al.); OPEN: length of a clip",
        ),
        "fayek_audio_audioset": (vgg, "P Table 3: 38.4 (Fayek and Kumar); OPEN: all but VGG-like"),
        "fayek_video_audioset": (deep, "P Table 3: 25.7 (Fayek and Kumar); OPEN: all but R(2+1)D-152"),
        "fayek_audioset": (
            {"kind": "late_fusion", "branches": {"audio": vgg, "video": deep}},
            "P Table 3: 46.2 (Fayek and Kumar); OPEN: form of the attention",
        ),
        "cnn14_audioset": ({"kind": "cnn14", "inputs": _PANNS}, "P Table 3: 43.1 (Kong et al.)"),
        "segment_mean_audioset": ({**pool, "pool": "mean"}, "P Table 3: 31.4 (Gemmeke et al.); OPEN: layers"),
        "segment_attention_audioset": (pool, "P Table 3: 32.7 (Kong et al. 2018)"),
        "segment_levels_audioset": (
            {**pool, **levels, "output_norm": True},
            "P Table 3: 36.0 (Yu et al.); OPEN: which levels",
        ),
        "resnet50_audioset": (
            {"kind": "resnet", "inputs": mel},
            "P Table 3: 38.0 (Ford et al.); OPEN: spectrogram, clip",
        ),
    }


def _modelnet() -> dict[str, Preset]:
    grid = {"inputs": _POINTS, "grid": (44, 44)}
    rows: dict[str, tuple[Values, str]] = {
        "perceiver_modelnet40": (_perceiver(_POINTS, cross_attends=2), "P Table 4: 85.7; OPEN: sharing"),
        "transformer_44x44": ({"kind": "transformer", **grid}, "P Table 4: 82.1; OPEN: depth and width"),
        "resnet50_modelnet40": ({"kind": "resnet", **grid}, "P Table 4: 66.3"),
        "pointnet2_modelnet40": ({"kind": "pointnet2", "inputs": {"kind": "points"}}, "P Table 4: 91.9 (Qi et al.)"),
    }
    for patch, accuracy in ((2, 78.9), (4, 73.4), (8, 65.3), (16, 59.6)):
        values = {"kind": "vit", "patch": patch, **grid}
        rows[f"vit_b{patch}_modelnet40"] = (values, f"P Table 4: {accuracy}; OPEN: padding of 44 to patches")
    return {name: Preset(values, 40, note) for name, (values, note) in rows.items()}


def _image_and_text(image: Values, text: Values) -> Values:
    return {"kind": "multimodal", "modalities": {"image": {"kind": "image", **image}, "text": {"kind": "text", **text}}}


def _gpv(*size: int) -> Values:
    inputs = _image_and_text({"size": size, "positions": _NONE}, {"length": 128, "channels": 768})
    return {"kind": "gpv", "inputs": inputs}


def _gpv_small() -> Values:
    layers = {"layers": 2, "heads": 4, "hidden": 192, "dropout": 0.0}
    return {
        "kind": "gpv",
        "inputs": _image_and_text({"size": (64, 64), "positions": _NONE}, {"length": 64, "channels": 64}),
        "detector": {"kind": "conv", **layers},
        "reader": layers,
        "points": 3,
        "width": 64,
        **{f"{part}_{key}": value for part in ("co", "decoder") for key, value in layers.items() if key != "dropout"},
        "dropout": 0.0,
    }


def _io_general() -> Values:
    inputs = _image_and_text(
        {"size": (224, 224), "positions": _fourier(64, 224, 224)},
        {"length": 2048, "channels": 256},
    )
    return _io(inputs, decoder={"kind": "general", "boxes": 100, "length": 129}, query_residual=False)


def _io_general_small() -> Values:
    inputs = _image_and_text(
        {"size": (64, 64), "front_end": "conv", "positions": _fourier(16, 16, 16)},
        {"length": 64, "channels": 96, "front_end": "conv"},
    )
    return _io(
        inputs,
        latents=32,
        latent_channels=128,
        latent_init_std=0.5,
        blocks=1,
        self_attends_per_block=3,
        heads=4,
        cross_heads=4,
        cross_qk_channels=128,
        cross_v_channels=128,
        decoder={"kind": "general", "init_std": 0.5},
        decoder_heads=4,
    )


def _others() -> dict[str, Preset]:
    flow = _io(
        {"kind": "flow_frames", "positions": _fourier(64, 368, 496)},
        latents=2048,
        latent_channels=512,
        blocks=1,
        self_attends_per_block=24,
        heads=16,
        query_residual=False,
        decoder={"kind": "flow", "scale": 0.2},
    )
    small = {
        "kind": "image",
        "channels": 1,
        "size": (28, 28),
        "mean": (0.1307,),
        "std": (0.3081,),
        "positions": _fourier(16, 28, 28),
    }
    general = {
        "gpv1": (_gpv(480, 640), "Gupta et al. 2022: 114M and BERT; here 85M that read bytes"),
        "gpv_small": (_gpv_small(), "GPV-1 at the size of a CPU"),
        "perceiver_io_general": (_io_general(), "Perceiver IO with the interface of GPV-1; not published"),
        "perceiver_io_general_small": (_io_general_small(), "the same at the size of a CPU"),
    }
    languages = {
        "perceiver_io_mlm_bytes": (_language(262, 2048, 1280, 26), "IO Table 1: 81.0 GLUE, 201M, 113G"),
        "perceiver_io_mlm_bytes_plus": (_language(262, 2048, 1536, 40), "IO Table 1: 81.8 GLUE, 425M, 241G"),
        "perceiver_io_mlm_sentencepiece": (_language(32_000, 512, 1280, 26), "IO Table 1: 81.2, 223M, 119G"),
    }
    return {
        **{
            name: Preset(values, None, note, _REMARKS.get(name, ""))
            for name, (values, note) in {**languages, **general}.items()
        },
        "perceiver_io_flow": Preset(flow, None, "IO §4.2, App. H: Sintel 1.81 / 2.42, KITTI 4.98"),
        "perceiver_io_kinetics": Preset(_kinetics(784), None, "IO §4.3, App. I: 88x compression, 20.0M"),
        "perceiver_io_kinetics_176x": Preset(_kinetics(392), None, "IO §4.3: 176x compression"),
        "perceiver_io_kinetics_352x": Preset(_kinetics(196), None, "IO §4.3: 352x compression"),
        "perceiver_digits": Preset(
            _perceiver(small, latents=32, latent_channels=64, cross_attends=3, self_attends_per_block=2, heads=4),
            10,
            "A small one for 28 x 28 digits on a CPU",
        ),
    }


PRESETS: dict[str, Preset] = {**_imagenet(), **_audio(), **_modelnet(), **_others()}


def list_models(pattern: str = "*") -> list[str]:
    """Return the presets' names that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(PRESETS, pattern))


def preset_values(name: str, changes: Mapping[str, Any]) -> Values:
    """Return a preset's `model:` section with changes: mappings are merged into its own, other values replace them.

    A mapping of another `kind` replaces the whole.

    Raises:
        UserError: there is no such preset, or the changes name another kind of model.
    """
    preset = PRESETS.get(name)
    if preset is None:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`perceiver models` lists them"
        raise UserError(f"model.preset: got {name!r}; wanted the name of a preset: {hint}")
    kind = preset.model["kind"]
    if changes.get("kind", kind) != kind:
        got = changes["kind"]
        raise UserError(f"model.kind: got {got!r} with the preset {name!r}, which is {kind!r}: leave kind out")
    return _merged(preset.model, changes)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Values:
    result = dict(base)
    for key, value in changes.items():
        old: Any = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        if both and value.get("kind", old.get("kind")) == old.get("kind"):
            value = _merged(old, value)
        result[key] = value
    return result
