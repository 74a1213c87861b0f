"""What surrounds CUDA graphs, with torch's capture replaced: which calls replay, buffers, gradients that are kept."""

from typing import Any, cast

import pytest
import torch
from torch import nn

from benchmarks import cuda_graphs
from benchmarks.cuda_graphs import MOST_GRAPHS, GraphedForward


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, raw: Any, asked: Any = None) -> torch.Tensor:
        cast(torch.Tensor, self.seen).add_(self.training)
        x = raw if isinstance(raw, torch.Tensor) else raw["x"] + raw["y"]
        return x * self.scale


class Capture:
    """Stands in for torch.cuda.make_graphed_callables; the gradient is in memory that the next replay overwrites."""

    def __init__(self) -> None:
        self.captured: list[tuple[torch.Tensor, ...]] = []
        self.replays = 0
        self.cached: list[bool] = []

    def __call__(self, module: Any, sample: tuple[torch.Tensor, ...], allow_unused_input: bool) -> Any:
        module(*sample)  # passes to warm up
        self.captured.append(sample)
        self.cached.append(torch.is_autocast_cache_enabled())
        gradient, capture = torch.zeros(2), self

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, scale: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
                capture.replays += 1
                ctx.save_for_backward(sum(tensors))
                return sum(tensors) * scale

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor) -> Any:
                (x,) = ctx.saved_tensors
                gradient.copy_((grads[0] * x).sum(0))
                return gradient.detach(), *[None] * (3 - ctx.needs_input_grad.count(True))

        return lambda *tensors: Replay.apply(module.model.scale, *tensors)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    found = Capture()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", found)
    return found


def graphed() -> tuple[Model, GraphedForward]:
    model = Model()
    forward = GraphedForward(model, model.forward)
    return model, forward


def test_training_replays_one_graph_per_shape_and_keeps_the_buffers(capture: Capture):
    model, forward = graphed()
    x = torch.ones(4, 2)
    for _ in range(3):
        torch.testing.assert_close(forward(x), x * model.scale)
    forward(torch.ones(2, 2))
    forward({"x": x, "y": x})
    assert [len(sample) for sample in capture.captured] == [1, 1, 2] and capture.replays == 5
    assert model.seen == 0, "passes that warm up must not count"
    assert not any(capture.cached)


def test_gradients_of_two_micro_batches_are_added(capture: Capture):
    model, forward = graphed()
    for value in (1.0, 10.0):
        forward(torch.full((4, 2), value)).sum().backward()
    assert model.scale.grad is not None
    torch.testing.assert_close(model.scale.grad, torch.tensor([44.0, 44.0]))


def test_evaluation_and_other_arguments_run_without_graphs(capture: Capture):
    model, forward = graphed()
    x = torch.ones(4, 2)
    with torch.no_grad():
        forward(x)
    forward(x, asked={"flow": torch.zeros(1)})
    model.eval()
    forward(x)
    assert not capture.captured


def test_many_shapes_run_without_graphs(capture: Capture):
    _, forward = graphed()
    for rows in range(1, MOST_GRAPHS + 3):
        assert forward(torch.ones(rows, 2)).shape == (rows, 2)
    assert len(capture.captured) == MOST_GRAPHS


def test_a_failed_capture_is_reported_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    model, forward = graphed()
    for _ in range(2):
        forward(torch.ones(1, 2)).sum().backward()
    (record,) = [record for record in caplog.records if record.name == cuda_graphs.__name__]
    assert "not used" in record.getMessage() and not forward.works
    torch.testing.assert_close(model.scale.grad, torch.tensor([2.0, 2.0]))
