"""Names of tensors in our Perceiver IO and in the `transformers` library's heads."""

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from perceiver.factory import PerceiverIOModel
from perceiver.modalities.image import ImageConfig

Names = Iterator[tuple[str, str]]
_ATTENTION = {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value"}
MODALITIES = {"audio": "audio", "video": "image", "label": "label"}
"""Our names of the modalities, and the library's."""


def _layer(mine: str, theirs: str, *, cross: bool) -> Names:
    """Yield pairs of module names of an attention layer."""
    yield f"{mine}.query_norm" if cross else f"{mine}.norm", f"{theirs}.attention.self.layernorm1"
    if cross:
        yield f"{mine}.attention.input_norm", f"{theirs}.attention.self.layernorm2"
    for name, other in _ATTENTION.items():
        yield f"{mine}.attention.{name}", f"{theirs}.{other}"
    yield f"{mine}.attention.output", f"{theirs}.attention.output.dense"
    yield f"{mine}.mlp_norm", f"{theirs}.layernorm"
    yield f"{mine}.mlp.expand", f"{theirs}.mlp.dense1"
    yield f"{mine}.mlp.contract", f"{theirs}.mlp.dense2"


def _modules(config: PerceiverIOModel) -> Names:
    """Yield pairs of names of modules and parameters: ours, theirs."""
    inputs, kind = cast(Any, config.inputs), cast(Any, config.decoder).kind
    decoder = "perceiver.decoder" if kind == "tokens" else "perceiver.decoder.decoder"
    yield "latents", "perceiver.embeddings.latents"
    yield from _layer("encoder", "perceiver.encoder.cross_attention", cross=True)
    for i in range(config.self_attends_per_block):
        yield from _layer(f"blocks.0.{i}", f"perceiver.encoder.self_attends.{i}", cross=False)
    yield from _layer("answer", f"{decoder}.decoding_cross_attention", cross=True)
    yield from _input_modules(inputs)
    if kind in ("class", "tokens"):
        yield "decoder.query", f"{decoder}.output_position_encodings.position_embeddings"
    if kind == "tokens":
        yield "decoder.bias", "embedding_decoder.bias"
    elif kind == "class":
        yield "decoder.heads.0", f"{decoder}.final_layer"
    elif kind == "flow":
        yield "decoder.head", f"{decoder}.final_layer"
    else:
        yield "decoder.project", f"{decoder}.final_layer"
        label = "perceiver.decoder.modalities.label.decoder.output_position_encodings.position_embeddings"
        yield "decoder.labels.label", label
        for mine, theirs in MODALITIES.items():
            yield f"decoder.padding.{mine}", f"perceiver.decoder.padding.{theirs}"
            yield f"decoder.heads.{mine}", f"perceiver.output_postprocessor.modalities.{theirs}.classifier"


def _input_modules(inputs: Any) -> Names:
    pre = "perceiver.input_preprocessor"
    if isinstance(inputs, ImageConfig) and inputs.front_end == "conv":
        yield "inputs.front_end.conv", f"{pre}.convnet.conv"
        yield "inputs.front_end.norm", f"{pre}.convnet.batchnorm"
    elif isinstance(inputs, ImageConfig) and inputs.front_end == "1x1":
        yield "inputs.front_end", f"{pre}.convnet_1x1"
        yield "inputs.positions.table", f"{pre}.position_embeddings.position_embeddings"
        yield "inputs.positions.projection", f"{pre}.positions_projection"
    elif inputs.kind == "text":
        yield "inputs.tokens", f"{pre}.embeddings"
        yield "inputs.positions", f"{pre}.position_embeddings.weight"
    elif inputs.kind == "flow_frames":
        yield "inputs.front_end", f"{pre}.conv_after_patches"
    elif inputs.kind == "multimodal":
        for mine, theirs in MODALITIES.items():
            yield f"inputs.padding.{mine}", f"{pre}.padding.{theirs}"
            yield f"inputs.masks.{mine}", f"{pre}.mask.{theirs}"


def paired(config: PerceiverIOModel, ours: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (our tensor's name, theirs, our tensor) for each tensor of our state."""
    names = dict(_modules(config))
    for name, tensor in ours.state_dict().items():
        if name in names:
            yield name, names[name], tensor
        else:
            module, _, leaf = name.rpartition(".")
            yield name, f"{names[module]}.{leaf}", tensor
