"""Attention layers: self-attention over latents, and cross-attention with exact shortcuts.

Layers are pre-normalised: x += attention(LN(x)); x += MLP(LN(x)). Sources: Perceiver App. C, Perceiver IO eq. 4-6 and
the released code. `choose_path` is the one place that decides how a cross-attention is computed.
"""

import contextlib
import math
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver import kernels
from perceiver.config import UserError
from perceiver.kernels import attend, dense
from perceiver.kernels.shared_kv import separable_moments, shared_kv
from perceiver.positions import LAYER_NORM_EPS, Inputs, spread

Path = Literal["plain", "absorbed", "separable"]
AttentionKind = Literal["auto", "plain", "absorbed", "separable"]
Activation = Literal["gelu_tanh", "gelu", "relu"]

SEPARABLE_MAX_DATA = 16
"""Data channels up to which the separable form is cheaper than the matrix product that it replaces."""
FUSE_TOKENS = 4
"""Tokens per channel from which the three projections of a self-attention are one matrix product."""


def lecun_normal_(weight: Tensor, fan_in: int | None = None) -> Tensor:
    """Fill with a truncated normal of variance 1/fan_in (cut at 2 sigma, corrected for the cut), in place.

    Source: Haiku's VarianceScaling(1.0), as the released code uses for attention and MLP layers.
    """
    std = (1.0 / max(1, fan_in or weight.shape[1])) ** 0.5 / 0.87962566103423978
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Make a linear layer with LeCun-normal weights and zero bias."""
    layer = dense.Linear(inputs, outputs, bias=bias)
    lecun_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


Layer = TypeVar("Layer", nn.Linear, nn.Conv1d, nn.Conv2d)


def haiku_default(layer: Layer) -> Layer:
    """Fill a layer as Haiku does by default and return it: variance 1/fan_in before the cut at 2 sigma, zero bias.

    The released code has this outside of attention and MLPs: front ends, projected positions, output layers.
    """
    std = layer.weight[0].numel() ** -0.5
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """Make an output layer whose weights and bias are zero, so that a model starts without preferring a class."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Linear, activation, linear; inner width = widening * channels (1 in the papers: no bottleneck)."""

    def __init__(self, channels: int, widening: float = 1, activation: Activation = "gelu_tanh") -> None:
        super().__init__()
        inner = int(channels * widening)
        if inner < 1:
            raise UserError(f"widening: got {widening:g} of {channels} channels, which is less than 1: raise it")
        self.expand = linear(channels, inner)
        self.contract = linear(inner, channels)
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., channels) to the same shape."""
        return self.contract(activate(self.expand(x), self.activation))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation by name; `gelu_tanh` is the papers' (JAX default), `gelu` the exact form."""
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast, on devices that have it."""
    # A device type that can be compiled for has autocast, and torch 2.11 cannot trace the question.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _key_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None, :]


def _drop_empty(out: Tensor, mask: Tensor | None) -> Tensor:
    """Zero the output where no input exists (softmax over nothing), as the released code does."""
    return out if mask is None else out.masked_fill(~mask.any(1)[:, None, None], 0)


class SelfAttention(nn.Module):
    """Multi-head self-attention with separate query, key and value weights (LAMB scales each by itself).

    Args:
        channels: width D of the tokens.
        heads: number of heads; must divide `qk_channels` and `v_channels`.
        qk_channels, v_channels: total widths over the heads; D by default.
    """

    def __init__(
        self, channels: int, heads: int, qk_channels: int | None = None, v_channels: int | None = None
    ) -> None:
        super().__init__()
        qk = qk_channels or channels
        v = v_channels or qk
        _check_heads(heads, qk, v)
        self.heads = heads
        self.query, self.key, self.value = linear(channels, qk), linear(channels, qk), linear(channels, v)
        self.output = linear(v, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend (B, N, D) to itself; `mask` (B, N) is True for tokens that exist."""
        layers = (self.query, self.key, self.value)
        if x.shape[0] * x.shape[1] >= FUSE_TOKENS * x.shape[2]:
            # One product instead of three; the concatenated weights are then small compared with the activations.
            weight = torch.cat([layer.weight for layer in layers])
            bias = torch.cat([layer.bias for layer in layers])
            parts = dense.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)
        else:
            parts = [layer(x) for layer in layers]
        q, k, v = (_heads(part, self.heads) for part in parts)
        return self.output(_merge(attend.attention(q, k, v, mask)))


def _check_heads(heads: int, qk: int, v: int) -> None:
    if qk % heads or v % heads:
        raise UserError(
            f"heads: got {heads} heads for {qk} query/key and {v} value channels; wanted a divisor of both: change one"
        )


