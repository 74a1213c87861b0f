"""Conversion of weights to and from the `transformers` library's Perceiver: the three image heads, masked language,
sequence classification, optical flow and multimodal autoencoding.

Both directions rename tensors, so nothing is lost; `to_transformers` also folds two settings into weights. That library
uses the exact GELU and symmetric padding in its convolution where the official JAX code has the tanh form and
TensorFlow's SAME; the imported configs set the former.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from perceiver.attention import Activation
from perceiver.baselines._grid import transformers_library
from perceiver.config import UserError
from perceiver.export.transformers_names import MODALITIES, paired
from perceiver.factory import PerceiverIOModel, build_model
from perceiver.modalities.image import ImageConfig
from perceiver.modalities.multimodal import MultimodalConfig
from perceiver.model import PerceiverIO

_HEADS = {
    ("image", "class"): "PerceiverForImageClassification",
    ("text", "tokens"): "PerceiverForMaskedLM",
    ("text", "class"): "PerceiverForSequenceClassification",
    ("flow_frames", "flow"): "PerceiverForOpticalFlow",
    ("multimodal", "multimodal"): "PerceiverForMultimodalAutoencoding",
}
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
}
"""Our activation for each of the library's; the first of several is the one that is written."""
FLOW_SCALE = 0.01
"""Factor from the last layer of the library's optical flow to pixels."""
_FRONT_ENDS = {"none": "Fourier", "1x1": "Learned", "conv": "ConvProcessing"}


def from_transformers(model: Any, **inputs: Any) -> PerceiverIO:
    """Build our Perceiver IO with the weights of a `transformers` Perceiver head.

    Args:
        model: an instance of one of the seven head classes.
        inputs: keys of our inputs to replace, such as `size=(256, 256)` for images. Without it images have the size
            that the head was trained with, see `_side`.

    Returns:
        A model in evaluation mode that gives the same outputs. Its inputs are ours: raw frames for flow, `audio`,
        `video` and `label` for autoencoding (flow comes as (B, 2, H, W), signals as (B, elements, values)).

    Raises:
        UserError: the class is another.
    """
    head = type(model).__name__
    if head not in READERS:
        raise UserError(f"model: got {head}; wanted one of {', '.join(READERS)}")
    config = _settings(model, **inputs)
    ours = build_model(config, classes=model.config.num_labels)
    state = model.state_dict()
    taken = {mine: _shaped(state[theirs], target) for mine, theirs, target in paired(config, ours)}
    ours.load_state_dict(taken)
    return cast(PerceiverIO, ours.eval())


