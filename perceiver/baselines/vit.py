"""ViT on raw or Fourier-featured inputs (Perceiver Tables 1, 2 and 4; Dosovitskiy et al., arXiv 2010.11929)."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from perceiver.baselines._grid import Baseline, BaselineConfig, transformers_library
from perceiver.config import Layers, Scale, Size, UserError
from perceiver.model import Raw, need_classes, numbered


class ViTConfig(BaselineConfig):
    """A ViT from the transformers library; B/16 by default. An image that patches do not divide is padded."""

    kind: Literal["vit"] = "vit"
    patch: Size = Field(default=16, description="Side of a patch.")
    width: Size = Field(default=768, description="Width of a token.")
    layers: Layers = Field(default=12, description="Transformer layers.")
    heads: Size = Field(default=12, description="Attention heads.")
    widening: int = Field(default=4, ge=1, le=1000, description="Inner width of the MLP over the width.")
    init_std: Scale = Field(default=0.02, description="Scale of the initial weights; narrow ones want more.")

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module; `classes` is required."""
        return ViT(self, need_classes(classes))


class ViT(Baseline):
    """See `ViTConfig`."""

    def __init__(self, config: ViTConfig, classes: int) -> None:
        super().__init__(config)
        if len(self.grid) != 2:
            raise UserError(f"model.inputs: got inputs of grid {self.grid}; wanted an image: set model.grid, as 44, 44")
        library = transformers_library()
        self.padding = tuple(-side % config.patch for side in self.grid)
        values = library.ViTConfig(
            num_channels=self.channels,
            image_size=[s + p for s, p in zip(self.grid, self.padding, strict=True)],
            patch_size=config.patch,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.width * config.widening,
            num_labels=classes,
            initializer_range=config.init_std,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.net = library.ViTForImageClassification(values)

    def layer_names(self) -> list[str]:
        """Return the names of the layers, in order."""
        return numbered("net.vit.layers", self.net.get_submodule("vit.layers"))

    def forward(self, raw: Raw) -> Tensor:
        """Return logits (B, K)."""
        down, right = self.padding
        return self.net(nn.functional.pad(self.image(raw), (0, right, 0, down))).logits