class SelfAttend(nn.Module):
    """A self-attention layer: x += attention(LN(x)); x += MLP(LN(x))."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        widening: float = 1,
        activation: Activation = "gelu_tanh",
        qk_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.attention = SelfAttention(channels, heads, qk_channels, v_channels)
        self.mlp_norm = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.mlp = MLP(channels, widening, activation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, N, D) to the same shape."""
        x = x + self.attention(self.norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


def choose_path(
    kind: AttentionKind, inputs: Inputs, *, queries: int, heads: int, qk_channels: int, v_channels: int
) -> Path:
    """Decide how a cross-attention is computed; all paths are the same function to rounding.

    - separable: fixed Fourier positions on a grid of two or more axes and few data channels. Nothing of M x C exists.
    - absorbed: where the heads' absorbed queries cost less than projecting every input to keys and values.
    - plain: the rest, and always when asked for.

    Raises:
        UserError: `separable` is set but the inputs are not a fixed grid.
    """
    separable = inputs.grid is not None and inputs.fixed and inputs.mask is None
    if kind == "separable" and not separable:
        raise UserError(
            "attention: got 'separable' for inputs that are not a fixed Fourier grid; wanted fourier positions without "
            "a trained front end: use attention='auto'"
        )
    if kind != "auto":
        return kind
    narrow = inputs.data.shape[2] <= SEPARABLE_MAX_DATA
    if separable and narrow and inputs.grid is not None and len(inputs.grid.shape) > 1:
        return "separable"
    c, m = inputs.channels, inputs.elements
    projected = (m * c + queries * c + queries * m) * (qk_channels + v_channels)
    absorbed = 2 * heads * queries * m * c + queries * c * (qk_channels + v_channels)
    return "absorbed" if absorbed <= projected else "plain"


class CrossAttention(nn.Module):
    """Attention of queries (B, N, D) to inputs (B, M, C), with the inputs' layer normalisation inside.

    Args:
        query_channels: width D of the (normalised) queries.
        input_channels: width C of the inputs.
        heads: number of heads; 1 in the papers' encoders.
        qk_channels: total query/key width; C by default (the released code's `shape_for_attn='kv'`).
        v_channels: total value width; `qk_channels` by default.
        output_channels: width of the result; D by default.
        kind: `auto`, or a path by name (see `choose_path`).
    """

    def __init__(
        self,
        query_channels: int,
        input_channels: int,
        *,
        heads: int = 1,
        qk_channels: int | None = None,
        v_channels: int | None = None,
        output_channels: int | None = None,
        kind: AttentionKind = "auto",
    ) -> None:
        super().__init__()
        qk = qk_channels or input_channels
        v = v_channels or qk
        _check_heads(heads, qk, v)
        self.heads = heads
        self.kind: AttentionKind = kind
        self.input_norm = nn.LayerNorm(input_channels, eps=LAYER_NORM_EPS)
        self.query, self.key = linear(query_channels, qk), linear(input_channels, qk)
        self.value = linear(input_channels, v)
        self.output = linear(v, output_channels or query_channels)

    def forward(self, query: Tensor, inputs: Inputs) -> Tensor:
        """Return (B, N, output_channels); queries of batch 1 serve every item of the inputs' batch."""
        path = self._path(query, inputs)
        q = _heads(self.query(query), self.heads)
        context = self._plain(q, inputs) if path == "plain" else self._absorbed(q, inputs, path)
        return self.output(_drop_empty(_merge(context), inputs.mask))

    def share(self, query: Tensor, inputs: Inputs) -> None:
        """Compute and keep what the attention reads of the inputs, which may be shared by several layers.

        A value that is first computed within a compiled or a checkpointed layer would not be kept.
        """
        path = self._path(query, inputs)
        if path == "plain":
            _ = inputs.dense
        elif path == "absorbed":
            _ = inputs.normalised
        else:
            _ = inputs.separable_factors
            if inputs.data.is_cuda:
                kernels.triton_works(inputs.data.device)

    def _path(self, query: Tensor, inputs: Inputs) -> Path:
        return choose_path(
            self.kind,
            inputs,
            queries=query.shape[1],
            heads=self.heads,
            qk_channels=self.key.out_features,
            v_channels=self.value.out_features,
        )

    def _plain(self, q: Tensor, inputs: Inputs) -> Tensor:
        x = self.input_norm(inputs.dense.to(self.input_norm.weight.dtype))
        k, v = _heads(self.key(x), self.heads), _heads(self.value(x), self.heads)
        q = q.expand(k.shape[0], -1, -1, -1)
        if self.kind == "plain":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=_key_mask(inputs.mask))
        return attend.attention(q, k, v, inputs.mask)

    def _absorbed(self, q: Tensor, inputs: Inputs, path: Path) -> Tensor:
        """Attend to the normalised inputs themselves: (B, h, N, d) -> (B, h, N, d_v).

        q.k differs from (q W_k g).x by a constant per query, which softmax removes; and the weights sum to 1, so the
        values' gain, bias and projection act after the sum.
        """
        norm, heads = self.input_norm, self.heads
        # The key's bias has no effect on the weights; its (zero) gradient is kept so that every parameter has one.
        q = (q + 0 * self.key.bias.sum()) * (1 / math.sqrt(q.shape[-1]))
        key = self.key.weight.unflatten(0, (heads, -1))
        absorbed = (_per_head(q, key) * norm.weight).flatten(1, 2)
        with no_autocast(q.device.type):
            attend = _separable if path == "separable" else _dense
            context = attend(absorbed.to(inputs.data.dtype), inputs).to(q.dtype)
        context = context.unflatten(1, (heads, -1)) * norm.weight + norm.bias
        value = self.value.weight.unflatten(0, (heads, -1)).transpose(1, 2)
        return _per_head(context, value) + self.value.bias.unflatten(0, (heads, 1, -1))

    def scores(self, query: Tensor, inputs: Inputs) -> Tensor:
        """Return the scores before the softmax (B, heads, N, M) by the plain path, -1e30 where there is no input.

        Permuted inputs are in the order of their grid again.
        """
        q = _heads(self.query(query), self.heads)
        k = _heads(self.key(self.input_norm(inputs.dense.to(q.dtype))), self.heads)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        if inputs.mask is not None:
            scores = scores.masked_fill(~inputs.mask[:, None, None], -1e30)
        return scores if inputs.order is None else scores[..., inputs.order.argsort()]


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply (B, h, N, i) by a matrix for each head (h, i, o); one head as one product over the batch."""
    return dense.linear(x[:, 0], weight[0].t())[:, None] if len(weight) == 1 else x @ weight


def _dense(q: Tensor, inputs: Inputs) -> Tensor:
    return shared_kv(q.expand(inputs.data.shape[0], -1, -1), inputs.normalised, inputs.mask)


def _separable(q: Tensor, inputs: Inputs) -> Tensor:
    """softmax(q x^T) x for x the normalised inputs on a grid, from its axis tables: (B, N, C) -> (B, N, C).

    An element of x is its channels minus their mean, times a scale. A query without its own mean gives the same scores
    from the channels alone, and the result without its mean is that of x: the elements' means are never used.
    """
    grid = inputs.grid
    assert grid is not None
    features, scale = inputs.separable_factors
    batch = features.shape[0]
    table = grid.table.to(q.dtype)
    data = inputs.data.shape[2]
    q = q - q.mean(-1, keepdim=True)
    per_axis = q[..., data:] @ table.t()
    lead, width = sum(grid.shape[:-1]), grid.shape[-1]
    columns = per_axis[..., lead:]
    rows = spread(per_axis[..., :lead], grid.shape[:-1]) if lead else per_axis.new_zeros(*per_axis.shape[:-1], 1)
    on_features, rows, columns = (part.expand(batch, -1, -1) for part in (q[..., :data], rows, columns))
    moments, by_row, by_column = separable_moments(on_features, rows, columns, features, scale)
    assert by_column.shape[-1] == width
    marginals = torch.cat([*_fold_rows(by_row, grid.shape[:-1]), by_column], dim=-1)
    out = torch.cat([moments, marginals @ table], dim=-1)
    return out - out.mean(-1, keepdim=True)


def _fold_rows(by_row: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """Return the marginal of each leading axis of sums per row: (..., prod(shape)) -> one (..., shape[a]) per axis."""
    grid = by_row.unflatten(-1, shape) if shape else by_row
    axes = range(-len(shape), 0)
    return [grid.sum([a for a in axes if a != axis]) if len(shape) > 1 else grid for axis in axes]


class CrossAttend(nn.Module):
    """A cross-attention layer: x = query + attention(LN(query), LN(inputs)); x += MLP(LN(x)).

    Args:
        attention: the attention, whose widths the layer takes over.
        residual: whether the query is added (Perceiver IO's decoders for language, flow and Kinetics leave it out).
        widening, activation: as for `MLP`.
    """

    def __init__(
        self,
        attention: CrossAttention,
        *,
        residual: bool = True,
        widening: float = 1,
        activation: Activation = "gelu_tanh",
    ) -> None:
        super().__init__()
        channels, width = attention.query.in_features, attention.output.out_features
        if residual and width != channels:
            raise UserError(
                f"output channels: got {width} with a query residual of {channels} channels; wanted the same width: "
                "set query_residual to false"
            )
        self.residual = residual
        self.query_norm = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(width, widening, activation)

    def forward(self, query: Tensor, inputs: Inputs) -> Tensor:
        """Map queries (B, N, D) and inputs to (B, N, output_channels)."""
        x = self.attention(self.query_norm(query), inputs)
        x = query + x if self.residual else x
        return x + self.mlp(self.mlp_norm(x))
