"""Layers compiled by `torch.compile` for training: each kind of layer once, whatever the depth.

The layers of a latent Transformer run the same code on the same shapes, so one compiled function serves them all. What
is between the matrix products (layer norms, casts, GELU, residuals) becomes a few kernels instead of some thirty.
"""

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from perceiver.storage import first_line

log = logging.getLogger(__name__)


def _apply(layer: nn.Module, *args: Any) -> Tensor:
    return layer(*args)


def _aligned(layer: nn.Module) -> bool:
    """Return whether all weights start at a multiple of 16 bytes.

    The compiler assumes it of all layers if it holds for the first; in ZeRO's flat arrays it holds for most.
    """
    return all(param.data_ptr() % 16 == 0 for param in layer.parameters())


class CompiledLayers:
    """Applies layers as compiled functions while gradients are recorded, and as they are otherwise.

    If the first layer cannot be compiled (no C compiler, no Triton), a warning says so and none is.

    Args:
        backend: torch.compile's; "aot_eager" traces without generating code.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._compiled = cast(Callable[..., Tensor], torch.compile(_apply, dynamic=False, backend=backend))
        self.works: bool | None = None
        """Whether layers can be compiled; None before the first."""

    def __call__(self, layer: nn.Module, *args: Any) -> Tensor:
        """Apply a layer."""
        if self.works is False or not torch.is_grad_enabled() or not _aligned(layer):
            return layer(*args)
        if self.works:
            return self._compiled(layer, *args)
        try:
            out = self._compiled(layer, *args)
            self.works = True
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  the compiler raises many types; an error of the layer comes again
            out = layer(*args)
            self.works = False
            log.warning("train.compile: layers run uncompiled, because torch.compile failed: %s", first_line(error))
        return out
