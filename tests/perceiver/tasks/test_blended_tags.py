"""Weighted losses of several classifiers (G-blend): the loss, its figures, and what predicts."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from perceiver.tasks import build_task
from perceiver.tasks.tagging import TaggingConfig

LABEL = torch.tensor([[1.0, 0], [0, 1], [1, 1]])


class Heads(nn.Module):
    """Three classifiers whose logits are parameters."""

    input_keys, head_names = ("audio",), ("audio", "video", "joint")

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, raw):
        return self.logits


def test_the_loss_is_the_weighted_sum_and_the_joint_classifier_predicts() -> None:
    model = Heads().train()
    task = build_task(TaggingConfig(blend={"audio": 0.5, "joint": 2.0}), classes=2)
    batch = {"audio": torch.zeros(3, 4), "label": LABEL}
    out = task.loss(model, batch)
    bce = nn.functional.binary_cross_entropy_with_logits
    each = [bce(one, LABEL) * 3 for one in model.logits.detach().unbind(1)]
    assert float(out.loss_sum.detach()) == pytest.approx(0.5 * float(each[0]) + 2 * float(each[2]), rel=1e-6)
    out.loss_sum.backward()
    assert model.logits.grad is not None and not model.logits.grad[:, 1].any(), "a classifier without a weight"
    figures = task.summarise({name: float(value) for name, value in out.sums.items()}, 3)
    assert [figures[f"loss_{name}"] for name in model.head_names] == pytest.approx([float(one) / 3 for one in each])
    joint = model.logits[:, -1]
    evaluated = task.loss(model.eval(), batch)
    plain = build_task(TaggingConfig(), classes=2).loss(Only(joint.detach()).eval(), batch)
    assert torch.equal(evaluated.sums["positive"], plain.sums["positive"]) and "loss_video" in evaluated.sums
    torch.testing.assert_close(task.predict(model, batch)["probability"], joint.detach().sigmoid())


class Only(nn.Module):
    """A classifier that gives the same logits for any input."""

    input_keys = ("audio",)

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, raw):
        return self.logits


@pytest.mark.parametrize(
    ("values", "message"),
    [({"blend": {"joint": 0}}, "no weight above 0"), ({"blend_every": 2}, "needs blend"), ({"blend": {"a": -1}}, "a")],
)
def test_wrong_weights_are_refused(values, message) -> None:
    with pytest.raises(ValidationError, match=message):
        TaggingConfig.model_validate(values)
