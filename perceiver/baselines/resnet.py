"""ResNet-50 on raw or Fourier-featured inputs (Perceiver Tables 1, 2 and 4; He et al., arXiv 1512.03385)."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from perceiver.baselines._grid import Baseline, BaselineConfig, transformers_library
from perceiver.config import Layers, Size
from perceiver.model import Raw, need_classes, numbered


class ResNetConfig(BaselineConfig):
    """A bottleneck ResNet from the transformers library; 50 layers by default."""

    kind: Literal["resnet"] = "resnet"
    depths: tuple[Layers, ...] = Field(default=(3, 4, 6, 3), description="Blocks of each stage.")
    widths: tuple[Size, ...] = Field(default=(256, 512, 1024, 2048), description="Channels of each stage.")
    stem: Size = Field(default=64, description="Channels of the first convolution.")

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module; `classes` is required."""
        return ResNet(self, need_classes(classes))


class ResNet(Baseline):
    """See `ResNetConfig`."""

    def __init__(self, config: ResNetConfig, classes: int) -> None:
        super().__init__(config)
        library = transformers_library()
        values = library.ResNetConfig(
            num_channels=self.channels,
            depths=list(config.depths),
            hidden_sizes=list(config.widths),
            embedding_size=config.stem,
            num_labels=classes,
        )
        self.net = library.ResNetForImageClassification(values)

    def layer_names(self) -> list[str]:
        """Return the names of the blocks, in order."""
        stages = numbered("resnet.encoder.stages", self.net.get_submodule("resnet.encoder.stages"))
        lists = [f"{stage}.layers" for stage in stages]
        return [f"net.{name}" for layers in lists for name in numbered(layers, self.net.get_submodule(layers))]

    def forward(self, raw: Raw) -> Tensor:
        """Return logits (B, K)."""
        return self.net(self.image(raw)).logits
