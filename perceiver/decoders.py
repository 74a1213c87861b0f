"""Perceiver IO's decoders: output queries, and what the answers to them become."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, UserError
from perceiver.model import latent_array
from perceiver.positions import Inputs


class ClassDecoderConfig(Config):
    """One learned query whose answer is a label (Perceiver IO §A; the released ClassificationDecoder)."""

    kind: Literal["class"] = "class"
    channels: int | None = Field(default=None, description="Width of the query; the latents' by default.")
    init_std: float = Field(default=0.02, gt=0, description="Scale of the query's truncated normal.")

    def build(self, *, latent_channels: int, inputs: nn.Module, classes: int | None) -> nn.Module:
        """Make the decoder; `classes` is required."""
        if classes is None:
            raise UserError("classes: got none for a classifier; wanted the number of classes: give classes=")
        return ClassDecoder(self.channels or latent_channels, classes, self.init_std)


class ClassDecoder(nn.Module):
    """Learned query (1, channels) -> logits (B, K)."""

    def __init__(self, channels: int, classes: int, init_std: float) -> None:
        super().__init__()
        self.channels = self.output_channels = channels
        self.query = latent_array(1, channels, init_std)
        self.head = nn.Linear(channels, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def queries(self, inputs: Inputs, asked: Mapping[str, Tensor] | None) -> Inputs:
        """Return the one query for each sample, (B, 1, channels)."""
        return Inputs(self.query.expand(inputs.data.shape[0], -1, -1))

    def outputs(self, answers: Tensor, asked: Mapping[str, Tensor] | None) -> Any:
        """Map answers (B, 1, channels) to logits (B, K)."""
        return self.head(answers[:, 0])
