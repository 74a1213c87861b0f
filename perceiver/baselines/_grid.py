"""Inputs of any modality as an image, for baselines that want one: data and positions are its channels."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Size, UserError
from perceiver.modalities import InputsConfig
from perceiver.model import Raw
from perceiver.storage import first_line


class BaselineConfig(Config):
    """What the baselines have in common: the modality whose inputs they read."""

    inputs: InputsConfig = Field(description="The modality; Fourier positions make the (FF) rows of the tables.")
    grid: tuple[Size, Size] | None = Field(
        default=None, description="Grid that unordered points are laid out on in the order given (44 x 44 in §4.3)."
    )


class Baseline(nn.Module):
    """Reads raw tensors through a modality.

    Attributes: `input_keys` as for Perceivers, `grid` the image that the inputs form, if they form one.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.inputs: nn.Module = cast(Any, config.inputs).build()
        self.channels: int = cast(Any, self.inputs).channels
        self.laid_out = config.grid
        self.grid: tuple[int, ...] = config.grid or tuple(getattr(self.inputs, "grid", ()))

    @property
    def input_keys(self) -> tuple[str, ...]:
        """Names of the raw tensors that the model reads."""
        return cast(Any, self.inputs).keys

    @property
    def optional_keys(self) -> tuple[str, ...]:
        """Names of raw tensors, such as masks, that the model reads if they are given."""
        return tuple(getattr(self.inputs, "optional_keys", ()))

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for each input key."""
        return cast(Any, self.inputs).example(batch, device)

    def tokens(self, raw: Raw) -> tuple[Tensor, Tensor | None]:
        """Return the inputs (B, M, C), with laid-out points cut or padded with zeros to the grid, and the mask."""
        tensors = raw if isinstance(raw, Mapping) else {self.input_keys[0]: raw}
        inputs = self.inputs(tensors, torch.float32)
        x, mask = inputs.dense, inputs.mask
        if self.laid_out is not None:
            size = self.laid_out[0] * self.laid_out[1]
            x = nn.functional.pad(x[:, :size], (0, 0, 0, max(0, size - x.shape[1])))
            mask = None
        return x, mask

    def image(self, raw: Raw) -> Tensor:
        """Return the inputs as an image (B, C, H, W).

        Raises:
            UserError: the inputs form no 2-D grid.
        """
        if len(self.grid) != 2:
            raise UserError(f"model.inputs: got inputs of grid {self.grid}; wanted an image: set model.grid, as 44, 44")
        x, _ = self.tokens(raw)
        return x.transpose(1, 2).unflatten(2, cast(Any, self.grid))


def transformers_library() -> Any:
    """Import the transformers library.

    Raises:
        UserError: it is not installed, or does not work with this version of torch.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers: not installed; wanted for this model: pip install '.[models]'") from error
    try:
        _ = transformers.PreTrainedModel  # imported on first use
    except ImportError as error:
        raise UserError(
            f"transformers {transformers.__version__} does not work with torch {torch.__version__} "
            f"({first_line(error, 80)}): install a later torch or an earlier transformers"
        ) from error
    return transformers
