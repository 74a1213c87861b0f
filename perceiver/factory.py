"""Builds the model of a recipe's `model:` section; the union of all model configs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field, TypeAdapter
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from perceiver import registry
from perceiver.config import Config
from perceiver.decoders import ClassDecoderConfig, DecoderConfig
from perceiver.modalities import InputsConfig
from perceiver.model import Encoder, Perceiver, PerceiverConfig, PerceiverIO, PerceiverIOConfig, Raw, need_classes
from perceiver.presets import PRESETS, preset_values


class PerceiverModel(PerceiverConfig):
    """A Perceiver classifier of one modality or several."""

    kind: Literal["perceiver"] = "perceiver"
    inputs: InputsConfig = Field(description="The modality.")

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module; `classes` is required."""
        return Perceiver(self, cast(Any, self.inputs).build(), need_classes(classes))


class PerceiverIOModel(PerceiverIOConfig):
    """A Perceiver IO of one modality or several, with the decoder of its task."""

    kind: Literal["perceiver_io"] = "perceiver_io"
    inputs: InputsConfig = Field(description="The modality.")
    decoder: DecoderConfig = Field(default=ClassDecoderConfig(), description="Output queries.")

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module; `classes` is required by decoders that classify."""
        inputs = cast(Any, self.inputs).build()
        decoder = cast(Any, self.decoder).build(latent_channels=self.latent_channels, inputs=inputs, classes=classes)
        return PerceiverIO(self, inputs, decoder)


_OWN: dict[str, type[Config]] = {"perceiver": PerceiverModel, "perceiver_io": PerceiverIOModel}


def _with_preset(values: Any) -> Any:
    """Replace `{preset: NAME, ...}` by the preset's section, with the other keys merged into it."""
    if not isinstance(values, Mapping) or "preset" not in values:
        return values
    return preset_values(values["preset"], {key: value for key, value in values.items() if key != "preset"})


if TYPE_CHECKING:
    ModelConfig = Config
else:
    ModelConfig = Annotated[
        registry.union(_OWN, registry.members("perceiver.baselines")), BeforeValidator(_with_preset)
    ]


def model_config(values: dict[str, Any]) -> Config:
    """Validate a recipe's `model:` section, where `preset: NAME` stands for the keys of a preset.

    Raises:
        UserError: there is no such preset.
        pydantic.ValidationError: with the path of each invalid key.
    """
    return TypeAdapter(ModelConfig).validate_python(values)


def build_model(config: Config, *, classes: int | None = None) -> nn.Module:
    """Build the model of a config, on the current default device.

    Args:
        config: a member of the `ModelConfig` union.
        classes: number of classes; required by classifiers.

    Returns:
        A module with `input_keys`; call it with the tensor of its one key, or a dict of several.

    Raises:
        UserError: settings contradict each other.
    """
    return cast(Any, config).build(classes=classes)


class _Unfilled(TorchFunctionMode):
    """Skips the initial values of parameters."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        filled = (*args, *(kwargs or {}).values())[0] if func in _FILLS or _initial(func) else None
        return filled if isinstance(filled, Tensor) and filled.is_meta else func(*args, **(kwargs or {}))


def _initial(function: Any) -> bool:
    return getattr(function, "__module__", None) == "torch.nn.init"


_FILLS = {Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_}


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules on the meta device: shapes without values, and without the time to draw initial ones.

    To draw from a normal distribution there, torch would first import its compiler, for seconds.
    """
    with torch.device("meta"), _Unfilled():
        yield


def preset_config(name: str, **overrides: Any) -> tuple[Config, int | None]:
    """Return a preset's model config and number of classes.

    Args:
        name: one of `perceiver.list_models()`.
        overrides: keys of the model section, merged as `perceiver.presets.preset_values` does; `classes` replaces the
            number of classes.

    Raises:
        UserError: there is no such preset.
        pydantic.ValidationError: an override is invalid.
    """
    classes = overrides.pop("classes", None)
    config = model_config({"preset": name, **overrides})
    return config, PRESETS[name].classes if classes is None else classes


def create_model(name: str, *, device: torch.device | str = "cpu", **overrides: Any) -> nn.Module:
    """Build a preset's model with initial weights.

    Args:
        name: one of `perceiver.list_models()`.
        device: device of the model; `meta` takes neither time nor memory.
        overrides: see `preset_config`; for example `classes=10, latents=128, inputs={"size": (64, 64)}`.
    """
    config, classes = preset_config(name, **overrides)
    with on_meta() if torch.device(device).type == "meta" else torch.device(device):
        return build_model(config, classes=classes)


def input_keys(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the batch tensors that a model reads."""
    return tuple(cast(Any, model).input_keys)


def attention_maps(model: nn.Module, raw: Raw, *, scores: bool = False) -> list[Tensor]:
    """Return the attention of each cross-attend of a Perceiver to its inputs, in order; empty for other models.

    Args:
        model: any model.
        raw: the batch's raw tensors.
        scores: return the scores before the softmax, which the Perceiver paper draws, instead of the weights.

    Returns:
        A tensor (B, heads, N, M) for each cross-attend; `input_maps` brings the M inputs to their grids.
    """
    if not isinstance(model, Encoder):
        return []
    found = cast(Any, model).attention_scores(raw)
    return found if scores else [each.softmax(-1) for each in found]


def input_maps(model: nn.Module, values: Tensor) -> dict[str, Tensor]:
    """Return values of a Perceiver's inputs on the inputs' grids, by the modality's name; without points and texts.

    Args:
        model: a Perceiver.
        values: (..., M), such as attention maps.

    Returns:
        (..., H, W) for images, (..., F, H, W) for videos, (..., bins, frames) for spectrograms, the highest frequency
        first, (..., M) for sound and series; a model of one modality names it by its kind.
    """
    inputs = cast(Any, model).inputs
    parts = getattr(inputs, "modalities", None) or {inputs.config.kind: inputs}
    sizes = [part.elements for part in parts.values()]
    if sum(sizes) != values.shape[-1]:
        return {}
    maps: dict[str, Tensor] = {}
    for (name, part), own in zip(parts.items(), values.split(sizes, -1), strict=True):
        if hasattr(part, "as_map"):
            maps[name] = part.as_map(own)
        elif hasattr(part, "grid"):
            maps[name] = own.unflatten(-1, part.grid)
    return maps
