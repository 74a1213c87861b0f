"""Several modalities as one set of inputs, each element marked by a learned vector of its modality.

Each modality's elements are padded with its vector to the widest modality's channels + `min_padding`. Sources:
Perceiver §4.2 (modality encoding, video dropout), Perceiver IO §4.3 and the released MultimodalPreprocessor (mask).
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field, SerializeAsAny, ValidationError, field_validator
from pydantic_core import InitErrorDetails
from torch import Tensor, nn

from perceiver import registry
from perceiver.config import Config, Probability, Size, UserError
from perceiver.model import latent_array
from perceiver.positions import Inputs

_POSITION_KINDS = ("fourier", "learned", "none")


class MultimodalConfig(Config):
    """Modalities by name, read from the batch keys that each one names."""

    kind: Literal["multimodal"] = "multimodal"
    modalities: dict[str, SerializeAsAny[Config]] = Field(
        description="Modality configs (each with its kind) by name; null: left out."
    )
    min_padding: Size = Field(default=4, description="Least width of the learned modality vectors.")
    dropout: dict[str, Probability] = Field(
        default={}, description="Chance per sample that a modality's data are zeroed in training (video 0.3 in §4.2)."
    )
    mask: dict[str, Probability] = Field(
        default={}, description="Chance that a learned vector stands for a modality in training (label 0.5)."
    )
    mask_unit: Literal["sample", "token"] = Field(
        default="sample",
        description="What is drawn for `mask`: whole modalities of a sample, or each input, as the released code does.",
    )
    hide: tuple[str, ...] = Field(
        default=(), description="Modalities masked in evaluation always; the batch need not have them then."
    )

    @field_validator("modalities", mode="before")
    @classmethod
    def _known_kinds(cls, value: Any) -> Any:
        kinds = registry.members("perceiver.modalities")
        if not isinstance(value, Mapping) or all(one is None for one in value.values()):
            raise ValueError("wanted a mapping of names to modalities, at least one")
        return {name: _modality(name, one, kinds) for name, one in value.items() if one is not None}

    def build(self) -> nn.Module:
        """Build the module."""
        return Multimodal(self)


def _modality(name: str, value: Any, kinds: dict[str, type[Config]]) -> Config:
    if isinstance(value, Config):
        return value
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds or kind == "multimodal":
        known = ", ".join(sorted(set(kinds) - {"multimodal"}))
        raise ValueError(f"modality '{name}': got kind {kind!r}; wanted one of {known}")
    try:
        return kinds[kind].model_validate(value)
    except ValidationError as error:
        raise ValidationError.from_exception_data(
            error.title, [_below(name, line) for line in error.errors()]
        ) from None


def _below(name: str, line: Any) -> InitErrorDetails:
    """Return an error of a modality with its name in the location, and without tags of unions, which are no keys."""
    location = (name, *(part for part in line["loc"] if part not in _POSITION_KINDS))
    return InitErrorDetails(type=line["type"], loc=location, input=line["input"], ctx=line.get("ctx", {}))


class Multimodal(nn.Module):
    """Turns several raw tensors into one set of inputs, in alphabetical order of the modalities' names."""

    training_keys = ("mix_partner", "mix_share", "draw_seed")
    """See `perceiver.modalities.mel`."""

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__()
        self.config = config
        names = sorted(config.modalities)
        for field, used in (("dropout", config.dropout), ("mask", config.mask), ("hide", config.hide)):
            for name in used:
                if name not in names:
                    raise UserError(f"inputs.{field}: got '{name}'; wanted one of the modalities {', '.join(names)}")
        self.modalities = nn.ModuleDict({n: cast(Any, config.modalities[n]).build() for n in names})
        widths = {n: cast(Any, m).channels for n, m in self.modalities.items()}
        self.channels = max(widths.values()) + config.min_padding
        self.elements = sum(cast(Any, m).elements for m in self.modalities.values())
        self.padding = nn.ParameterDict({n: latent_array(1, self.channels - widths[n], 0.02) for n in names})
        masked = [n for n in names if n in config.mask or n in config.hide]
        self.masks = nn.ParameterDict({n: latent_array(1, self.channels, 0.02) for n in masked})

    @property
    def keys(self) -> tuple[str, ...]:
        """Batch keys that are read now: in evaluation without those of hidden modalities."""
        shown = {n: m for n, m in self.modalities.items() if self.training or n not in self.config.hide}
        return tuple(dict.fromkeys(key for m in shown.values() for key in cast(Any, m).keys))

    @property
    def optional_keys(self) -> tuple[str, ...]:
        """Batch keys that are read if they are there."""
        return tuple(key for m in self.modalities.values() for key in getattr(m, "optional_keys", ()))

    def forward(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map the raw tensors to the joined inputs (B, M, channels)."""
        batch = next(iter(raw.values())).shape[0]
        parts = [self._part(name, raw, dtype, batch) for name in self.modalities]
        mask = None
        if any(part.mask is not None for part in parts):
            mask = torch.cat([self._all(part) if part.mask is None else part.mask for part in parts], dim=1)
        return Inputs(torch.cat([part.dense for part in parts], dim=1), mask=mask)

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for `batch` samples."""
        parts = [cast(Any, m).example(batch, device) for m in self.modalities.values()]
        return {key: value for part in parts for key, value in part.items()}

    @staticmethod
    def _all(part: Inputs) -> Tensor:
        return torch.ones(part.data.shape[:2], dtype=torch.bool, device=part.data.device)

    def _part(self, name: str, raw: Mapping[str, Tensor], dtype: torch.dtype, batch: int) -> Inputs:
        """Return one modality's elements, padded, dropped or masked."""
        module = cast(Any, self.modalities[name])
        if not self.training and name in self.config.hide:
            return Inputs(self.masks[name].to(dtype).expand(batch, module.elements, -1))
        inputs: Inputs = module(raw, dtype)
        if self.training and self.config.dropout.get(name):
            dropped = self._draw(inputs, self.config.dropout[name])
            inputs = Inputs(inputs.data * ~dropped, inputs.grid, inputs.mask, inputs.order)
        x = inputs.dense
        x = torch.cat([x, self.padding[name].to(x.dtype).expand(*x.shape[:2], -1)], dim=-1)
        if self.training and self.config.mask.get(name):
            units = inputs.elements if self.config.mask_unit == "token" else 1
            x = torch.where(self._draw(inputs, self.config.mask[name], units), self.masks[name].to(x.dtype), x)
        return Inputs(x, mask=inputs.mask)

    @staticmethod
    def _draw(inputs: Inputs, chance: float, units: int = 1) -> Tensor:
        return torch.rand(len(inputs.data), units, 1, device=inputs.data.device) < chance