def to_transformers(model: nn.Module) -> Any:
    """Build the `transformers` head that matches a Perceiver IO of ours, with its weights.

    Raises:
        UserError: the library has no head for this model, or the head fixes another value of a setting.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PerceiverIOModel):
        raise UserError(
            f"model.kind: got {getattr(config, 'kind', '')}; wanted perceiver_io: the transformers library's "
            "Perceiver reads its inputs once and has a decoder; --format safetensors and onnx take every model"
        )
    inputs, decoder = cast(Any, config.inputs), cast(Any, config.decoder)
    head = _HEADS.get((inputs.kind, decoder.kind))
    if head is None:
        raise UserError(f"model: got inputs {inputs.kind} with decoder {decoder.kind}; wanted a pair of {list(_HEADS)}")
    if head == "PerceiverForImageClassification":
        head += _FRONT_ENDS.get(inputs.front_end, "Fourier")
    config, state = _folded(config, model.state_dict())
    theirs = _their_model(head, config, model)
    _refuse_differences(config, _settings(theirs), model, head)
    target = theirs.state_dict()
    target.update({name: _shaped(state[mine], target[name]) for mine, name, _ in paired(config, model)})
    theirs.load_state_dict(target)
    return theirs.eval()


def _settings(model: Any, **inputs: Any) -> PerceiverIOModel:
    """Return the config of our model that computes what a head of the library computes; `inputs` replace keys."""
    decoder = model.perceiver.decoder
    attention = getattr(decoder, "decoder", decoder).decoding_cross_attention.attention.self
    values = {
        **_common(model.config),
        "decoder_heads": attention.num_heads,
        "decoder_qk_channels": attention.query.out_features,
        "decoder_v_channels": attention.value.out_features,
        **READERS[type(model).__name__](model.config),
    }
    values["inputs"] |= inputs
    return PerceiverIOModel.model_validate(values)


def _shaped(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.reshape(like.shape)


def _folded(config: PerceiverIOModel, state: dict[str, Tensor]) -> tuple[PerceiverIOModel, dict[str, Tensor]]:
    """Return config and state of a model that computes the same with the settings that the library's heads fix.

    Its classifiers add the query to the decoder's answer: the one learned query is subtracted from the bias. Its flow
    is divided by 100: the rest of the factor is multiplied into the last layer.
    """
    decoder, state = cast(Any, config.decoder), dict(state)
    if decoder.kind == "class" and not config.query_residual:
        config = config.model_copy(update={"query_residual": True})
        state["answer.attention.output.bias"] = state["answer.attention.output.bias"] - state["decoder.query"][0]
    elif decoder.kind == "flow" and decoder.scale != FLOW_SCALE:
        config = config.model_copy(update={"decoder": decoder.model_copy(update={"scale": FLOW_SCALE})})
        for name in ("decoder.head.weight", "decoder.head.bias"):
            state[name] = state[name] * (decoder.scale / FLOW_SCALE)
    return config, state


def _refuse_differences(ours: PerceiverIOModel, theirs: PerceiverIOModel, model: nn.Module, head: str) -> None:
    """Raise a `UserError` if the head would compute another function; `model` is built from `ours`."""
    mine, other = (_compared(config, cast(Any, model).inputs) for config in (ours, theirs))
    for key in mine:
        if mine[key] != other[key]:
            raise UserError(
                f"model.{key}: got {mine[key]}; wanted {other[key]} for transformers' {head}: this model cannot be "
                "expressed there"
            )


def _compared(config: PerceiverIOModel, inputs: Any) -> dict[str, Any]:
    """Return the settings on which the function depends, with defaults filled in from the inputs' module."""
    values = config.model_dump(exclude={"attention", "checkpoint_activations", "latent_init_std"})
    width = values["latent_channels"]
    for prefix, default in (("", width), ("cross_", inputs.channels), ("decoder_", width)):
        qk = values[f"{prefix}qk_channels"] or default
        values |= {f"{prefix}qk_channels": qk, f"{prefix}v_channels": values[f"{prefix}v_channels"] or qk}
    values["share_blocks"] |= values["blocks"] == 1
    values["decoder"].pop("init_std", None)
    values["decoder"]["channels"] = values["decoder"].get("channels") or width
    several = values["inputs"].get("modalities", {})
    for part, module in ((values["inputs"], inputs), *((several[name], inputs.modalities[name]) for name in several)):
        for key in ("mean", "std", "dropout", "mask", "mask_unit", "init_std", "position_init_std"):
            part.pop(key, None)
        if "front_end_channels" in part:
            part["front_end_channels"] = part["front_end_channels"] or {"conv": 64, "1x1": 256}.get(part["front_end"])
        if isinstance(positions := part.get("positions"), dict):
            positions.pop("init_std", None)
            if positions["kind"] == "fourier":
                positions["max_resolution"] = positions["max_resolution"] or module.positions.max_resolution
    return values


def _common(c: Any) -> dict[str, Any]:
    """Return the settings that all heads share, from the library's config."""
    cross = c.qk_channels
    if cross is None and c.cross_attention_shape_for_attention == "q":
        cross = c.d_latents
    return {
        "latents": c.num_latents,
        "latent_channels": c.d_latents,
        "blocks": c.num_blocks,
        "self_attends_per_block": c.num_self_attends_per_block,
        "heads": c.num_self_attention_heads,
        "cross_heads": c.num_cross_attention_heads,
        "qk_channels": c.qk_channels,
        "v_channels": c.v_channels,
        "cross_qk_channels": cross,
        "cross_v_channels": c.v_channels,
        "widening": c.self_attention_widening_factor,
        "cross_widening": c.cross_attention_widening_factor,
        "activation": _activation(c.hidden_act),
        "encoder_query_residual": c.use_query_residual,
    }


