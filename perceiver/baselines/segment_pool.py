"""Classifiers of weakly labelled recordings that pool over segments: embeddings, or a VGG-like network on log-mel.

Sources: Gemmeke et al. 2017 (mean); Kong et al. 2018, arXiv 1711.00927 (attention), and its later code; Yu et al. 2018,
arXiv 1803.02353 (multi-level attention); Hershey et al. 2017, arXiv 1609.09430 (VGGish).
"""

import itertools
import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.baselines._grid import Baseline, BaselineConfig
from perceiver.config import Config, Layers, Real, Size, UserError
from perceiver.model import Raw, need_classes, numbered

SMALL = 1e-7
"""Attention of a class is between this and 1 less it before it is normalised over time, as in Kong's code."""
Level = Annotated[int, Field(ge=1, le=1000)]


class FrontConfig(Config):
    """A VGG-like network from a log-mel spectrogram to the embeddings of its segments; the defaults are VGGish's."""

    frames: Size = Field(default=96, description="Frames of a segment, without overlap (0.96 s); a rest is left out.")
    widths: tuple[Size, ...] = Field(default=(64, 128, 256, 512), description="Channels before each 2x2 max-pooling.")
    depths: tuple[Layers, ...] = Field(default=(1, 1, 2, 2), description="3x3 convolutions before each pooling.")
    hidden: tuple[Size, ...] = Field(default=(4096, 4096), description="Widths of the linear layers that follow.")
    channels: Size = Field(default=128, description="Values of an embedding, without an activation.")


