"""Which parameters are frozen, and which patterns are refused."""

import pytest
import torch
from torch import nn

from perceiver.config import UserError
from perceiver.optim.config import OptimConfig, build_optimizer
from perceiver.optim.freezing import freeze


class Tied(nn.Module):
    """An embedding that is also the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.middle = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight


def test_matching_parameters_have_no_gradient_and_no_state() -> None:
    model = Tied()
    assert freeze(model, ["middle.*"]) == 12
    optimizer = build_optimizer(OptimConfig(), model)
    model.head(model.middle(model.embedding(torch.tensor([1])))).sum().backward()
    optimizer.step()
    assert model.middle.weight.grad is None and model.middle.weight not in optimizer.state
    assert model.embedding.weight in optimizer.state


@pytest.mark.parametrize("pattern", ["embedding.*", "head.weight"])
def test_a_tied_parameter_is_frozen_by_any_of_its_names(pattern: str) -> None:
    model = Tied()
    assert freeze(model, [pattern]) == 15
    assert not model.head.weight.requires_grad and model.head.bias.requires_grad


def test_no_pattern_freezes_nothing() -> None:
    assert freeze(Tied(), []) == 0


@pytest.mark.parametrize(
    ("patterns", "parts"),
    [
        (["middle.*", "encoder.*"], ("'encoder.*' matches no parameter", "embedding, middle, head", "'embedding.*'")),
        (["*"], ("'*' freezes all parameters",)),
        (["middle"], ("'middle' matches no parameter",)),
        (["*.bias", "["], ("'[' matches no parameter",)),
    ],
)
def test_bad_patterns_are_refused(patterns: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        freeze(Tied(), patterns)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)
