"""Classification: sums are additive, padding rows do not count, mixed images and labels correspond."""

import pytest
import torch
from torch import nn

from perceiver.tasks import build_task
from perceiver.tasks.classification import ClassificationConfig, mix_images


class Linear(nn.Module):
    input_keys = ("image",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 7)

    def forward(self, x):
        return self.layer(x.float().flatten(1) / 255)


def batch_of(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (n, 3, 2, 2), generator=g, dtype=torch.uint8),
        "label": torch.randint(0, 7, (n,), generator=g),
        "sample_id": torch.arange(n),
        "valid": torch.ones(n, dtype=torch.bool),
    }


def test_loss_against_the_definition_and_additivity():
    model, batch = Linear().eval(), batch_of(6)
    task = build_task(ClassificationConfig(label_smoothing=0.1), classes=7)
    out = task.loss(model, batch)
    log = model(batch["image"]).log_softmax(1)
    target = 0.9 * nn.functional.one_hot(batch["label"], 7) + 0.1 / 7
    torch.testing.assert_close(out.loss_sum, -(target * log).sum())
    halves = [task.loss(model, {k: v[s] for k, v in batch.items()}) for s in (slice(0, 2), slice(2, 6))]
    for key, value in out.sums.items():
        torch.testing.assert_close(halves[0].sums[key] + halves[1].sums[key], value)


def test_padding_rows_do_not_count():
    model, batch = Linear().eval(), batch_of(6)
    task = build_task(ClassificationConfig(), classes=7)
    whole = task.loss(model, {k: v[:4] for k, v in batch.items()})
    batch["valid"][4:] = False
    batch["label"][4:] = -1
    padded = task.loss(model, batch)
    assert float(task.count(batch)) == 4
    torch.testing.assert_close(padded.sums, whole.sums)
    metrics = task.summarise({k: v if v.shape else float(v) for k, v in padded.sums.items()}, 4)
    assert set(metrics) == {"loss", "accuracy", "accuracy_top5", "f1", "matthews"}
    predicted = task.predict(model, batch)
    assert predicted["probability"].shape == (6, 7)


def test_mixup_and_cutmix_pixels_follow_their_shares():
    batch = 64
    images = torch.arange(batch, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 16, 16).contiguous()
    valid = torch.ones(batch, dtype=torch.bool)
    valid[-3:] = False
    mixed, partner, share = mix_images(images, valid, 0.2, True, torch.Generator().manual_seed(0))
    expected = share * torch.arange(batch) + (1 - share) * partner
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected, rtol=1e-4, atol=1e-3)
    assert (partner[~valid] == torch.arange(batch)[~valid]).all() and valid[partner[valid]].all()
    torch.testing.assert_close(mixed[~valid], images[~valid])
    assert mixed[32:61].flatten(1).unique(dim=1).shape[1] > 1


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 1.0, 12.0, 1000.0])
def test_mixup_shares_are_beta_distributed(alpha):
    """With alpha 12 the draws of one batch once took more than an hour."""
    images, valid = torch.zeros(20_000, 1, 1, 1), torch.ones(20_000, dtype=torch.bool)
    first, again = (mix_images(images, valid, alpha, False, torch.Generator().manual_seed(0))[2] for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.float32
    assert abs(float(first.mean()) - 0.5) < 0.01
    assert float(first.var()) == pytest.approx(0.25 / (2 * alpha + 1), rel=0.03)


def test_mixed_training_is_reproducible_by_step():
    model, batch = Linear().train(), batch_of(6)
    task = build_task(ClassificationConfig(mixup_alpha=0.2, cutmix=True), classes=7)
    first = task.loss(model, batch).loss_sum
    torch.testing.assert_close(task.loss(model, batch).loss_sum, first)
    task.step = 1  # type: ignore[attr-defined]
    assert not torch.equal(task.loss(model, batch).loss_sum, first)
