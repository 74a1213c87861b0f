"""Perceiver and Perceiver IO: read the inputs into latents, process the latents, decode the output.

Sources: Perceiver (arXiv 2103.03206v2) §3, §4.1, App. C; Perceiver IO (arXiv 2107.14795) §3, App. E; weight sharing as
Perceiver Table 7 counts it: the first cross-attend has its own weights, the others share one set, and all latent
Transformers share theirs.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver.attention import Activation, AttentionKind, CrossAttend, CrossAttention, SelfAttend, zero_linear
from perceiver.config import Config, Layers, Real, Scale, Size, UserError, Widening
from perceiver.kernels.compiled import CompiledLayers
from perceiver.positions import Inputs

Raw = Tensor | Mapping[str, Tensor]


MOST_LAYERS = 2_000
"""Layers of latent Transformers that are applied to a sample."""


class EncoderConfig(Config):
    """Settings that Perceiver and Perceiver IO share: the latents and their layers."""

    latents: Size = Field(default=512, description="Number of latents N.")
    latent_channels: Size = Field(default=1024, description="Width D of a latent.")
    latent_init_std: Scale = Field(
        default=0.02, description="Scale of the truncated normal (cut at 2 sigma) that the latents start from."
    )
    self_attends_per_block: int = Field(
        default=6, ge=0, le=1000, description="Self-attention layers in a latent Transformer."
    )
    heads: Size = Field(default=8, description="Heads of a self-attention.")
    cross_heads: Size = Field(default=1, description="Heads of a cross-attention that reads inputs.")
    qk_channels: Size | None = Field(default=None, description="Query/key width of self-attention; D by default.")
    v_channels: Size | None = Field(default=None, description="Value width of self-attention; qk_channels by default.")
    cross_qk_channels: Size | None = Field(
        default=None, description="Query/key width of reading; input width by default."
    )
    cross_v_channels: Size | None = Field(
        default=None, description="Value width of reading; cross_qk_channels by default."
    )
    widening: Widening = Field(default=1, description="Inner width of a self-attention layer's MLP over D.")
    cross_widening: Widening = Field(default=1, description="Inner width of a cross-attention layer's MLP over D.")
    activation: Activation = Field(default="gelu_tanh", description="MLP activation; gelu_tanh is the papers'.")
    stochastic_depth: Real = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Probability that training skips the last layer for a sample; it grows linearly from 0 at the "
        "first layer.",
    )
    attention: AttentionKind = Field(
        default="auto", description="Path of the cross-attentions; 'plain' is the reference."
    )
    checkpoint_activations: bool = Field(
        default=False, description="Recompute each layer in the backward pass: less memory, a third more time."
    )

    @model_validator(mode="after")
    def _few_layers(self) -> "EncoderConfig":
        blocks = getattr(self, "blocks", None) or getattr(self, "cross_attends", 1)
        if blocks * self.self_attends_per_block > MOST_LAYERS:
            raise ValueError(
                f"{blocks} blocks with self_attends_per_block = {self.self_attends_per_block} are more than "
                f"{MOST_LAYERS:,} layers: lower one of them"
            )
        return self


class PerceiverConfig(EncoderConfig):
    """Perceiver: several cross-attends, each followed by a latent Transformer; the latents' mean is classified."""

    cross_attends: Layers = Field(default=8, description="Number of cross-attends.")
    blocks: int | None = Field(
        default=None, ge=0, le=1000, description="Latent Transformers; one for each cross-attend by default."
    )
    placement: Literal["interleaved", "start"] = Field(
        default="interleaved", description="Cross-attends spread between the blocks, or all before the first block."
    )
    share: Literal["paper", "none", "all"] = Field(
        default="paper",
        description="Weights: 'paper' (first cross-attend apart, the rest shared), 'none', or 'all' shared.",
    )


