"""Detection of silent corruption: the same forward and backward pass twice, compared bit by bit.

It finds a device that computes the same thing in two ways, not memory that changed before the first pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from perceiver.tasks import Batch, Task
from perceiver.train.engine.ranks import random_state, set_random_state


class ReplayError(RuntimeError):
    """Two passes from the same state have different results."""


def replay(module: nn.Module, task: Task, batch: Batch, device: torch.device) -> str:
    """Compute loss and gradients of a micro-batch twice; return the first tensor whose bits differ, empty if none does.

    Random state and buffers are as before afterwards; no gradient is stored, and no hook of an engine is called.
    """
    state = random_state(device)
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}

    def restore() -> None:
        set_random_state(state, device)
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])

    passes = []
    with _deterministic(device):
        for _ in range(2):
            passes.append(_gradients(module, task, batch))
            restore()
    first, second = passes
    return next((name for name, tensor in first.items() if not same_bits(tensor, second[name])), "")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of the same shape have the same bits, NaN included."""
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def _gradients(module: nn.Module, task: Task, batch: Batch) -> dict[str, Tensor]:
    trained = {name: param for name, param in module.named_parameters() if param.requires_grad}
    loss = task.loss(module, batch).loss_sum
    # Unlike `backward` this does not accumulate, so that the hooks by which an engine reduces gradients are not called.
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    named = zip(trained, found, strict=True)
    return {"the loss": loss.detach(), **{f"the gradient of {name}": g for name, g in named if g is not None}}


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Let torch use only deterministic algorithms on a GPU; an operation without one raises RuntimeError."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or device.type == "cuda")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
