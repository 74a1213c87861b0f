"""From a recipe's `model:` to a module: the union of model configs, and building one."""

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from perceiver import registry
from perceiver.config import Config, UserError
from perceiver.decoders import ClassDecoderConfig, DecoderConfig
from perceiver.modalities import InputsConfig
from perceiver.model import Encoder, Perceiver, PerceiverConfig, PerceiverIO, PerceiverIOConfig, Raw


class PerceiverModel(PerceiverConfig):
    """A Perceiver classifier of one modality or several."""

    kind: Literal["perceiver"] = "perceiver"
    inputs: InputsConfig = Field(description="The modality.")

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Make the module; `classes` is required."""
        if classes is None:
            raise UserError("classes: got none for a classifier; wanted the number of classes: give classes=")
        return Perceiver(self, cast(Any, self.inputs).build(), classes)


class PerceiverIOModel(PerceiverIOConfig):
    """A Perceiver IO of one modality or several, with the decoder of its task."""

    kind: Literal["perceiver_io"] = "perceiver_io"
    inputs: InputsConfig = Field(description="The modality.")
    decoder: DecoderConfig = Field(default=ClassDecoderConfig(), description="Output queries.")

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Make the module; `classes` is required where the decoder classifies."""
        inputs = cast(Any, self.inputs).build()
        decoder = cast(Any, self.decoder).build(latent_channels=self.latent_channels, inputs=inputs, classes=classes)
        return PerceiverIO(self, inputs, decoder)


_OWN: dict[str, type[Config]] = {"perceiver": PerceiverModel, "perceiver_io": PerceiverIOModel}

if TYPE_CHECKING:
    ModelConfig = Config
else:
    ModelConfig = registry.union(_OWN, registry.members("perceiver.baselines"))


def model_config(values: dict[str, Any]) -> Config:
    """Validate a recipe's `model:` section.

    Raises:
        pydantic.ValidationError: with the path of each key that is wrong.
    """
    return TypeAdapter(ModelConfig).validate_python(values)


def build_model(config: Config, *, classes: int | None = None) -> nn.Module:
    """Make the model that a config describes, on the current default device (`torch.device('meta')` costs nothing).

    Args:
        config: a member of the `ModelConfig` union.
        classes: number of classes; required by classifiers.

    Returns:
        A module with `input_keys`; call it with the tensor of its one key, or a dict of several.

    Raises:
        UserError: on settings that do not fit each other.
    """
    return cast(Any, config).build(classes=classes)


def input_keys(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the batch tensors that a model reads."""
    return tuple(cast(Any, model).input_keys)


def attention_maps(model: nn.Module, raw: Raw) -> list[Tensor]:
    """Return the weights (B, heads, N, M) of each cross-attend of a Perceiver in order; empty for other models."""
    if not isinstance(model, Encoder):
        return []
    with torch.no_grad():
        return cast(Any, model).attention_maps(raw)