class PerceiverIOConfig(EncoderConfig):
    """Perceiver IO: one cross-attend, blocks of self-attends, and a cross-attention decoder with output queries."""

    blocks: Layers = Field(default=8, description="Number of times the block of self-attends is applied.")
    share_blocks: bool = Field(default=True, description="Whether the blocks share one set of weights.")
    query_residual: bool = Field(
        default=True, description="Whether the decoder adds the output query to the result of its attention."
    )
    encoder_query_residual: bool = Field(
        default=True, description="Whether the encoder adds the latents to what it reads."
    )
    decoder_heads: Size = Field(default=1, description="Heads of the decoder's cross-attention.")
    decoder_qk_channels: Size | None = Field(default=None, description="Decoder query/key width; D by default.")
    decoder_v_channels: Size | None = Field(
        default=None, description="Decoder value width; decoder_qk_channels by default."
    )
    decoder_widening: Widening = Field(default=1, description="Inner width of the decoder's MLP.")


class Modality(Protocol):
    """Turns raw tensors into inputs; an nn.Module of `perceiver.modalities`."""

    keys: tuple[str, ...]
    channels: int

    def __call__(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map the raw tensors under `keys` to inputs of `channels` channels."""
        ...


class Decoder(Protocol):
    """Makes output queries and turns the decoder's answers into outputs; an nn.Module of `perceiver.decoders`."""

    channels: int
    output_channels: int

    def queries(self, inputs: Inputs, asked: Mapping[str, Tensor] | None) -> Inputs:
        """Return the queries: their `dense` array is (B, O, channels)."""
        ...

    def outputs(self, answers: Tensor, asked: Mapping[str, Tensor] | None) -> Any:
        """Map the answers (B, O, output_channels) to the model's output."""
        ...


def need_classes(classes: int | None) -> int:
    """Return the number of classes.

    Raises:
        UserError: it is None; a classifier cannot be built without it.
    """
    if classes is None:
        raise UserError("classes: got None for a classifier; wanted the number of classes: pass classes=")
    return classes


def latent_array(latents: int, channels: int, std: float) -> nn.Parameter:
    """Make an (N, D) learned array, truncated normal cut at two sigma (Perceiver App. C; Haiku's bounds)."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(latents, channels), std=std, a=-2 * std, b=2 * std))


def numbered(name: str, layers: nn.Module) -> list[str]:
    """Return the names of the modules in a list of that name."""
    return [f"{name}.{number}" for number in range(len(cast(nn.ModuleList, layers)))]


class Encoder(nn.Module):
    """Base of the models: inputs, latents, and layers with or without activation checkpointing."""

    def __init__(self, config: EncoderConfig, inputs: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.inputs = inputs
        self.latents = latent_array(config.latents, config.latent_channels, config.latent_init_std)
        self.compiled: CompiledLayers | None = None
        """Set to compile the layers for training (`train.compile`)."""
        self.half_residual = False
        """Whether the latents between layers are in autocast's type (`train.bf16_residual`); float32 by default."""

    @property
    def input_keys(self) -> tuple[str, ...]:
        """Names of the raw tensors that the model reads."""
        return cast(Modality, self.inputs).keys

    @property
    def optional_keys(self) -> tuple[str, ...]:
        """Names of raw tensors, such as masks, that the model reads if they are given."""
        return tuple(getattr(self.inputs, "optional_keys", ()))

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for each input key."""
        return cast(Any, self.inputs).example(batch, device)

    def read(self, raw: Raw) -> tuple[Tensor, Inputs]:
        """Return the initial latents (1, N, D), the same for every sample, and the batch's inputs."""
        tensors = raw if isinstance(raw, Mapping) else {self.input_keys[0]: raw}
        dtype = torch.float64 if self.latents.dtype == torch.float64 else torch.float32
        inputs = self.inputs(tensors, dtype)
        latents, device = self.latents[None], self.latents.device.type
        if self.half_residual and torch.is_autocast_enabled(device):
            latents = latents.to(torch.get_autocast_dtype(device))
        return latents, inputs

    def run(self, layer: nn.Module, *args: Any) -> Tensor:
        """Apply a layer, compiled and with activation checkpointing if configured."""
        if isinstance(layer, CrossAttend):
            layer.attention.share(*args)
        apply = layer
        if self.compiled is not None:
            self.compiled.prove(layer, *args)
            apply = partial(self.compiled, layer)
        if self.config.checkpoint_activations and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(apply, *args, use_reentrant=False))
        return apply(*args)

    def apply_layers(self, x: Tensor, inputs: Inputs, layers: Sequence[nn.Module]) -> Tensor:
        """Apply layers in order; cross-attends read the inputs. In training, samples skip layers at random.

        Stochastic depth (arXiv 1603.09382), per sample: what a layer adds to the latents is dropped with a probability
        that grows linearly to `stochastic_depth` at the last layer, and is otherwise divided by that of keeping it.
        """
        last = max(1, len(layers) - 1)
        for number, layer in enumerate(layers):
            y = self.run(layer, x, inputs) if isinstance(layer, CrossAttend) else self.run(layer, x)
            rate = self.config.stochastic_depth * number / last if self.training else 0.0
            if rate:
                kept = torch.rand(len(y), 1, 1, device=y.device) >= rate
                y = x + (y - x) * (kept.to(y.dtype) / (1 - rate))
            x = y
        return x

    def self_attends(self) -> nn.ModuleList:
        """Make one block of self-attention layers."""
        c = self.config
        return nn.ModuleList(
            SelfAttend(
                c.latent_channels,
                c.heads,
                widening=c.widening,
                activation=c.activation,
                qk_channels=c.qk_channels,
                v_channels=c.v_channels,
            )
            for _ in range(c.self_attends_per_block)
        )

    def cross_attend(self, *, residual: bool = True) -> CrossAttend:
        """Make one layer that reads the inputs into the latents."""
        c = self.config
        attention = CrossAttention(
            c.latent_channels,
            cast(Modality, self.inputs).channels,
            heads=c.cross_heads,
            qk_channels=c.cross_qk_channels,
            v_channels=c.cross_v_channels,
            kind=c.attention,
        )
        return CrossAttend(attention, residual=residual, widening=c.cross_widening, activation=c.activation)


