"""Classes and numbers in one multitask, against the single tasks."""

import pytest
import torch
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.tasks import Targets, TaskTarget, known_classes, known_targets
from perceiver.tasks.classification import ClassificationConfig
from perceiver.tasks.multitask import MultitaskConfig
from perceiver.tasks.regression import RegressionConfig

SCALE = Targets(names=("price",), mean=(10.0,), std=(2.0,))
CONFIG = MultitaskConfig(
    tasks={"hue": 2.0, "price": 0.5},
    targets={"hue": TaskTarget(classes=("red", "blue")), "price": TaskTarget(column=1, scale=SCALE)},
)
OUTPUTS = {"hue": torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.1]]), "price": torch.tensor([[0.5], [-1.0], [2.0]])}
BATCH = {
    "image": torch.zeros(3, 1),
    "label_hue": torch.tensor([0, 0, -1]),
    "target": torch.tensor([[0.0, 11.0], [0.0, 7.0], [0.0, 13.0]]),
}


class Fixed(nn.Module):
    """A model with the outputs above."""

    input_keys = ("image",)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OUTPUTS


class One(nn.Module):
    """A model with one of the outputs above."""

    input_keys = ("image",)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return OUTPUTS[self.name]


def test_the_loss_is_the_weighted_sum_and_figures_are_each_tasks_own() -> None:
    task = CONFIG.build(classes=0)
    output = task.loss(Fixed(), BATCH)
    valid = torch.tensor([True, True, False])
    hue = (
        ClassificationConfig().build(classes=2).loss(One("hue"), {**BATCH, "label": BATCH["label_hue"], "valid": valid})
    )
    price = RegressionConfig(targets=SCALE).build(classes=0)
    alone = price.loss(One("price"), {**BATCH, "target": BATCH["target"][:, 1:]})
    assert float(output.loss_sum) == pytest.approx(2 * float(hue.loss_sum) + 0.5 * float(alone.loss_sum), rel=1e-6)
    found = task.summarise({k: float(v) for k, v in output.sums.items()}, float(task.count(BATCH)))
    figures = price.summarise({k: float(v) for k, v in alone.sums.items()}, 3)
    assert found["accuracy_hue"] == found["accuracy"] == 0.5
    assert found["mae_price"] == pytest.approx(figures["mae"]) and found["r2"] == pytest.approx(figures["r2"])


def test_predictions_are_classes_and_units() -> None:
    task = CONFIG.build(classes=0)
    found = task.predict(Fixed(), BATCH)
    assert found["prediction_hue"].tolist() == [0, 1, 0] and found["prediction_price"].tolist() == [11.0, 8.0, 14.0]
    assert known_classes(CONFIG) == {"hue": ("red", "blue")}
    assert set(known_targets(task, BATCH)) == {"label_hue", "target_price"}
    assert task.finish(OUTPUTS)["price"].tolist() == [11.0, 8.0, 14.0]


def test_weights_of_classes() -> None:
    weighted = CONFIG.model_copy(update={"class_weights": {"hue": (1.0, 3.0)}}).build(classes=0)
    plain = CONFIG.build(classes=0)
    batch = {**BATCH, "label_hue": torch.tensor([1, 1, 1])}
    assert float(weighted.loss(Fixed(), batch).sums["loss/hue"]) == pytest.approx(
        3 * float(plain.loss(Fixed(), batch).sums["loss/hue"]), rel=1e-6
    )
    with pytest.raises(UserError, match="2 numbers|has 3 numbers"):
        CONFIG.model_copy(update={"class_weights": {"hue": (1.0, 3.0, 1.0)}}).build(classes=0)


def test_names_must_be_tasks() -> None:
    with pytest.raises(ValueError, match="class_weights has size"):
        MultitaskConfig(tasks={"hue": 1.0}, class_weights={"size": "balanced"})


def test_the_only_label_of_the_data_is_a_task_of_that_name() -> None:
    class Label(nn.Module):
        input_keys = ("image",)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"label": OUTPUTS["hue"]}

    task = MultitaskConfig(tasks={"label": 1.0}).build(classes=0)
    batch = {"image": BATCH["image"], "label": torch.tensor([0, 1, 1])}
    assert float(task.loss(Label(), batch).sums["correct/label"]) == 2
    assert set(known_targets(task, batch)) == {"label"}
