"""A Transformer over the inputs themselves, without latents: 64 x 64 pixels or 44 x 44 points as tokens.

Source: Perceiver §4.1 and §4.3. The paper gives no depth or width; the layers are those of its latent Transformer.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from perceiver.attention import Activation, SelfAttend, linear, zero_linear
from perceiver.baselines._grid import Baseline, BaselineConfig
from perceiver.config import Layers, Size, Widening
from perceiver.model import Raw, need_classes, numbered


class TransformerConfig(BaselineConfig):
    """Self-attention layers over all inputs, their mean classified."""

    kind: Literal["transformer"] = "transformer"
    width: Size = Field(default=512, description="Width of a token.")
    layers: Layers = Field(default=8, description="Self-attention layers.")
    heads: Size = Field(default=8, description="Heads of each.")
    widening: Widening = Field(default=1, description="Inner width of the MLP over the width.")
    activation: Activation = Field(default="gelu_tanh", description="MLP activation.")

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module; `classes` is required."""
        return Transformer(self, need_classes(classes))


class Transformer(Baseline):
    """See `TransformerConfig`."""

    def __init__(self, config: TransformerConfig, classes: int) -> None:
        super().__init__(config)
        self.embed = linear(self.channels, config.width)
        self.layers = nn.ModuleList(
            SelfAttend(config.width, config.heads, widening=config.widening, activation=config.activation)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = zero_linear(config.width, classes)

    def layer_names(self) -> list[str]:
        """Return the names of the layers, in order."""
        return numbered("layers", self.layers)

    def forward(self, raw: Raw) -> Tensor:
        """Return logits (B, K); masked tokens are neither attended to nor averaged."""
        x, mask = self.tokens(raw)
        x = self.embed(x.to(self.embed.weight.dtype))
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        if mask is None:
            return self.head(x.mean(1))
        weight = mask.to(x.dtype)[..., None]
        return self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1))
