"""Configuration and construction of the optimizers."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from perceiver.config import Config, Real
from perceiver.optim.groups import GroupConfig, param_groups
from perceiver.optim.lamb import Lamb
from perceiver.optim.schedules import ConstantSchedule, ScheduleConfig
from perceiver.optim.sgd import Sgd

_DEFAULT_EPS = {"adamw": 1e-8, "adam": 1e-8, "lamb": 1e-6}
_USED_BY = {
    "betas": ("adamw", "adam", "lamb"),
    "eps": ("adamw", "adam", "lamb"),
    "amsgrad": ("adamw", "adam"),
    "momentum": ("sgd",),
    "nesterov": ("sgd",),
}
"""The kinds that use a key; all use the others."""

Beta = Annotated[Real, Field(ge=0, lt=1)]
"""Decay of a moving average."""


class OptimConfig(Config):
    """Optimizer and learning rate (recipe key `optim`)."""

    kind: Literal["adamw", "adam", "sgd", "lamb"] = Field(
        default="adamw", description="Optimizer; the Perceiver papers train with LAMB."
    )
    lr: Real = Field(default=1e-3, gt=0, le=1e6, description="Peak learning rate, multiplied by the schedule.")
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), description="Decay of the first and second moment; not for sgd."
    )
    eps: Real | None = Field(
        default=None, ge=1e-20, le=1e6, description="Added to the root of the second moment; 1e-8, LAMB 1e-6."
    )
    amsgrad: bool = Field(default=False, description="Divide by the largest second moment so far; for adamw and adam.")
    momentum: Beta = Field(default=0.0, description="Decay of the sum of gradients; for sgd.")
    nesterov: bool = Field(default=False, description="Nesterov momentum; for sgd with momentum.")
    weight_decay: Real = Field(
        default=0.01,
        ge=0,
        le=100,
        description="Decoupled for adamw and lamb, added to the gradient (L2) for adam and sgd; biases and norms have "
        "none.",
    )
    clip: Real | None = Field(
        default=None, ge=1e-9, le=1e9, description="Global gradient norm to clip to; null switches it off."
    )
    groups: tuple[GroupConfig, ...] = Field(
        default=(), max_length=1000, description="Parameters with a learning rate or weight decay of their own."
    )
    layer_decay: Real | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Factor of the learning rate from each layer to the one before it, counted from the head, which "
        "has 1; as in BEiT and MAE, for fine-tuning.",
    )
    schedule: ScheduleConfig = Field(default=ConstantSchedule(), description="Multiplier of lr over the run.")

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> "OptimConfig":
        for key, kinds in _USED_BY.items():
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"kind = {self.kind!r} has no {key}; wanted kind = {' or '.join(kinds)}, or no {key}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = True, but momentum = 0; wanted momentum > 0, such as 0.9")
        return self

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the optimizer besides its parameters, by torch's names."""
        values = {key: getattr(self, key) for key, kinds in _USED_BY.items() if self.kind in kinds}
        if "eps" in values:
            values["eps"] = self.eps or _DEFAULT_EPS[self.kind]
        return {"lr": self.lr, "weight_decay": self.weight_decay, **values}


def optimizer_groups(config: OptimConfig, module: nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups of the module's trainable parameters, with `lr_factor` and `weight_decay`.

    Raises:
        UserError: `optim.groups` or `optim.layer_decay` do not fit the model.
    """
    return param_groups(module, config.weight_decay, config.groups, config.layer_decay)


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of the module's trainable parameters, at the peak learning rate.

    The engine clips the gradient before each step and sets the `lr` of each group to its `lr_factor` of the step's.

    Raises:
        UserError: `optim.groups` or `optim.layer_decay` do not fit the model.
    """
    groups = [{**group, "lr": config.lr * group["lr_factor"]} for group in optimizer_groups(config, module)]
    if config.kind == "lamb":
        return Lamb(groups, **config.settings())
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": Sgd}
    # One kernel for all tensors saves a tenth of a small model's step on a CPU.
    return kinds[config.kind](groups, **config.settings(), fused=True)