def _activation(name: Any) -> Activation:
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UserError(f"hidden_act: got {name!r:.80}; wanted one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


_UNSET, _TRAINED = 56, 224
"""The library's default of `image_size`, and the side of the images that DeepMind's models with this value take."""


def _side(c: Any) -> tuple[int, int]:
    """Return height and width of the images of a head with Fourier positions, which computes nothing from them.

    DeepMind's checkpoints keep the default, which is no size. Our exports have a list.
    """
    side = _TRAINED if c.image_size == _UNSET else c.image_size
    return (side, side) if isinstance(side, int) else tuple(side)


def _image(c: Any, **changes: Any) -> dict[str, Any]:
    return {"inputs": {"kind": "image", "size": _side(c), **changes}, "decoder": {"kind": "class"}}


def _fourier(*rates: float, bands: int = 64) -> dict[str, Any]:
    return {"kind": "fourier", "bands": bands, "max_resolution": rates}


def _learned(c: Any) -> dict[str, Any]:
    positions = {"kind": "learned", "channels": 256, "init_std": 0.02, "projection": 256}
    size = (c.image_size, c.image_size)  # the table of positions has as many rows
    return _image(c, size=size, front_end="1x1", front_end_channels=256, positions=positions)


def _text(c: Any) -> dict[str, Any]:
    return {
        "kind": "text",
        "vocabulary": c.vocab_size,
        "length": c.max_position_embeddings,
        "channels": c.d_model,
    }


def _masked_language(c: Any) -> dict[str, Any]:
    return {
        "inputs": _text(c),
        "decoder": {"kind": "tokens"},
        "query_residual": False,
    }


def _flow(c: Any) -> dict[str, Any]:
    size = tuple(c.train_size)
    inputs = {"kind": "flow_frames", "size": size, "positions": _fourier(*size)}
    return {"inputs": inputs, "decoder": {"kind": "flow", "scale": FLOW_SCALE}, "query_residual": False}


def _multimodal(c: Any) -> dict[str, Any]:
    samples = c.num_frames * c.audio_samples_per_frame
    rates = (c.num_frames, c.image_size, c.image_size)  # no size: it only sets the frequencies
    video = {
        "kind": "video",
        "frames": c.num_frames,
        "size": tuple(c.output_shape[2:]),
        "patch": (1, 4, 4),
        "positions": _fourier(*rates, bands=32),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }
    audio = {
        "kind": "audio",
        "samples": samples,
        "patch": c.samples_per_patch,
        "positions": _fourier(samples, bands=192),
    }
    label = {"kind": "label", "classes": c.num_labels}
    outputs = {
        "audio": {
            "grid": (samples // c.samples_per_patch,),
            "values": c.samples_per_patch,
            "bands": 192,
            "max_resolution": (samples,),
        },
        "video": {"grid": tuple(c.output_shape[1:]), "values": 3, "bands": 32, "max_resolution": rates},
        "label": {"classes": c.num_labels, "channels": c._label_trainable_num_channels},
    }
    inputs = {
        "kind": "multimodal",
        "modalities": {"audio": audio, "video": video, "label": label},
        "mask": {"audio": 0.0, "video": 0.0, "label": 0.5},
        "hide": ("label",),
    }
    decoder = {"kind": "multimodal", "modalities": outputs, "answer_channels": c.output_num_channels}
    return {"inputs": inputs, "decoder": decoder, "query_residual": False}


READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "PerceiverForImageClassificationFourier": lambda c: _image(c, positions=_fourier(224, 224)),
    "PerceiverForImageClassificationLearned": _learned,
    "PerceiverForImageClassificationConvProcessing": lambda c: _image(
        c, front_end="conv", conv_padding="symmetric", positions=_fourier(56, 56)
    ),
    "PerceiverForMaskedLM": _masked_language,
    "PerceiverForSequenceClassification": lambda c: {"inputs": _text(c), "decoder": {"kind": "class"}},
    "PerceiverForOpticalFlow": _flow,
    "PerceiverForMultimodalAutoencoding": _multimodal,
}


def _their_model(head: str, c: PerceiverIOModel, model: nn.Module) -> Any:
    """Build the library's head with the settings of ours."""
    transformers = transformers_library()
    inputs = cast(Any, c.inputs)
    values: dict[str, Any] = {
        "num_latents": c.latents,
        "d_latents": c.latent_channels,
        "num_blocks": c.blocks,
        "num_self_attends_per_block": c.self_attends_per_block,
        "num_self_attention_heads": c.heads,
        "num_cross_attention_heads": c.cross_heads,
        "qk_channels": c.qk_channels,
        "v_channels": c.v_channels,
        "self_attention_widening_factor": int(c.widening),
        "cross_attention_widening_factor": int(c.cross_widening),
        "hidden_act": next(name for name, ours in _ACTIVATIONS.items() if ours == c.activation),
        "use_query_residual": c.encoder_query_residual,
        "attention_probs_dropout_prob": 0.0,
    }
    if c.qk_channels is None and _widths(c, model) != (cast(Any, model.inputs).channels, c.latent_channels):
        values["cross_attention_shape_for_attention"] = "q"
    if inputs.kind == "image":
        values |= {"image_size": _their_side(inputs), "num_labels": _classes(model)}
    elif inputs.kind == "text":
        values |= {
            "vocab_size": inputs.vocabulary,
            "max_position_embeddings": inputs.length,
            "d_model": inputs.channels,
        }
        if head.endswith("SequenceClassification"):
            values["num_labels"] = _classes(model)
    elif inputs.kind == "flow_frames":
        values["train_size"] = list(inputs.size)
    else:
        values |= _their_multimodal(inputs, cast(Any, c.decoder))
    return getattr(transformers, head)(transformers.PerceiverConfig(**values))


def _widths(c: PerceiverIOModel, model: nn.Module) -> tuple[int, int]:
    """Return the query/key widths that the library derives from one setting: of reading, and of the decoder.

    The decoder of tokens has one of its own there, and that of classes has queries as wide as the latents.
    """
    derived = cast(Any, c.decoder).kind in ("flow", "multimodal")
    decoder = c.decoder_qk_channels if derived else None
    return c.cross_qk_channels or cast(Any, model.inputs).channels, decoder or c.latent_channels


def _their_side(inputs: ImageConfig) -> int | list[int]:
    """Return `image_size`, of a learned table a number; otherwise a list, which the library's default is not."""
    if inputs.front_end != "1x1":
        return list(inputs.size)
    if inputs.size[0] != inputs.size[1]:
        raise UserError(
            f"model.inputs.size: got {list(inputs.size)}; wanted a square, for learned positions in transformers"
        )
    return inputs.size[0]


def _classes(model: nn.Module) -> int:
    return cast(Any, model.decoder).heads[0].out_features


def _their_multimodal(inputs: MultimodalConfig, decoder: Any) -> dict[str, Any]:
    if set(inputs.modalities) != set(MODALITIES) or set(decoder.modalities) != set(MODALITIES):
        raise UserError(f"model.inputs.modalities: got {sorted(inputs.modalities)}; wanted {sorted(MODALITIES)}")
    audio, video, label = (cast(Any, inputs.modalities[n]) for n in ("audio", "video", "label"))
    return {
        "num_frames": video.frames,
        "image_size": int(decoder.modalities["video"].max_resolution[-1]),
        "audio_samples_per_frame": audio.samples // video.frames,
        "samples_per_patch": audio.patch,
        "num_labels": label.classes,
        "output_shape": [1, *decoder.modalities["video"].grid],
        "output_num_channels": decoder.answer_channels,
        "_label_trainable_num_channels": decoder.modalities["label"].channels,
    }
