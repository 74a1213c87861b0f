"""Weights of classes, against scikit-learn's and torch's."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from perceiver.config import UserError
from perceiver.tasks import balanced, balanced_positives
from perceiver.tasks.classification import ClassificationConfig
from perceiver.tasks.tagging import TaggingConfig
from tests.perceiver.tasks.test_regression import Fixed

LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def test_balanced_weights_are_scikit_learns() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    assert balanced([3, 1, 2]) == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels))
    assert balanced([3, 0, 3]) == (1.0, 1.0, 1.0)
    assert balanced_positives([2, 0, 8], 8) == (3.0, 1.0, 1.0)
    assert balanced([1, 10**8])[0] == balanced_positives([1], 10**8)[0] == 1e6


def test_a_weighted_classification_is_torchs() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    task = ClassificationConfig(class_weights=(0.5, 3.0, 1.0), label_smoothing=0.1).build(classes=3)
    loss = task.loss(Fixed(), {"image": LOGITS, "label": labels}).loss_sum
    wanted = nn.CrossEntropyLoss(torch.tensor([0.5, 3.0, 1.0]), reduction="sum", label_smoothing=0.1)(LOGITS, labels)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)


def test_a_weighted_tagging_is_torchs() -> None:
    labels = (LOGITS.roll(1, 0) > 0).float()
    loss = (
        TaggingConfig(class_weights=(2.0, 1.0, 5.0)).build(classes=3).loss(Fixed(), {"image": LOGITS, "label": labels})
    )
    wanted = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1.0, 5.0]), reduction="none")(LOGITS, labels)
    assert float(loss.loss_sum) == pytest.approx(float(wanted.mean(1).sum()), rel=1e-6)


@pytest.mark.parametrize("weights", ["balanced", (1.0, 2.0)])
def test_weights_must_be_as_many_numbers_as_classes(weights: object) -> None:
    with pytest.raises(UserError, match="class_weights"):
        ClassificationConfig.model_validate({"class_weights": weights}).build(classes=3)
