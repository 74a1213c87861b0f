"""Optimizers against their formulas written out in numpy, and which parameters are decayed."""

from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from perceiver.optim.config import OptimConfig, build_optimizer
from perceiver.optim.groups import param_groups
from perceiver.optim.lamb import Lamb
from perceiver.optim.partition import FlatLayout, Piece, moments_of, state_of
from tests.perceiver.train.engine.engine_toys import ToyModel

LR, BETA1, BETA2, EPS, DECAY = 0.01, 0.9, 0.99, 1e-6, 0.1


def lamb_in_numpy(param: np.ndarray, grads: list[np.ndarray], decay: float) -> np.ndarray:
    """Return one tensor's trajectory, in float64: Adam scaling, + decay, trust ratio (1 if a norm is 0), -lr."""
    first = second = np.zeros_like(param)
    for t, grad in enumerate(grads, start=1):
        first = BETA1 * first + (1 - BETA1) * grad
        second = BETA2 * second + (1 - BETA2) * grad**2
        update = (first / (1 - BETA1**t)) / (np.sqrt(second / (1 - BETA2**t)) + EPS) + decay * param
        norms = np.sqrt((param**2).sum()), np.sqrt((update**2).sum())
        trust = norms[0] / norms[1] if norms[0] > 0 and norms[1] > 0 else 1.0
        param = param - LR * trust * update
    return param


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


SHAPES = [(4, 3), (5,), (2, 2, 2)]


def test_lamb_follows_the_formula() -> None:
    starts = [drawn(shape, seed) for seed, shape in enumerate(SHAPES)]
    starts.append(np.zeros(3))  # a zero tensor: trust ratio 1
    grads = [[drawn(start.shape, 10 * step + index) for step in range(4)] for index, start in enumerate(starts)]
    params = [nn.Parameter(torch.tensor(start, dtype=torch.float32)) for start in starts]
    groups = [{"params": params[:2], "weight_decay": DECAY}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer = Lamb(groups, lr=LR, betas=(BETA1, BETA2), eps=EPS)
    for step in range(4):
        for index, param in enumerate(params):
            param.grad = torch.tensor(grads[index][step], dtype=torch.float32)
        optimizer.step()
    for index, param in enumerate(params):
        expected = lamb_in_numpy(starts[index], grads[index], DECAY if index < 2 else 0.0)
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=2e-5, atol=1e-6)


def test_lamb_keeps_a_parameter_without_gradient() -> None:
    param = nn.Parameter(torch.ones(3))
    Lamb([param], lr=LR, weight_decay=DECAY).step()
    assert torch.equal(param.detach(), torch.ones(3))


def test_lamb_zero_gradient_and_no_decay_changes_nothing() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.zeros(3)
    Lamb([param], lr=LR).step()
    assert torch.equal(param.detach(), torch.ones(3))


def test_lamb_on_flat_partitions_equals_lamb_on_parameters() -> None:
    """Two 'ranks' have halves of a flattened group, cut in the middle of a parameter, the last one padded."""
    starts = [drawn(shape, seed) for seed, shape in enumerate(SHAPES)]  # 12 + 5 + 8 = 25 elements, halves of 13
    flat = np.concatenate([start.ravel() for start in starts] + [np.zeros(1)])
    pieces = [
        (Piece(0, 0, 0, 12), Piece(1, 0, 12, 1)),
        (Piece(1, 1, 0, 4), Piece(2, 0, 4, 8)),
    ]
    halves = [nn.Parameter(torch.tensor(flat[13 * rank : 13 * rank + 13], dtype=torch.float32)) for rank in (0, 1)]
    optimizers = [Lamb([half], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY) for half in halves]
    grads = [drawn(flat.shape, 40 + step) for step in range(3)]
    for grad in grads:
        grad[-1] = 0.0
        _step_both(optimizers, halves, pieces, grad)
    got = torch.cat([half.detach() for half in halves]).numpy()
    offset = 0
    for start in starts:
        mine = [grad[offset : offset + start.size].reshape(start.shape) for grad in grads]
        expected = lamb_in_numpy(start, mine, DECAY)
        np.testing.assert_allclose(
            got[offset : offset + start.size].reshape(start.shape), expected, rtol=2e-5, atol=1e-6
        )
        offset += start.size


def _step_both(
    optimizers: list[Lamb], halves: list[nn.Parameter], pieces: list[tuple[Piece, ...]], grad: np.ndarray
) -> None:
    """Step both ranks in one process: each rank's all-reduce adds what a dry run of the other contributes."""
    squares: list[torch.Tensor] = []
    for dry in (True, False):
        for rank, (optimizer, half) in enumerate(zip(optimizers, halves, strict=True)):
            before = half.detach().clone(), {key: value.clone() for key, value in optimizer.state[half].items()}
            half.grad = torch.tensor(grad[13 * rank : 13 * rank + 13], dtype=torch.float32)

            def all_reduce(tensor: torch.Tensor, other: int = 1 - rank, dry: bool = dry) -> None:
                squares.append(tensor.clone()) if dry else tensor.add_(squares[other])

            optimizer.shard({half: FlatLayout(("a", "b", "c"), pieces[rank])}, all_reduce)
            optimizer.step()
            if dry:
                half.data.copy_(before[0])
                optimizer.state[half] = before[1]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [param for param in module.parameters() if param.requires_grad]


