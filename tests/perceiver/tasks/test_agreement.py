"""F1, Matthews, Pearson and Spearman against scikit-learn and SciPy, from parts as on several workers."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor, nn

from perceiver.tasks import Targets, TaskTarget
from perceiver.tasks._base import Batch, Task
from perceiver.tasks.classification import ClassificationConfig
from perceiver.tasks.multitask import MultitaskConfig
from perceiver.tasks.regression import RegressionConfig


class Fixed(nn.Module):
    """A model that returns its input; of two tasks, each its columns."""

    input_keys = ("image",)

    def __init__(self, parts: dict[str, slice] | None = None) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Any:
        return x if self.parts is None else {name: x[:, part] for name, part in self.parts.items()}


def figures(task: Task, model: nn.Module, batch: Batch, parts: int = 3) -> dict[str, float]:
    """Return the figures of an evaluation in parts; those of all parts must be those of the whole."""
    model.eval()
    found = []
    for number in (1, parts):
        sums: dict[str, Any] = {}
        rows: dict[str, list[Tensor]] = {}
        total = 0.0
        pieces = {key: torch.tensor_split(value, number) for key, value in batch.items()}
        for index in range(number):
            piece = {key: pieces[key][index] for key in batch}
            output: Any = task.loss(model, piece)
            total += float(task.count(piece))
            for name, value in output.sums.items():
                sums[name] = sums.get(name, 0) + value.double()
            for name, value in output.rows.items():
                rows.setdefault(name, []).insert(0, value)  # in any order
        plain = {name: value if value.shape else float(value) for name, value in sums.items()}
        found.append(task.summarise({**plain, **{name: torch.cat(each) for name, each in rows.items()}}, total))
    assert found[1] == pytest.approx(found[0], rel=1e-6)  # the loss is summed in float32
    return found[0]


@pytest.mark.parametrize("classes", [2, 5])
def test_classes_are_compared_as_by_scikit_learn(classes: int) -> None:
    """Padding rows have a label of their own; one of five classes neither occurs nor is predicted."""
    rng = torch.Generator().manual_seed(classes)
    logits, labels = torch.randn(200, classes, generator=rng), torch.randint(classes, (200,), generator=rng)
    logits[torch.arange(200), labels] += 1.0
    valid = torch.rand(200, generator=rng) < 0.8
    if classes == 5:
        logits[:, 3] = -9.0
        labels[labels == 3] = 4
    labels[~valid] = -7
    task = ClassificationConfig().build(classes=classes)
    found = figures(task, Fixed(), {"image": logits, "label": labels, "valid": valid})
    true, predicted = labels[valid].numpy(), logits.argmax(1)[valid].numpy()
    average = "binary" if classes == 2 else "macro"
    assert found["f1"] == pytest.approx(f1_score(true, predicted, average=average), rel=1e-9)
    assert found["matthews"] == pytest.approx(matthews_corrcoef(true, predicted), rel=1e-9)


def test_predictions_of_one_class_agree_in_nothing() -> None:
    task = ClassificationConfig().build(classes=2)
    logits = torch.tensor([[1.0, 0.0]] * 4)
    found = figures(task, Fixed(), {"image": logits, "label": torch.tensor([0, 1, 0, 1])}, parts=2)
    assert found["f1"] == found["matthews"] == 0.0 and found["accuracy"] == 0.5


def test_a_training_step_does_not_compute_them() -> None:
    task = ClassificationConfig().build(classes=2)
    batch = {"image": torch.zeros(2, 2), "label": torch.tensor([0, 1])}
    assert set(task.loss(Fixed().train(), batch).sums) == {"loss", "correct", "correct_top5"}


def test_numbers_are_compared_as_by_scipy() -> None:
    """With equal values, and far from the mean of the training split."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 6, (150, 2)).astype(np.float32)
    given = (true + rng.normal(size=true.shape)).round().astype(np.float32)
    given[:, 1] = -given[:, 1]
    targets = Targets(names=("a", "b"), mean=(900.0, 0.0), std=(2.0, 1.0))
    task = RegressionConfig(targets=targets).build(classes=0)
    outputs = (torch.from_numpy(given) - torch.tensor(targets.mean)) / torch.tensor(targets.std)
    valid = torch.arange(150) % 7 != 0
    found = figures(task, Fixed(), {"image": outputs, "target": torch.from_numpy(true), "valid": valid})
    for column, name in enumerate("ab"):
        first, second = given[valid.numpy(), column], true[valid.numpy(), column]
        assert found[f"pearson_{name}"] == pytest.approx(pearsonr(first, second).statistic, rel=1e-4)
        assert found[f"spearman_{name}"] == pytest.approx(spearmanr(first, second).statistic, rel=1e-9)
    assert found["spearman"] == pytest.approx((found["spearman_a"] + found["spearman_b"]) / 2)


def test_equal_numbers_have_no_correlation() -> None:
    task = RegressionConfig(targets=Targets(names=("a",), mean=(3.0,), std=(1.0,))).build(classes=0)
    found = figures(task, Fixed(), {"image": torch.full((6, 1), 0.1), "target": torch.arange(6.0)[:, None]})
    assert found["pearson"] == found["spearman"] == 0.0


def test_each_of_several_tasks_has_its_figures() -> None:
    """A row without a label of the one task counts for the other."""
    config = MultitaskConfig(
        tasks={"size": 1.0, "hue": 1.0},
        targets={
            "size": TaskTarget(classes=("small", "large")),
            "hue": TaskTarget(column=0, scale=Targets(names=("hue",), mean=(0.0,), std=(1.0,))),
        },
    )
    rng = torch.Generator().manual_seed(0)
    outputs, labels = torch.randn(60, 3, generator=rng), torch.randint(2, (60,), generator=rng)
    numbers = outputs[:, 2:] + torch.randn(60, 1, generator=rng)
    labels[::5] = -1
    batch = {"image": outputs, "label_size": labels, "target": numbers}
    found = figures(config.build(classes=0), Fixed({"size": slice(0, 2), "hue": slice(2, 3)}), batch)
    true, predicted = labels[labels >= 0].numpy(), outputs[:, :2].argmax(1)[labels >= 0].numpy()
    assert found["f1_size"] == pytest.approx(f1_score(true, predicted), rel=1e-9)
    assert found["matthews_size"] == pytest.approx(matthews_corrcoef(true, predicted), rel=1e-9)
    first, second = outputs[:, 2].numpy(), numbers[:, 0].numpy()
    assert found["spearman_hue"] == pytest.approx(spearmanr(first, second).statistic, rel=1e-9)
    assert found["pearson_hue"] == pytest.approx(pearsonr(first, second).statistic, rel=1e-5)
