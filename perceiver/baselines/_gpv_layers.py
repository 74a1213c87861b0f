"""The layers of GPV-1: post-norm Transformer layers, with positions as in DETR, and ViLBERT's co-attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver.config import UserError

LAYER_NORM_EPS = 1e-12
"""Of the co-attention, as in BERT."""


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Return (length, length) bool, True where a position may attend: to itself and to those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Return a mask (B, M) of existing keys in the shape of the scores, (B, 1, 1, M)."""
    return None if mask is None else mask[:, None, None]


class Heads(nn.Module):
    """Attention with several heads: queries (B, N, C) to keys and values (B, M, C), which may differ by positions."""

    def __init__(self, channels: int, heads: int, *, output: bool = True) -> None:
        super().__init__()
        if channels % heads:
            raise UserError(f"model: got {heads} heads of {channels} channels; wanted a divisor: change one of them")
        self.heads = heads
        self.query, self.key, self.value = (_xavier(nn.Linear(channels, channels)) for _ in range(3))
        self.output = _xavier(nn.Linear(channels, channels)) if output else nn.Identity()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, N, C); `mask` is True where a query may attend, in a shape that extends to (B, heads, N, M)."""
        parts = (self.query(query), self.key(key), self.value(value))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def _xavier(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class FeedForward(nn.Module):
    """Two linear layers; the result is added and normalised."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.expand, self.contract = _xavier(nn.Linear(channels, hidden)), _xavier(nn.Linear(hidden, channels))
        self.norm, self.drop = nn.LayerNorm(channels), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to the same shape."""
        return self.norm(x + self.drop(self.contract(self.drop(self.expand(x).relu()))))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward part, each added and then normalised."""

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attend = Heads(channels, heads)
        self.norm, self.drop = nn.LayerNorm(channels), nn.Dropout(dropout)
        self.feed = FeedForward(channels, hidden, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | float = 0.0) -> Tensor:
        """Map (B, N, C); positions are added to queries and keys only, as in DETR."""
        placed = x + positions
        return self.feed(self.norm(x + self.drop(self.attend(placed, placed, x, mask))))


class DecoderLayer(nn.Module):
    """Self-attention, attention to a memory and a feed-forward part; of 768 and 2,048 channels 7,877,888 parameters."""

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attend, self.read = Heads(channels, heads), Heads(channels, heads)
        self.norm, self.read_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.drop = nn.Dropout(dropout)
        self.feed = FeedForward(channels, hidden, dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        positions: Tensor | float = 0.0,
        memory_positions: Tensor | float = 0.0,
    ) -> Tensor:
        """Map (B, N, C) with a memory (B, M, C); positions are added to queries and keys only."""
        placed = x + positions
        x = self.norm(x + self.drop(self.attend(placed, placed, x, mask)))
        found = self.read(x + positions, memory + memory_positions, memory, memory_mask)
        return self.feed(self.read_norm(x + self.drop(found)))


class Stream(nn.Module):
    """What a stream of a co-attention does with what it has read of the other: BERT's output and feed-forward part."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.output = _bert(nn.Linear(channels, channels))
        self.expand, self.contract = _bert(nn.Linear(channels, hidden)), _bert(nn.Linear(hidden, channels))
        self.norm, self.feed_norm = (nn.LayerNorm(channels, eps=LAYER_NORM_EPS) for _ in range(2))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, found: Tensor) -> Tensor:
        """Map the stream (B, N, C) and what it has read (B, N, C) to the next stream."""
        x = self.norm(x + self.drop(self.output(found)))
        return self.feed_norm(x + self.drop(self.contract(F.gelu(self.expand(x)))))


def _bert(layer: nn.Linear) -> nn.Linear:
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


class CoAttention(nn.Module):
    """A connection layer of ViLBERT (arXiv 1908.02265): the queries of each stream attend the other's keys and values.

    The published layer has 15,356,928 parameters of 768 channels and 3,072, among them two linear layers of 590,592
    whose results are never used; they are left out here.
    """

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.regions_read, self.text_reads = (Heads(channels, heads, output=False) for _ in range(2))
        self.regions, self.text = (Stream(channels, hidden, dropout) for _ in range(2))

    def forward(self, regions: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map regions (B, R, C) and text (B, M, C); `mask` (B, M) is True where there is text."""
        of_text = self.regions_read(regions, text, text, key_mask(mask))
        of_regions = self.text_reads(text, regions, regions)
        return self.regions(regions, of_text), self.text(text, of_regions)
