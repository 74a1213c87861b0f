"""Segmentation against figures by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from perceiver.tasks.segmentation import SegmentationConfig, class_iou


class Fixed(nn.Module):
    """A model that returns its input, of some pixels if asked."""

    input_keys = ("logits",)

    def forward(self, x: Tensor, asked: dict[str, Tensor] | None = None) -> Tensor:
        if not asked:
            return x
        return x.flatten(2).gather(2, asked["pixels"][:, None].expand(-1, x.shape[1], -1))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 3, (2, 6, 5), generator=generator, dtype=torch.uint8)
    mask[0, :2] = 255
    return {
        "logits": torch.randn(2, 3, 6, 5, generator=generator),
        "mask": mask,
        "sample_id": torch.arange(2),
        "image": torch.zeros(2, 1, 6, 5, dtype=torch.uint8),
    }


def test_figures_by_hand() -> None:
    task, data, model = SegmentationConfig().build(classes=3), batch(), Fixed().eval()
    output = task.loss(model, data)
    keep = (data["mask"] != 255).numpy()
    true, guess = data["mask"].numpy()[keep], data["logits"].argmax(1).numpy()[keep]
    sums = {name: value if value.dim() else float(value) for name, value in output.sums.items()}
    found = task.summarise(sums, float(task.count(data)))
    assert found["pixel_accuracy"] == pytest.approx((true == guess).mean())
    assert found["mean_iou"] == pytest.approx(jaccard_score(true, guess, average="macro"))
    assert task.predict(model, data)["prediction"].dtype == torch.uint8


def test_a_class_without_a_pixel_does_not_count() -> None:
    iou = class_iou(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert iou[:2].tolist() == pytest.approx([3 / 4, 4 / 5]) and iou[2].isnan()


def test_some_pixels_estimate_the_whole_loss() -> None:
    data, model = batch(), Fixed().train()
    whole = float(SegmentationConfig().build(classes=3).loss(model, data).loss_sum)
    every = SegmentationConfig(queries=30).build(classes=3)
    assert float(every.loss(model, data).loss_sum) == pytest.approx(whole, rel=1e-5)
    some, losses = SegmentationConfig(queries=10).build(classes=3), []
    for some.step in range(300):
        losses.append(float(some.loss(model, data).loss_sum))
    assert np.mean(losses) == pytest.approx(whole, abs=4 * np.std(losses) / 300**0.5)


def test_coarse_logits_are_enlarged() -> None:
    data = batch()
    data["logits"] = data["logits"][:, :, :3, :2]
    found = SegmentationConfig().build(classes=3).predict(Fixed().eval(), data)["prediction"]
    assert found.shape == (2, 6, 5)
