"""Text: token ids (B, M) -> embeddings plus learned positions (added, not concatenated).

Source: Perceiver IO §4.1 and App. F: UTF-8 bytes shifted by six special ids, or SentencePiece ids; width 768.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Size, UserError
from perceiver.model import latent_array
from perceiver.positions import Inputs

BYTE_VOCABULARY = 256 + 6
"""The bytes, after the ids PAD, BOS, EOS, MASK, CLS and SEP."""


CLS, SEP, SPECIALS = 4, 5, 6


def byte_ids(text: str, length: int) -> list[int]:
    """Return the ids of a text: CLS, its UTF-8 bytes + 6, SEP; a longer text is cut before SEP to `length` ids."""
    return [CLS, *(byte + SPECIALS for byte in text.encode()[: length - 2]), SEP]


class TextConfig(Config):
    """Token ids under the batch key `text`, and `text_mask`, True where there is a token (all, if not given)."""

    kind: Literal["text"] = "text"
    vocabulary: Size = Field(default=BYTE_VOCABULARY, description="Number of ids; 262 for bytes.")
    length: Size = Field(default=2048, description="Most tokens of a text.")
    channels: Size = Field(default=768, description="Width of embeddings and positions.")

    def build(self) -> nn.Module:
        """Build the module."""
        return TextInputs(self)


class TextInputs(nn.Module):
    """Turns ids into inputs: embedding + position. `tokens.weight` also serves a decoder's tied output."""

    keys = ("text",)
    optional_keys = ("text_mask",)

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.elements, self.channels = config.length, config.channels
        self.tokens = nn.Embedding(config.vocabulary, config.channels)
        nn.init.trunc_normal_(self.tokens.weight, std=1.0, a=-2.0, b=2.0)
        self.positions = latent_array(config.length, config.channels, 0.02)

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for `batch` samples."""
        return {"text": torch.zeros(batch, self.config.length, dtype=torch.int64, device=device)}

    def forward(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map ids (B, M), M up to `length`, and the mask to inputs."""
        ids = raw["text"]
        if ids.shape[1] > self.config.length:
            raise UserError(
                f"text: got {ids.shape[1]} tokens; wanted at most {self.config.length}: set model.inputs.length"
            )
        return Inputs(self.tokens(ids) + self.positions[: ids.shape[1]], mask=raw.get("text_mask"))