class SegmentPoolConfig(BaselineConfig):
    """Layers on each segment, then pooling over the segments: the defaults are those of Kong et al. 2018.

    The inputs are a sequence of segments, such as kind embeddings; with `front` of kind mel, layout grid, without
    positions. The outputs are logits: pooled probabilities p give log(p / (1 - p)).
    """

    kind: Literal["segment_pool"] = "segment_pool"
    front: FrontConfig | None = Field(default=None, description="Network that makes the segments; null: the inputs.")
    widths: tuple[Size, ...] = Field(default=(500, 500, 500), description="Layers on each segment, with ReLU.")
    dropout: Real = Field(default=0.2, ge=0, lt=1, description="After each layer.")
    norm: bool = Field(default=False, description="Batch norm of the segments, and of each layer before its ReLU.")
    bias: bool = Field(default=True, description="Whether the layers have biases.")
    pool: Literal["mean", "max", "attention", "multi_level", "feature_attention"] = Field(
        default="attention",
        description="Mean or greatest of the segments' scores; attention over them per class; the same on several "
        "layers, joined by a linear one; attention per feature before a linear layer.",
    )
    attention: Literal["softmax", "sigmoid"] = Field(
        default="softmax",
        description="Activation of the attention, over the classes or of each, before it is normalised over time.",
    )
    levels: tuple[Level, ...] = Field(default=(2, 3), description="Layers that multi_level reads, from 1.")
    shared: bool = Field(default=False, description="One attention for all levels (Kong), else one for each (Yu).")
    output_norm: bool = Field(
        default=False, description="Batch norm of the maps of the attention and of the outputs of multi_level (Yu)."
    )

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module; `classes` is required."""
        return SegmentPool(self, need_classes(classes))


class Channels(nn.BatchNorm1d):
    """Batch norm of the last axis of (B, T, C) or (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised values."""
        return super().forward(x.flatten(0, -2)).view_as(x)


class Front(nn.Module):
    """See `FrontConfig`: images (B, 1, F, bins) to embeddings (B, F // frames, channels)."""

    def __init__(self, config: FrontConfig, grid: tuple[int, ...], channels: int) -> None:
        super().__init__()
        if len(grid) != 2:
            raise UserError(f"model.inputs: got a grid {grid} for model.front; wanted kind mel with layout grid")
        if grid[0] < config.frames or len(config.widths) != len(config.depths):
            raise UserError(
                f"model.front: got frames {config.frames} of {grid[0]}, {len(config.widths)} widths and "
                f"{len(config.depths)} depths; wanted at least one segment, and a depth for each width"
            )
        self.frames, self.segments = config.frames, grid[0] // config.frames
        layers: list[nn.Module] = []
        size = (config.frames, grid[1])
        for width, depth in zip(config.widths, config.depths, strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            size = (-(-size[0] // 2), -(-size[1] // 2))
        self.convolutions = nn.Sequential(*layers)
        sizes = [channels * math.prod(size), *config.hidden, config.channels]
        linear: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            linear += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.linear = nn.Sequential(*linear[:-1])

    def forward(self, image: Tensor) -> Tensor:
        """Return the embeddings."""
        parts = image[:, :, : self.segments * self.frames].unflatten(2, (self.segments, self.frames))
        x = self.convolutions(parts.transpose(1, 2).flatten(0, 1))
        return self.linear(x.flatten(1)).unflatten(0, (-1, self.segments))


class Attention(nn.Module):
    """Two maps of each segment: what it says, and how much it counts for each output."""

    def __init__(self, inputs: int, outputs: int, config: SegmentPoolConfig) -> None:
        super().__init__()
        self.softmax = config.attention == "softmax"
        self.says, self.counts = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
        self.says_norm, self.counts_norm = (
            Channels(outputs) if config.output_norm else nn.Identity() for _ in range(2)
        )
        for layer in (self.says, self.counts):
            _initialise(layer)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map segments (B, T, C) to (B, T, K) of what each says, and the log of its weight, which sums to 1 over T."""
        counts = self.counts_norm(self.counts(x)).float()
        counts = counts.softmax(-1) if self.softmax else counts.sigmoid()
        weight = counts.clamp(SMALL, 1 - SMALL).log().masked_fill(~mask[..., None], -math.inf)
        return self.says_norm(self.says(x)).float(), weight.log_softmax(1)


class SegmentPool(Baseline):
    """See `SegmentPoolConfig`."""

    def __init__(self, config: SegmentPoolConfig, classes: int) -> None:
        super().__init__(config)
        self.config = config
        self.front = Front(config.front, self.grid, self.channels) if config.front else None
        if self.front is None and len(self.grid) != 1:
            raise UserError(
                f"model.inputs: got inputs of grid {self.grid} without model.front; wanted a sequence of segments, as "
                "kind embeddings"
            )
        channels = config.front.channels if config.front else self.channels
        self.norm = Channels(channels) if config.norm else nn.Identity()
        sizes = [channels, *config.widths]
        self.layers = nn.ModuleList(self._layer(a, b) for a, b in itertools.pairwise(sizes))
        self._build_pooling(sizes, classes)

    def _layer(self, inputs: int, outputs: int) -> nn.Sequential:
        c = self.config
        linear = _initialise(nn.Linear(inputs, outputs, bias=c.bias))
        norm = [Channels(outputs)] if c.norm else []
        return nn.Sequential(linear, *norm, nn.ReLU(), nn.Dropout(c.dropout))

    def _build_pooling(self, sizes: list[int], classes: int) -> None:
        """Build the attention, one for each level or a shared one, and the last linear layer."""
        c = self.config
        levels = c.levels if c.pool == "multi_level" else (len(c.widths),)
        widths = [sizes[level] for level in levels if level <= len(c.widths)]
        if len(widths) < len(levels) or len(set(levels)) < len(levels) or (c.shared and len(set(widths)) > 1):
            raise UserError(
                f"model.levels: got {list(levels)} of layers of widths {list(c.widths)}; wanted each once, from 1 to "
                f"{len(c.widths)}, and of one width with shared"
            )
        self.levels, last, self.norm_last = levels, widths[-1], nn.Identity()
        outputs = last if c.pool == "feature_attention" else classes
        if c.pool in ("attention", "multi_level", "feature_attention"):
            count = 1 if c.shared else len(levels)
            self.pools = nn.ModuleList(Attention(width, outputs, c) for width in widths[:count])
        if c.pool == "feature_attention":
            self.norm_pooled = Channels(last)
        if c.pool == "multi_level":
            last = classes * len(levels)
            self.norm_last = Channels(classes) if c.output_norm else nn.Identity()
        if c.pool != "attention":
            self.head = _initialise(nn.Linear(last, classes))

    def layer_names(self) -> list[str]:
        """Return the names of the layers, in order."""
        return numbered("layers", self.layers)

    def forward(self, raw: Raw) -> Tensor:
        """Return logits (B, K)."""
        x, mask = self.tokens(raw) if self.front is None else (self.front(self.image(raw)), None)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        # A row without segments, as padding rows of a batch are, has no mean: all of its zeros count.
        mask = mask | ~mask.any(1, keepdim=True)
        states = [self.norm(x)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return self._pooled([states[level] for level in self.levels], mask)

    def _pooled(self, states: list[Tensor], mask: Tensor) -> Tensor:
        """Pool the states (B, T, C) of the levels."""
        c = self.config
        if c.pool in ("mean", "max"):
            scores = self.head(states[-1]).float()
            if c.pool == "max":
                return scores.masked_fill(~mask[..., None], -math.inf).amax(1)
            even = torch.zeros_like(scores).masked_fill(~mask[..., None], -math.inf)
            return mean_logits(scores, even.log_softmax(1))
        pools = itertools.cycle(self.pools)
        found = [pool(state, mask) for pool, state in zip(pools, states, strict=False)]
        if c.pool == "attention":
            return mean_logits(*found[0])
        if c.pool == "multi_level":
            means = [(says.sigmoid() * weight.exp()).sum(1) for says, weight in found]
            return self.norm_last(self.head(torch.cat(means, 1).to(states[0].dtype)))
        says, weight = found[0]
        pooled = self.norm_pooled((says * weight.exp()).sum(1).to(states[0].dtype)).relu()
        return self.head(nn.functional.dropout(pooled, c.dropout, self.training))


def mean_logits(logits: Tensor, weight: Tensor) -> Tensor:
    """Return the logits (B, K) of the weighted mean over time of the sigmoids of logits (B, T, K).

    Args:
        logits: (B, T, K).
        weight: log of the weights (B, T, K), which sum to 1 over T; minus infinity for none.
    """
    on = nn.functional.logsigmoid(logits) + weight
    return on.logsumexp(1) - (nn.functional.logsigmoid(-logits) + weight).logsumexp(1)


def _initialise(layer: nn.Linear) -> nn.Linear:
    """Give a linear layer Xavier's uniform weights and biases of zero."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
