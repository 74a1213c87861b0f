"""Forward and backward pass of a model as two CUDA graphs, launched by the host at once instead of kernel by kernel.

A step of the ImageNet Perceiver launches thousands of kernels. Where the host needs longer for that than the GPU for
computing (small micro-batches, slow CPUs), the GPU waits; replaying graphs ends that. A graph has fixed memory and
shapes, so each shape of inputs has its own, and its activations stay allocated.

Not used in training: under DeepSpeed, which keeps autograd's nodes of another stream, the capture failed (torch 2.11,
benchmarks/results/2026-11-29-gpu.md).
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perceiver.storage import first_line

log = logging.getLogger(__name__)
MOST_GRAPHS = 4
"""Shapes of inputs that get graphs of their own; others run without."""


class _OfTensors(nn.Module):
    """A model with positional tensors as arguments, as graphs need them."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any], keys: tuple[str, ...] | None) -> None:
        super().__init__()
        self.model, self._original, self._keys = model, forward, keys

    def forward(self, *tensors: Tensor) -> Any:
        raw = tensors[0] if self._keys is None else dict(zip(self._keys, tensors, strict=True))
        return self._original(raw)


class GraphedForward:
    """Replaces the forward function of a model: in training it replays graphs, otherwise it calls the function.

    The gradients that a graph leaves in its own memory are copied before they are accumulated, because the next replay
    overwrites them.

    Args:
        model: on a GPU; its parameters stay where they are in memory.
        forward: its forward function, of one tensor or a mapping of tensors; calls with more arguments run without
            graphs.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self._model, self._original = model, forward
        self._graphs: dict[Any, Callable[..., Any]] = {}
        self.works = True
        """False after a capture has failed."""
        for param in model.parameters():
            if param.requires_grad:
                param.register_hook(self._own)

    def __call__(self, raw: Tensor | Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return the model's outputs; those of a graph are overwritten by the next call."""
        alone = not args and not any(value is not None for value in kwargs.values())
        if not (self.works and alone and self._model.training and torch.is_grad_enabled()):
            return self._original(raw, *args, **kwargs)
        keys = None if isinstance(raw, Tensor) else tuple(raw)
        tensors = (raw,) if isinstance(raw, Tensor) else tuple(raw.values())
        kind = (keys, *((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors))
        if kind not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                return self._original(raw)
            try:
                self._graphs[kind] = self._capture(keys, tensors)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001  whatever cannot be captured, or the model itself, raises
                self.works = False
                out = self._original(raw)
                log.warning("CUDA graphs are not used, because the capture failed: %s", first_line(error))
                return out
        return self._graphs[kind](*tensors)

    def _own(self, gradient: Tensor) -> Tensor | None:
        return gradient.clone() if self._graphs else None

    def _capture(self, keys: tuple[str, ...] | None, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """Return the model as a pair of graphs; passes that warm up do not change its buffers."""
        device = tensors[0].device.type
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        half = torch.is_autocast_enabled(device)
        with torch.autocast(device, torch.get_autocast_dtype(device), enabled=half, cache_enabled=False):
            module = _OfTensors(self._model, self._original, keys).train()
            sample = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors)
            graphed = torch.cuda.make_graphed_callables(module, sample, allow_unused_input=True)
        for name, buffer in self._model.named_buffers():
            buffer.copy_(buffers[name])
        return graphed