class Perceiver(Encoder):
    """Perceiver classifier.

    Args:
        config: depth, widths and sharing.
        inputs: a modality module.
        classes: number of outputs K.
    """

    config: PerceiverConfig

    def __init__(self, config: PerceiverConfig, inputs: nn.Module, classes: int) -> None:
        super().__init__(config, inputs)
        self.schedule = perceiver_schedule(config)
        crosses = 1 + max(i for kind, i in self.schedule if kind == "cross")
        blocks = 1 + max((i for kind, i in self.schedule if kind == "block"), default=-1)
        self.cross_attends = nn.ModuleList(self.cross_attend() for _ in range(crosses))
        self.blocks = nn.ModuleList(self.self_attends() for _ in range(blocks))
        self.head = zero_linear(config.latent_channels, classes)

    def layer_names(self) -> list[str]:
        """Return the names of the cross-attends and self-attends by their first application; each has its weights."""
        names: list[str] = []
        for kind, index in dict.fromkeys(self.schedule):
            if kind == "cross":
                names.append(f"cross_attends.{index}")
            else:
                names += numbered(f"blocks.{index}", self.blocks[index])
        return names

    def encode(self, raw: Raw) -> Tensor:
        """Return the final latents (B, N, D)."""
        layers: list[nn.Module] = []
        for kind, index in self.schedule:
            layers += [self.cross_attends[index]] if kind == "cross" else cast(nn.ModuleList, self.blocks[index])
        return self.apply_layers(*self.read(raw), layers)

    def forward(self, raw: Raw) -> Tensor:
        """Return logits (B, K): the latents' mean, then one linear layer (Perceiver App. F)."""
        return self.head(self.encode(raw).mean(1))

    @torch.no_grad()
    def attention_scores(self, raw: Raw) -> list[Tensor]:
        """Return the scores before the softmax (B, heads, N, M) of each cross-attend in order, by the plain path."""
        x, inputs = self.read(raw)
        scores = []
        for kind, index in self.schedule:
            if kind == "cross":
                layer = cast(CrossAttend, self.cross_attends[index])
                scores.append(layer.attention.scores(layer.query_norm(x), inputs))
                x = layer(x, inputs)
            else:
                for layer in cast(nn.ModuleList, self.blocks[index]):
                    x = layer(x)
        return scores