def adam_in_numpy(param: np.ndarray, grads: list[np.ndarray], *, amsgrad: bool) -> np.ndarray:
    """Return one tensor's trajectory with L2 decay; AMSGrad divides by the largest second moment so far."""
    first = second = largest = np.zeros_like(param)
    for t, grad in enumerate(grads, start=1):
        grad = grad + DECAY * param
        first = BETA1 * first + (1 - BETA1) * grad
        second = BETA2 * second + (1 - BETA2) * grad**2
        largest = np.maximum(largest, second) if amsgrad else second
        param = param - LR * (first / (1 - BETA1**t)) / (np.sqrt(largest / (1 - BETA2**t)) + EPS)
    return param


def sgd_in_numpy(param: np.ndarray, grads: list[np.ndarray], *, momentum: float, nesterov: bool) -> np.ndarray:
    """Return one tensor's trajectory with L2 decay."""
    velocity = np.zeros_like(param)
    for grad in grads:
        grad = grad + DECAY * param
        velocity = momentum * velocity + grad
        param = param - LR * (grad + momentum * velocity if nesterov else velocity)
    return param


ADAM = {"betas": (BETA1, BETA2), "eps": EPS}


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({"kind": "adam", **ADAM}, partial(adam_in_numpy, amsgrad=False)),
        ({"kind": "adam", "amsgrad": True, **ADAM}, partial(adam_in_numpy, amsgrad=True)),
        ({"kind": "sgd"}, partial(sgd_in_numpy, momentum=0.0, nesterov=False)),
        ({"kind": "sgd", "momentum": 0.9}, partial(sgd_in_numpy, momentum=0.9, nesterov=False)),
        ({"kind": "sgd", "momentum": 0.9, "nesterov": True}, partial(sgd_in_numpy, momentum=0.9, nesterov=True)),
    ],
)
def test_adam_and_sgd_follow_their_formulas(settings: Any, formula: Any) -> None:
    optim = OptimConfig.model_validate({"lr": LR, "weight_decay": DECAY, **settings})
    layer = nn.Linear(3, 4, bias=False)
    start = layer.weight.detach().double().numpy().copy()
    grads = [drawn((4, 3), 10 + step) / (step + 1) for step in range(6)]
    optimizer = build_optimizer(optim, layer)
    for grad in grads:
        layer.weight.grad = torch.tensor(grad, dtype=torch.float32)
        optimizer.step()
    np.testing.assert_allclose(layer.weight.detach().numpy(), formula(start, grads), rtol=2e-5, atol=1e-6)
    assert set(moments_of(optimizer)) | {"step"} == set(optimizer.state[layer.weight])


EVERY_KIND = [
    {"kind": "adamw"},
    {"kind": "lamb"},
    {"kind": "adam", "amsgrad": True},
    {"kind": "sgd"},
    {"kind": "sgd", "momentum": 0.9, "nesterov": True},
]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_state_made_before_a_step_is_the_one_that_the_step_makes(kind: Any) -> None:
    """Restoring a checkpoint fills the state of an optimizer that has not taken a step."""
    early, late = deepcopy(model := ToyModel()), model
    optimizers = [build_optimizer(OptimConfig(lr=0.1, **kind), each) for each in (early, late)]
    for tensor in _trained(early):
        state_of(optimizers[0], tensor)
    for each, optimizer in zip((early, late), optimizers, strict=True):
        generator = torch.Generator().manual_seed(0)
        for param in _trained(each):
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    for left, right in zip(_trained(early), _trained(late), strict=True):
        assert torch.equal(left, right)
        states = [optimizer.state[each] for optimizer, each in zip(optimizers, (left, right), strict=True)]
        assert states[0].keys() == states[1].keys() and int(states[0]["step"]) == int(states[1]["step"]) == 1


def test_biases_and_norms_are_not_decayed_but_latents_are() -> None:
    model = ToyModel()
    model.leave.weight.requires_grad_(False)
    groups = param_groups(model, weight_decay=0.3)
    names = {id(param): name for name, param in model.named_parameters()}
    found = {group["weight_decay"]: {names[id(param)] for param in group["params"]} for group in groups}
    assert found == {
        0.3: {"enter.weight", "latents", "shift"},
        0.0: {"enter.bias", "norm.weight", "norm.bias", "leave.bias"},
    }


def test_optimizer_is_built_as_configured() -> None:
    optimizer = build_optimizer(OptimConfig(kind="lamb", lr=0.5, weight_decay=0.2), ToyModel())
    assert isinstance(optimizer, Lamb)
    assert [(group["lr"], group["eps"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.5, 1e-6, 0.2),
        (0.5, 1e-6, 0.0),
    ]
    assert isinstance(build_optimizer(OptimConfig(), ToyModel()), torch.optim.AdamW)


def test_bad_optim_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"lr\n.*0"):
        OptimConfig(lr=0)
    with pytest.raises(ValidationError, match="adamw"):
        OptimConfig.model_validate({"kind": "adagrad"})


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"kind": "sgd", "nesterov": True}, ("nesterov = True", "momentum = 0")),
        ({"momentum": 0.9}, ("kind = 'adamw' has no momentum", "sgd")),
        ({"kind": "sgd", "betas": [0.9, 0.99]}, ("kind = 'sgd' has no betas", "adamw or adam or lamb")),
        ({"kind": "lamb", "amsgrad": True}, ("kind = 'lamb' has no amsgrad", "adamw or adam")),
        ({"kind": "sgd", "momentum": 1}, ("momentum", "less than 1")),
    ],
)
def test_keys_of_another_kind_are_refused(given: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        OptimConfig.model_validate(given)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_config_is_read_again_as_it_was_written(kind: dict[str, Any]) -> None:
    """A run's recipe contains all keys, with the defaults of those that its kind does not use."""
    optim = OptimConfig.model_validate(kind)
    assert OptimConfig.model_validate(optim.model_dump(mode="json")) == optim
