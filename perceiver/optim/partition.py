"""Flat tensors of an optimizer: which elements of which parameters they contain, and the state of each tensor.

ZeRO replaces parameters by flat tensors of which each rank owns a slice. LAMB needs to know the parameters for its
trust ratios, and checkpoints need to know them to be independent of how the state was sharded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

AVERAGE = "average"
"""Name of the moving average of the weights among an optimizer's moments, if there is one."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter within a flat tensor.

    Attributes:
        parameter: index into `FlatLayout.names`.
        start: first element, counted in the flattened parameter.
        offset: where that element is in the flat tensor.
        length: number of elements.
    """

    parameter: int
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class FlatLayout:
    """Where parameters are in one tensor of the optimizer on this rank. What no piece covers is padding.

    Attributes:
        names: the parameters of which the tensor has elements on any rank; the same order on all ranks.
        pieces: the elements on this rank.
    """

    names: tuple[str, ...]
    pieces: tuple[Piece, ...]


Layouts = Mapping[Tensor, FlatLayout]


def whole_layouts(parameters: Iterable[tuple[str, Tensor]]) -> dict[Tensor, FlatLayout]:
    """Return the layouts of an optimizer whose tensors are whole parameters."""
    return {param: FlatLayout((name,), (Piece(0, 0, 0, param.numel()),)) for name, param in parameters}


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of the tensors that an optimizer keeps for each of its tensors, which have the same shape.

    They are torch's names: the momentum of SGD, if it has any; the two moments of Adam, AdamW and LAMB, and with
    AMSGrad the maximum of the second. `AVERAGE` is the last, see `perceiver.optim.averaging`.
    """
    defaults = optimizer.defaults
    average = (AVERAGE,) if defaults.get(AVERAGE) else ()
    if "momentum" in defaults:
        return ("momentum_buffer", *average) if defaults["momentum"] else average
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if defaults.get("amsgrad") else ()), *average)


def state_of(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """Return the optimizer's state of one tensor, created as zeros before the first step.

    Returns:
        `step` (0-d float32) and the tensors of `moments_of`, as in torch's optimizers. `step` is on the tensor's
        device for a fused Adam or AdamW, otherwise on the CPU.
    """
    state = optimizer.state[tensor]
    if not state:
        on_device = optimizer.defaults.get("fused") and "momentum" not in optimizer.defaults
        state["step"] = torch.zeros((), device=tensor.device if on_device else "cpu")
        for name in moments_of(optimizer):
            state[name] = torch.zeros_like(tensor)
    return state
