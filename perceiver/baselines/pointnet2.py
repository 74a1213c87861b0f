"""PointNet++ with single-scale grouping (Perceiver Table 4; Qi et al., arXiv 1706.02413, §3 and App. B.1)."""

from collections.abc import Mapping
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.baselines._grid import Baseline, BaselineConfig
from perceiver.config import Config, Real, Scale, Size, UserError
from perceiver.modalities.points import PointsConfig
from perceiver.model import Raw, need_classes, numbered


class Level(Config):
    """A set abstraction: centres, and an MLP over each one's neighbours."""

    centres: Size = Field(description="Points kept, by farthest point sampling.")
    radius: Scale = Field(description="Reach of a centre, for clouds in the unit ball.")
    neighbours: Size = Field(description="Points taken within reach; the nearest is repeated if there are fewer.")
    widths: tuple[Size, ...] = Field(description="Channels of the MLP's layers.")


class PointNet2Config(BaselineConfig):
    """Inputs of kind points; only their coordinates and features are used, not Fourier features."""

    kind: Literal["pointnet2"] = "pointnet2"
    levels: tuple[Level, ...] = Field(
        default=(
            Level(centres=512, radius=0.2, neighbours=32, widths=(64, 64, 128)),
            Level(centres=128, radius=0.4, neighbours=64, widths=(128, 128, 256)),
        ),
        description="Set abstractions, finest first.",
    )
    last: tuple[Size, ...] = Field(default=(256, 512, 1024), description="MLP over all points of the last level.")
    head: tuple[Size, ...] = Field(default=(512, 256), description="Hidden layers of the classifier.")
    dropout: Real = Field(default=0.5, ge=0, lt=1, description="After each hidden layer of the classifier.")

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module; `classes` is required."""
        return PointNet2(self, need_classes(classes))


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Return indices (B, count) of points (B, M, 3), each the farthest from those before it; the first is point 0."""
    batch, size = points.shape[:2]
    distance = points.new_full((batch, size), torch.inf)
    current = torch.zeros(batch, dtype=torch.int64, device=points.device)
    chosen = []
    rows = torch.arange(batch, device=points.device)
    for _ in range(min(count, size)):
        chosen.append(current)
        distance = torch.minimum(distance, (points - points[rows, current][:, None]).square().sum(2))
        current = distance.argmax(1)
    return torch.stack(chosen, dim=1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Gather (B, M, C) at (B, ...) indices: (B, ..., C)."""
    flat = index.flatten(1)[..., None].expand(-1, -1, x.shape[2])
    return x.gather(1, flat).unflatten(1, index.shape[1:])


def _mlp(widths: tuple[int, ...]) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in zip(widths, widths[1:], strict=False)
    )


def _apply(layers: nn.ModuleList, x: Tensor) -> Tensor:
    shape = x.shape
    x = x.flatten(0, -2)
    for layer in layers:
        x = layer(x)
    return x.unflatten(0, shape[:-1])


class PointNet2(Baseline):
    """See `PointNet2Config`."""

    def __init__(self, config: PointNet2Config, classes: int) -> None:
        super().__init__(config)
        if not isinstance(config.inputs, PointsConfig) or config.inputs.dimensions != 3:
            raise UserError("model.inputs.kind: got other than points of 3 coordinates; wanted kind points")
        self.config = config
        width = config.inputs.features
        self.levels = nn.ModuleList()
        for level in config.levels:
            self.levels.append(_mlp((3 + width, *level.widths)))
            width = level.widths[-1]
        self.last = _mlp((3 + width, *config.last))
        self.hidden = _mlp((config.last[-1], *config.head))
        self.head = nn.Linear(config.head[-1], classes)

    def layer_names(self) -> list[str]:
        """Return the names of the layers, in order."""
        return [*numbered("levels", self.levels), "last"]

    def forward(self, raw: Raw) -> Tensor:
        """Return logits (B, K) for points (B, M, 3 + features)."""
        cloud = raw["points"] if isinstance(raw, Mapping) else raw
        points, x = cloud[..., :3].float(), cloud[..., 3:].float()
        for level, layers in zip(self.config.levels, self.levels, strict=True):
            centres = _take(points, farthest_points(points, level.centres))
            near = torch.cdist(centres, points).topk(min(level.neighbours, points.shape[1]), largest=False)
            # Neighbours out of reach are replaced by the nearest, which is the centre itself.
            index = near.indices.where(near.values <= level.radius, near.indices[..., :1])
            group = torch.cat([_take(points, index) - centres[:, :, None], _take(x, index)], dim=-1)
            x = _apply(cast(nn.ModuleList, layers), group).amax(2)
            points = centres
        x = _apply(self.last, torch.cat([points, x], dim=-1)).amax(1)
        for layer in self.hidden:
            x = nn.functional.dropout(layer(x), self.config.dropout, self.training)
        return self.head(x)
