"""A pass that computes something else the second time is found, with the tensor; nothing else changes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver.train.engine.replay import replay, same_bits
from tests.perceiver.train.toy import ToyTask, toy_batches

CPU = torch.device("cpu")


class Flipping(nn.Linear):
    """A layer that flips the lowest bit of one number in its n-th pass."""

    def __init__(self, pass_: int, backward: bool) -> None:
        super().__init__(8, 8)
        self.pass_, self.in_backward, self.count = pass_, backward, 0

    def forward(self, input: Tensor) -> Tensor:
        self.count += 1
        output = super().forward(input)
        if self.count == self.pass_:
            if self.in_backward:
                output.register_hook(flipped)
            else:
                output = output + (flipped(output.detach()) - output.detach())
        return output


def flipped(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.view(torch.int32)[0, 0] ^= 1 << 22
    return copy


def model(pass_: int = 0, backward: bool = False) -> nn.Module:
    torch.manual_seed(0)
    normal = nn.BatchNorm1d(8)
    return nn.Sequential(nn.Linear(4, 8), normal, nn.Dropout(0.5), Flipping(pass_, backward), nn.Linear(8, 1))


def check(module: nn.Module) -> str:
    (batch,) = toy_batches(0, 1)
    task: Any = ToyTask()
    return replay(module, task, batch, CPU)


def test_dropout_and_buffers_are_no_difference_and_stay_as_they_were() -> None:
    module = model()
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    assert check(module) == ""
    assert all(same_bits(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(param.grad is None for param in module.parameters())


@pytest.mark.parametrize("pass_", [1, 2])
def test_a_flipped_bit_of_the_forward_pass_is_found(pass_: int) -> None:
    assert check(model(pass_)) == "the loss"


def test_a_flipped_bit_of_the_backward_pass_is_found() -> None:
    assert check(model(2, backward=True)) == "the gradient of 0.weight"