def perceiver_schedule(config: PerceiverConfig) -> list[tuple[Literal["cross", "block"], int]]:
    """Return the order of application: (kind, index of the set of weights) per cross-attend and block."""
    blocks = config.cross_attends if config.blocks is None else config.blocks
    order: list[tuple[Literal["cross", "block"], int]] = []
    crosses = config.cross_attends
    due = [0 if config.placement == "start" else i * blocks // crosses for i in range(crosses)]
    for block in range(blocks + 1):
        order.extend(("cross", i) for i, at in enumerate(due) if at == block)
        if block < blocks:
            order.append(("block", block))
    cross_set = {"paper": lambda i: min(i, 1), "none": lambda i: i, "all": lambda i: 0}[config.share]
    return [(kind, cross_set(i) if kind == "cross" else (i if config.share == "none" else 0)) for kind, i in order]


class PerceiverIO(Encoder):
    """Perceiver IO: encode, process, decode.

    Args:
        config: depth and widths.
        inputs: a modality module.
        decoder: makes the output queries and the outputs (`perceiver.decoders`).
    """

    config: PerceiverIOConfig

    def __init__(self, config: PerceiverIOConfig, inputs: nn.Module, decoder: nn.Module) -> None:
        super().__init__(config, inputs)
        self.encoder = self.cross_attend(residual=config.encoder_query_residual)
        self.blocks = nn.ModuleList(self.self_attends() for _ in range(1 if config.share_blocks else config.blocks))
        self.decoder = decoder
        sizes = cast(Decoder, decoder)
        attention = CrossAttention(
            sizes.channels,
            config.latent_channels,
            heads=config.decoder_heads,
            qk_channels=config.decoder_qk_channels,
            v_channels=config.decoder_v_channels,
            output_channels=sizes.output_channels,
            kind="plain" if config.attention == "plain" else "auto",
        )
        self.answer = CrossAttend(
            attention,
            residual=config.query_residual,
            widening=config.decoder_widening,
            activation=config.activation,
        )

    def layer_names(self) -> list[str]:
        """Return the names of the encoder and the self-attends; what decodes is the head."""
        blocks = enumerate(self.blocks)
        return ["encoder", *(name for i, block in blocks for name in numbered(f"blocks.{i}", block))]

    def encode(self, raw: Raw) -> tuple[Tensor, Inputs]:
        """Return the final latents (B, N, D) and the inputs they were read from."""
        x, inputs = self.read(raw)
        layers: list[nn.Module] = [self.encoder]
        for i in range(self.config.blocks):
            layers += cast(nn.ModuleList, self.blocks[i % len(self.blocks)])
        return self.apply_layers(x, inputs, layers), inputs

    def forward(self, raw: Raw, asked: Mapping[str, Tensor] | None = None) -> Any:
        """Return the decoder's outputs; `asked` has per-sample query indices for decoders that subsample."""
        x, inputs = self.encode(raw)
        decoder = cast(Decoder, self.decoder)
        queries = decoder.queries(inputs, asked).dense.to(x.dtype)
        return decoder.outputs(self.run(self.answer, queries, Inputs(x)), asked)

    @torch.no_grad()
    def attention_scores(self, raw: Raw) -> list[Tensor]:
        """Return the scores before the softmax (B, heads, N, M) of the one cross-attend that reads."""
        x, inputs = self.read(raw)
        return [self.encoder.attention.scores(self.encoder.query_norm(x), inputs)]

    @torch.no_grad()
    def output_attention(self, raw: Raw) -> Tensor:
        """Return what the outputs attend to (B, O, M): the decoder's weights of the latents times theirs of the inputs.

        Both are means over heads. What the latents exchange between each other is left out.
        """
        x, inputs = self.encode(raw)
        queries = cast(Decoder, self.decoder).queries(inputs, None).dense.to(x.dtype)
        latents = self.answer.attention.scores(self.answer.query_norm(queries), Inputs(x)).softmax(-1).mean(1)
        read = self.encoder.attention.scores(self.encoder.query_norm(self.latents[None]), inputs).softmax(-1).mean(1)
        return latents @ read
