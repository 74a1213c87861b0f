"""Regression against scikit-learn's figures, on any number of workers."""

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.tasks import Targets, known_targets, output_count
from perceiver.tasks.regression import RegressionConfig

TARGETS = Targets(names=("price", "width"), mean=(200.0, -1.0), std=(50.0, 0.1))
TRUE = torch.tensor([[100.0, -1.1], [300.0, -0.9], [250.0, -1.0], [180.0, -1.05]])
FOUND = torch.tensor([[-1.0, 0.5], [1.5, 1.2], [0.2, 0.0], [0.0, -1.0]])


class Fixed(nn.Module):
    """A model that returns its input."""

    input_keys = ("image",)

    def forward(self, x: Tensor) -> Tensor:
        return x


def build(**settings: object) -> object:
    return RegressionConfig.model_validate({"targets": TARGETS, **settings}).build(classes=0)


def figures(parts: list[slice], **settings: object) -> dict[str, float]:
    task, sums, count = build(**settings), {}, 0.0
    for part in parts:
        batch = {"image": FOUND[part], "target": TRUE[part], "valid": torch.ones(len(TRUE[part]), dtype=torch.bool)}
        count += float(task.count(batch))
        for name, value in task.loss(Fixed(), batch).sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return task.summarise(sums, count)


def test_figures_are_scikit_learns_in_units() -> None:
    found = figures([slice(0, 4)])
    predicted = (FOUND * torch.tensor(TARGETS.std) + torch.tensor(TARGETS.mean)).numpy()
    for column, name in enumerate(TARGETS.names):
        true, guess = TRUE[:, column].numpy(), predicted[:, column]
        assert found[f"mae_{name}"] == pytest.approx(mean_absolute_error(true, guess), rel=1e-5)
        assert found[f"rmse_{name}"] == pytest.approx(root_mean_squared_error(true, guess), rel=1e-5)
        assert found[f"r2_{name}"] == pytest.approx(r2_score(true, guess), rel=1e-5)
    assert found["r2"] == pytest.approx(r2_score(TRUE.numpy(), predicted), rel=1e-5)


def test_figures_add_up_over_workers() -> None:
    assert figures([slice(0, 1), slice(1, 4)]) == pytest.approx(figures([slice(0, 4)]), rel=1e-9)


def test_padding_counts_nothing_whatever_it_holds() -> None:
    task = build()
    batch = {
        "image": torch.cat([FOUND, FOUND[:1]]),
        "target": torch.cat([TRUE, torch.tensor([[torch.nan, torch.inf]])]),
        "valid": torch.tensor([True] * 4 + [False]),
    }
    output = task.loss(Fixed(), batch)
    sums = {name: float(value) for name, value in output.sums.items()}
    assert task.summarise(sums, float(task.count(batch))) == pytest.approx(figures([slice(0, 4)]), rel=1e-9)


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_losses_are_of_normalised_numbers(loss: str) -> None:
    wanted = (TRUE.numpy() - np.array(TARGETS.mean)) / np.array(TARGETS.std)
    error = np.abs(FOUND.numpy() - wanted)
    each = {"mse": error**2, "l1": error, "huber": np.where(error < 0.5, error**2 / 2, 0.5 * (error - 0.25))}[loss]
    assert figures([slice(0, 4)], loss=loss, huber_delta=0.5)["loss"] == pytest.approx(each.mean(), rel=1e-5)


def test_predictions_have_names_and_units() -> None:
    task = build()
    found = task.predict(Fixed(), {"image": FOUND})
    assert found["prediction_price"].tolist() == [150.0, 275.0, 210.0, 200.0]
    assert torch.equal(task.finish(FOUND)["prediction"][:, 1], found["prediction_width"])
    assert known_targets(task, {"target": TRUE})["target_price"].tolist() == [100.0, 300.0, 250.0, 180.0]
    assert known_targets(task, {"image": FOUND}) == {}


def test_targets_are_required_and_as_many() -> None:
    assert output_count(RegressionConfig(targets=TARGETS), 10) == 2
    with pytest.raises(UserError, match="targets"):
        RegressionConfig().build(classes=0)
    with pytest.raises(ValueError, match="2 names, 1 means"):
        Targets(names=("a", "b"), mean=(0.0,), std=(1.0,))
