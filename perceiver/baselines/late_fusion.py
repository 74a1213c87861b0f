"""Fusion of several models of the same classes: by their scores, or by their features with a joint classifier.

Sources: Fayek and Kumar, arXiv 2006.01595 (attention over frozen models of sound and of video); Wang et al., arXiv
1905.12681, and its code (G-blend: joint classifier of the concatenated features, next to each model's own).
"""

import itertools
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field, SerializeAsAny, ValidationError, field_validator
from pydantic_core import InitErrorDetails
from torch import Tensor, nn

from perceiver.config import Config, Real, Size, UserError
from perceiver.modalities.multimodal import MultimodalConfig
from perceiver.model import Raw, need_classes

JOINT = "joint"
"""Name of the classifier of the concatenated features, next to the branches' names."""


class LateFusionConfig(Config):
    """Branches by name, each a classifier with inputs of its own, and how they are combined.

    `average`: the mean of the branches' logits, and a trained bias of each class, which changes no ranking of samples.
    `regression`: a linear map of all logits. `attention`: the mean of the logits with weights for each class, a softmax
    over the branches of a linear map of all logits. `joint`: layers on the concatenated features of the branches.

    Except for `joint`, the branches are usually trained alone (`train.init_from: {branches.NAME: RUN}`) and frozen
    (`train.freeze: [branches.*]`); a frozen branch is never in training mode.
    """

    kind: Literal["late_fusion"] = "late_fusion"
    branches: dict[str, SerializeAsAny[Config]] = Field(
        min_length=2, max_length=16, description="Model configs (each with its kind or preset) by name."
    )
    combine: Literal["average", "regression", "attention", "joint"] = Field(
        default="attention", description="How the branches make one output."
    )
    hidden: tuple[Size, ...] = Field(
        default=(), description="Layers with ReLU of regression, attention and joint (G-blend: 2048, 2048)."
    )
    dropout: Real = Field(default=0.0, ge=0, lt=1, description="Of the concatenated features of joint, in training.")
    heads: bool = Field(
        default=False,
        description="joint: return the logits of each branch's own classifier, too, for the task blended.",
    )

    @field_validator("branches", mode="before")
    @classmethod
    def _models(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError("wanted a mapping of names to models")
        return {name: _branch(name, one) for name, one in value.items()}

    @field_validator("branches")
    @classmethod
    def _names(cls, value: dict[str, Config]) -> dict[str, Config]:
        if wrong := next((name for name in value if not name.isidentifier() or name == JOINT), None):
            raise ValueError(f"got the name {wrong!r}; wanted letters, digits and _, other than {JOINT}")
        return value

    @property
    def inputs(self) -> MultimodalConfig:
        """Return the branches' inputs, as those of a model of several modalities."""
        return MultimodalConfig(modalities={name: cast(Any, one).inputs for name, one in self.branches.items()})

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module; `classes` is required."""
        return LateFusion(self, need_classes(classes))


def _branch(name: str, value: Any) -> Config:
    # Imported on use: the factory imports this module.
    from perceiver.factory import model_config

    if isinstance(value, Config):
        return value
    if not isinstance(value, Mapping) or value.get("kind") == "late_fusion":
        raise ValueError(f"{name}: wanted a model with its kind or preset, other than late_fusion")
    try:
        return model_config(dict(value))
    except UserError as error:
        raise ValueError(f"{name}: {error}") from None
    except ValidationError as error:
        # The first part of a location is the kind of the model, which is no key.
        lines = [
            InitErrorDetails(
                type=cast(Any, e["type"]), loc=(name, *e["loc"][1:]), input=e["input"], ctx=e.get("ctx", {})
            )
            for e in error.errors()
        ]
        raise ValidationError.from_exception_data(error.title, lines) from None


def layers(widths: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Return linear layers of these widths with ReLU, and a last one without."""
    parts: list[nn.Module] = []
    for first, second in itertools.pairwise(widths):
        parts += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(widths[-1], outputs))


