"""The torch engine in one process: exact means, clipping, skipped steps, evaluation, save and load."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from perceiver.config import UserError
from perceiver.optim.config import OptimConfig
from perceiver.optim.schedules import ConstantSchedule, CosineSchedule, build_schedule
from perceiver.tasks import LossOutput
from perceiver.train.engine.protocol import evaluate
from perceiver.train.engine.ranks import Ranks
from tests.perceiver.train.engine.engine_toys import Batch, ToyModel, ToyTask, share, toy_rows
from tests.perceiver.train.engine.torch_engine import TorchEngine

CPU = torch.device("cpu")


def engine(optim: OptimConfig | None = None, seed: int = 0) -> TorchEngine:
    optim = optim or OptimConfig(lr=1e-2)
    schedule = build_schedule(optim.schedule, total_steps=10, steps_per_epoch=5)
    return TorchEngine(ToyModel(seed), ToyTask(), optim, schedule, device=CPU)


def losses(engine: TorchEngine, steps: range, micro_batches: int = 1) -> list[float]:
    return [engine.step(share(toy_rows(step, 20), 0, 1, micro_batches), step).loss for step in steps]


def test_step_is_the_mean_over_valid_rows() -> None:
    """Loss, gradient norm and update of one SGD-like step, calculated with plain torch on the valid rows alone."""
    batch = toy_rows(0, 20)
    model, valid = ToyModel(), batch["valid"]
    logits = model(batch["inputs"][valid])
    loss = nn.functional.cross_entropy(logits, batch["label"][valid])
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    accuracy = float((logits.argmax(-1) == batch["label"][valid]).float().mean())

    result = engine().step(share(batch, 0, 1, 4), 0)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert result.metrics == {"loss": pytest.approx(loss.item(), rel=1e-5), "accuracy": pytest.approx(accuracy)}
    assert not result.skipped


def test_accumulation_does_not_change_the_run() -> None:
    """Micro-batches have different numbers of valid rows, so a mean of means would differ."""
    whole, pieces = losses(engine(), range(6)), losses(engine(), range(6), micro_batches=5)
    assert pieces == pytest.approx(whole, rel=1e-5)
    assert whole[-1] != pytest.approx(whole[0], rel=1e-3)


def test_clipping_limits_the_gradient() -> None:
    """With eps = 1e6 the Adam update is proportional to the gradient, so clipping to a tenth shrinks it to a tenth."""
    moves = []
    for clip in (None, 0.1):
        run = engine(OptimConfig(lr=1e5, eps=1e6, weight_decay=0, clip=clip))
        before = run.module.get_parameter("leave.weight").detach().clone()
        norm = run.step([toy_rows(0, 20)], 0).grad_norm
        moves.append((run.module.get_parameter("leave.weight").detach() - before, norm))
    (free, norm), (clipped, clipped_norm) = moves
    assert norm is not None and norm > 0.1
    assert clipped_norm == norm
    torch.testing.assert_close(clipped, free * (0.1 / norm), rtol=1e-4, atol=2e-7)


def test_learning_rate_comes_from_the_step_number() -> None:
    optim = OptimConfig(lr=0.5, schedule=CosineSchedule(warmup_steps=2))
    run = engine(optim)
    assert [run.step([toy_rows(0, 20)], step).lr for step in (0, 1, 6)] == pytest.approx([0.25, 0.5, 0.25])


def test_a_gradient_that_is_not_finite_is_skipped_and_reported() -> None:
    run = engine()
    before = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    bad = toy_rows(0, 20)
    bad["inputs"][1] = math.inf
    result = run.step([bad], 0)
    assert result.skipped and math.isnan(result.loss)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.module.state_dict().items())
    good = run.step([toy_rows(1, 20)], 1)
    assert not good.skipped and math.isfinite(good.loss)


def test_a_batch_without_valid_rows_has_a_loss_of_nan() -> None:
    batch = toy_rows(0, 20)
    batch["valid"] = torch.zeros(20, dtype=torch.bool)
    result = engine().step([batch], 0)
    assert math.isnan(result.loss) and result.metrics == {} and result.grad_norm == 0.0


class ModeProbe(ToyModel):
    """Records in which mode and with which gradient setting it ran."""

    seen: list[tuple[bool, bool]]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, torch.is_grad_enabled()))
        return super().forward(inputs)


def test_evaluate_counts_valid_rows_only_and_restores_the_mode() -> None:
    model = ModeProbe()
    model.seen = []
    optim = OptimConfig()
    run = TorchEngine(model, ToyTask(), optim, build_schedule(optim.schedule, 1, 1), device=CPU)
    run.step([toy_rows(9, 20)], 0)
    batches = [toy_rows(0, 20), toy_rows(1, 7)]
    valid = [{name: tensor[batch["valid"]] for name, tensor in batch.items()} for batch in batches]
    inputs, labels = (torch.cat([batch[key] for batch in valid]) for key in ("inputs", "label"))
    with torch.no_grad():
        logits = model(inputs)
    model.seen.clear()
    metrics = run.evaluate(batches)
    assert metrics["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert model.seen == [(False, False)] * 2
    assert model.training


@pytest.mark.parametrize("batches", [[], [{**toy_rows(0, 5), "valid": torch.zeros(5, dtype=torch.bool)}]])
def test_an_empty_evaluation_is_refused(batches: list[Batch]) -> None:
    with pytest.raises(UserError, match="evaluation set"):
        engine().evaluate(batches)


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_saved_and_loaded_run_continues_alike(tmp_path: Path, kind: str) -> None:
    optim = OptimConfig.model_validate({"kind": kind, "lr": 1e-2, "schedule": {"kind": "cosine"}})
    run = engine(optim)
    losses(run, range(3))
    run.save(tmp_path / "state")
    noise = torch.rand(3)
    rest = losses(run, range(3, 6))
    again = engine(optim, seed=1)
    again.load(tmp_path / "state")
    assert torch.equal(torch.rand(3), noise)
    assert losses(again, range(3, 6)) == rest


def test_loading_refuses_what_is_missing_or_foreign(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.json"):
        engine().load(tmp_path)
    engine().save(tmp_path)
    other = ToyModel()
    other.leave = nn.Linear(7, 9)
    optim = OptimConfig()
    run = TorchEngine(other, ToyTask(), optim, build_schedule(ConstantSchedule(), 1, 1), device=CPU)
    with pytest.raises(UserError, match=r"leave\.bias.*\(5,\).*\(9,\)"):
        run.load(tmp_path)


def test_weights_are_complete_and_float32() -> None:
    run = engine()
    weights = run.weights()
    assert weights is not None and weights.keys() == run.module.state_dict().keys()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    run.step([toy_rows(0, 20)], 0)
    assert not torch.equal(weights["latents"], run.module.state_dict()["latents"])


def test_a_task_that_draws_gets_the_step() -> None:
    class Drawing(ToyTask):
        step = -1

        def count(self, batch: Batch) -> torch.Tensor:
            steps.append(self.step)
            return super().count(batch)

    steps: list[int] = []
    schedule = build_schedule(ConstantSchedule(), total_steps=10, steps_per_epoch=5)
    drawing = TorchEngine(ToyModel(), Drawing(), OptimConfig(), schedule, device=CPU)
    drawing.step(share(toy_rows(7, 20), 0, 1, 1), 7)
    drawing.evaluate(share(toy_rows(0, 20), 0, 1, 1))
    assert steps == [7, 0]


def test_sum_over_one_rank_is_the_value() -> None:
    assert engine().sum([1.5, -2.0]) == [1.5, -2.0]


def test_bf16_runs_under_autocast_and_learns_about_the_same() -> None:
    optim = OptimConfig(lr=1e-2)
    schedule = build_schedule(optim.schedule, 10, 5)
    half = TorchEngine(ToyModel(), ToyTask(), optim, schedule, device=CPU, precision="bf16")
    assert losses(half, range(4)) == pytest.approx(losses(engine(optim), range(4)), rel=2e-2)
    assert half.module.get_parameter("latents").dtype == torch.float32


def test_an_evaluation_is_one_also_for_a_wrapper_that_changes_only_its_module() -> None:
    """DeepSpeed's engine stays in training mode when it is told otherwise; tasks ask the engine."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)

        def train(self, mode: bool = True) -> "Wrapper":
            self.module.train(mode)
            return self

    class Watching:
        def count(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.ones(())

        def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
            assert not model.training and not model.module.training
            return LossOutput(torch.zeros(()), {})

        def summarise(self, sums: dict[str, float], count: float) -> dict[str, float]:
            return {"count": count}

        def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {}

    model = Wrapper()
    assert evaluate(model, Watching(), [{}], Ranks(torch.device("cpu"))) == {"count": 1.0}
    assert model.training and model.module.training
