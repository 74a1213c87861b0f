"""CNN-14 on a log-mel spectrogram (Perceiver Table 3; Kong et al., PANNs, arXiv 1912.10211, and its code)."""

from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn

from perceiver.baselines._grid import Baseline, BaselineConfig
from perceiver.config import Real, Size, UserError
from perceiver.model import Raw, need_classes, numbered


class CNN14Config(BaselineConfig):
    """Six blocks of two 3x3 convolutions; inputs of kind mel, layout grid, positions none (64 bins in the source).

    Frames and bins are halved after each block but the last, a rest left out: there must be enough of them.
    """

    kind: Literal["cnn14"] = "cnn14"
    widths: tuple[Size, ...] = Field(default=(64, 128, 256, 512, 1024, 2048), description="Channels of each block.")
    dropout: Real = Field(default=0.2, ge=0, lt=1, description="After each block.")
    head_dropout: Real = Field(default=0.5, ge=0, lt=1, description="Before and after the last hidden layer.")

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module; `classes` is required."""
        return CNN14(self, need_classes(classes))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for first in (inputs, outputs):
        layers += [nn.Conv2d(first, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        nn.init.xavier_uniform_(cast(nn.Conv2d, layers[-3]).weight)
    return nn.Sequential(*layers)


class CNN14(Baseline):
    """See `CNN14Config`."""

    def __init__(self, config: CNN14Config, classes: int) -> None:
        super().__init__(config)
        if len(self.grid) != 2:
            raise UserError("model.inputs: got inputs without frames and bins; wanted kind mel with layout grid")
        least = 2 ** (len(config.widths) - 1)
        if min(self.grid) < least:
            raise UserError(
                f"model.inputs: got {self.grid[0]} frames of {self.grid[1]} bins for {len(config.widths)} blocks; "
                f"wanted at least {least} of each, or fewer model.widths"
            )
        self.config = config
        self.norm = nn.BatchNorm2d(self.grid[1])
        widths = (self.channels, *config.widths)
        self.blocks = nn.ModuleList(_block(a, b) for a, b in zip(widths, widths[1:], strict=False))
        last = config.widths[-1]
        self.hidden, self.head = nn.Linear(last, last), nn.Linear(last, classes)
        for layer in (self.hidden, self.head):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def layer_names(self) -> list[str]:
        """Return the names of the layers, in order."""
        return numbered("blocks", self.blocks)

    def forward(self, raw: Raw) -> Tensor:
        """Return logits (B, K)."""
        return self.head(nn.functional.dropout(self.features(raw), self.config.head_dropout, self.training))

    def features(self, raw: Raw) -> Tensor:
        """Return the output of the last hidden layer (B, C)."""
        c = self.config
        x = self.image(raw)
        # Each mel bin has its own normalisation: bins are moved to the channels and back.
        x = self.norm(x.transpose(1, 3)).transpose(1, 3)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i < len(self.blocks) - 1:
                x = nn.functional.avg_pool2d(x, 2)
            x = nn.functional.dropout(x, c.dropout, self.training)
        x = x.mean(3)
        x = x.amax(2) + x.mean(2)
        x = nn.functional.dropout(x, c.head_dropout, self.training)
        return self.hidden(x).relu()
