"""Text: token ids (B, M) -> embeddings plus learned positions (added, not concatenated).

Source: Perceiver IO §4.1 and App. F: UTF-8 bytes shifted by six special ids, or SentencePiece ids; width 768. The
convolution over the embeddings is ours, after the image's front end: an input then is an n-gram instead of a byte.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from perceiver.attention import activate, haiku_default
from perceiver.config import Config, Scale, Size, UserError
from perceiver.model import latent_array
from perceiver.positions import Inputs

BYTE_VOCABULARY = 256 + 6
"""The bytes, after the ids PAD, BOS, EOS, MASK, CLS and SEP."""


class TextConfig(Config):
    """Token ids under the batch key `text`, and `text_mask`, True where there is a token (all, if not given)."""

    kind: Literal["text"] = "text"
    vocabulary: Size = Field(default=BYTE_VOCABULARY, description="Number of ids; 262 for bytes.")
    length: Size = Field(default=2048, description="Most tokens of a text.")
    channels: Size = Field(default=768, description="Width of embeddings and positions.")
    front_end: Literal["none", "conv"] = Field(
        default="none", description="Before the positions: the embeddings, or these plus a convolution over them."
    )
    conv_width: int = Field(
        default=5, ge=1, le=255, description="Tokens that the convolution sees, an odd number (front_end: conv)."
    )
    init_std: Scale = Field(default=1.0, description="Scale of the embeddings' truncated normal.")
    position_init_std: Scale = Field(default=0.02, description="Scale of the positions' truncated normal.")

    @model_validator(mode="after")
    def _odd_width(self) -> "TextConfig":
        if self.conv_width % 2 == 0:
            raise ValueError(f"conv_width = {self.conv_width} is even; wanted an odd number, such as 5")
        return self

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
        nn.init.trunc_normal_(
            self.tokens.weight, std=config.init_std, a=-2.0 * config.init_std, b=2.0 * config.init_std
        )
        self.positions = latent_array(config.length, config.channels, config.position_init_std)
        self.conv: nn.Conv1d | None = None
        if config.front_end == "conv":
            self.conv = haiku_default(
                nn.Conv1d(config.channels, config.channels, config.conv_width, padding=config.conv_width // 2)
            )

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
        mask = raw.get("text_mask")
        return Inputs(self._embedded(ids, mask) + self.positions[: ids.shape[1]], mask=mask)

    def _embedded(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return the embeddings (B, M, C), with a convolution over those of existing tokens added."""
        x = self.tokens(ids)
        if self.conv is None:
            return x
        seen = x if mask is None else x * mask[..., None]
        return x + activate(self.conv(seen.transpose(1, 2)).transpose(1, 2), "gelu_tanh")