class LateFusion(nn.Module):
    """See `LateFusionConfig`."""

    def __init__(self, config: LateFusionConfig, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.branches = nn.ModuleDict({n: cast(Any, c).build(classes=classes) for n, c in config.branches.items()})
        if config.heads and config.combine != JOINT:
            raise UserError(f"model.heads: got true with model.combine = {config.combine}; wanted combine joint")
        count = len(self.branches)
        if config.combine == "average":
            self.bias = nn.Parameter(torch.zeros(classes))
        elif config.combine == JOINT:
            self.head = layers((self._features(), *config.hidden), classes)
        else:
            outputs = classes * (count if config.combine == "attention" else 1)
            self.head = layers((count * classes, *config.hidden), outputs)
            self._start_from_the_mean()

    def _features(self) -> int:
        """Return the number of the branches' features."""
        lacking = [name for name, one in self.branches.items() if not hasattr(one, "features")]
        if lacking:
            raise UserError(
                f"model.branches.{lacking[0]}: kind {self.config.branches[lacking[0]].model_dump()['kind']} has no "
                "features for combine joint; wanted r2plus1d, audio_resnet or cnn14"
            )
        count = sum(cast(Any, one).head.in_features for one in self.branches.values())
        if not self.config.heads:
            for one in self.branches.values():
                cast(Any, one).head = nn.Identity()
        return count

    def _start_from_the_mean(self) -> None:
        """Give the last layer the values with which the fusion is the mean of the logits, if it has no hidden ones."""
        last = cast(nn.Linear, self.head[-1])
        nn.init.zeros_(last.bias)
        if self.config.combine == "attention":
            nn.init.zeros_(last.weight)
        elif not self.config.hidden:
            count = len(self.branches)
            with torch.no_grad():
                last.weight.copy_(torch.eye(self.classes).repeat(1, count) / count)

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the classifiers whose logits `forward` stacks: the branches', then the joint one."""
        return (*self.branches, JOINT)

    @property
    def input_keys(self) -> tuple[str, ...]:
        """Names of the raw tensors that the branches read."""
        return tuple(dict.fromkeys(key for one in self.branches.values() for key in cast(Any, one).input_keys))

    @property
    def optional_keys(self) -> tuple[str, ...]:
        """Names of raw tensors that the branches read if they are given."""
        return tuple(key for one in self.branches.values() for key in getattr(one, "optional_keys", ()))

    @property
    def training_keys(self) -> tuple[str, ...]:
        """Names of what tasks add for the branches' inputs in training."""
        inputs = (cast(Any, one).inputs for one in self.branches.values())
        return tuple(dict.fromkeys(key for one in inputs for key in getattr(one, "training_keys", ())))

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for each input key."""
        parts = [cast(Any, one).example(batch, device) for one in self.branches.values()]
        return {key: value for part in parts for key, value in part.items()}

    def train(self, mode: bool = True) -> "LateFusion":
        """Set training mode, except for branches without a parameter that is trained."""
        super().train(mode)
        for one in self.branches.values():
            if not any(param.requires_grad for param in one.parameters()):
                one.eval()
        return self

    def forward(self, raw: Raw) -> Tensor:
        """Return logits (B, K); with `heads` those of all classifiers (B, H, K), in the order of `head_names`."""
        tensors = raw if isinstance(raw, Mapping) else {self.input_keys[0]: raw}
        if self.config.combine == JOINT:
            return self._joint(tensors)
        scores = torch.stack([one(self._own(one, tensors)).float() for one in self.branches.values()], 1)
        if self.config.combine == "average":
            return scores.mean(1) + self.bias
        mapped = self.head(scores.flatten(1)).float()
        if self.config.combine == "regression":
            return mapped
        weight = mapped.unflatten(1, (len(self.branches), self.classes)).softmax(1)
        return (weight * scores).sum(1)

    def _joint(self, tensors: Mapping[str, Tensor]) -> Tensor:
        found = [cast(Any, one).features(self._own(one, tensors)) for one in self.branches.values()]
        joined = nn.functional.dropout(torch.cat(found, 1), self.config.dropout, self.training)
        logits = self.head(joined)
        if not self.config.heads:
            return logits
        own = [cast(Any, one).head(x) for one, x in zip(self.branches.values(), found, strict=True)]
        return torch.stack([*own, logits], 1)

    def _own(self, branch: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a branch reads of the raw tensors."""
        one: Any = branch
        keys = (*one.input_keys, *getattr(one, "optional_keys", ()), *getattr(one.inputs, "training_keys", ()))
        return {key: tensors[key] for key in keys if key in tensors}
