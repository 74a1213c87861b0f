"""Layers compiled by `torch.compile` for training: each kind of layer once, whatever the depth.

The layers of a latent Transformer run the same code on the same shapes, so one compiled function serves them all. What
is between the matrix products (layer norms, casts, GELU, residuals) becomes a few kernels instead of some thirty.
"""

import logging
from collections.abc import Callable
from types import FunctionType
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

    If a kind of layer cannot be compiled (no C compiler, no Triton), a warning says so and from then on none is.

    Args:
        backend: torch.compile's; "aot_eager" traces without generating code.
    """

    def __init__(self, backend: Any = "inductor") -> None:
        self._backend = backend
        # A code object of its own: torch keeps only a few compiled variants of each.
        apply = FunctionType(_apply.__code__.replace(co_name="apply_layer"), globals())
        self._compiled = cast(Callable[..., Tensor], torch.compile(apply, dynamic=False, backend=backend))
        self._proved: set[type] = set()
        self.works: bool | None = None
        """Whether layers can be compiled; None before the first."""

    def __reduce__(self) -> Any:
        return CompiledLayers, (self._backend,)

    def prove(self, layer: nn.Module, *args: Any) -> None:
        """Compile both passes of the first layer of its kind; call it outside activation checkpointing."""
        if self.works is False or type(layer) in self._proved or not (torch.is_grad_enabled() and _aligned(layer)):
            return
        try:
            out = self._compiled(layer, *args)
            weights = [param for param in layer.parameters() if param.requires_grad]
            if out.requires_grad and weights:  # a backward pass is compiled when it first runs
                torch.autograd.grad(out, weights, torch.zeros_like(out), allow_unused=True)
            self._proved.add(type(layer))
            self.works = True
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  the compiler raises many types; an error of the layer comes again
            layer(*args)
            self.works = False
            log.warning("train.compile: layers run uncompiled, because torch.compile failed: %s", first_line(error))

    def __call__(self, layer: nn.Module, *args: Any) -> Tensor:
        """Apply a layer."""
        usable = self.works and type(layer) in self._proved and torch.is_grad_enabled() and _aligned(layer)
        return self._compiled(layer, *args) if usable else layer(*args)
