"""MixUp and CutMix on the device.

Source: Perceiver IO App. A.1 and the released dataset code: Beta(0.2, 0.2) MixUp on the first half of a batch and
CutMix with a uniform area on the second.
"""

import torch
from torch import Tensor


def mix_images(
    images: Tensor, valid: Tensor, mixup_alpha: float, cutmix: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each image with a partner of its batch.

    Args:
        images: (B, C, H, W) uint8 or float.
        valid: (B,) bool; padding rows are neither mixed nor partners.
        mixup_alpha: parameter of the Beta distribution; 0 leaves MixUp out.
        cutmix: whether to CutMix; with MixUp, the batch's first half is mixed up and the second cut.
        generator: CPU generator.

    Returns:
        The mixed images (same type), each one's partner (B,), and the share of its own label (B,) float32.
    """
    batch, device = len(images), images.device
    partner = torch.arange(batch)
    rows = valid.cpu().nonzero()[:, 0]
    partner[rows] = rows.roll(1)
    use_mixup = (torch.arange(batch) < batch // 2) if cutmix else torch.ones(batch, dtype=torch.bool)
    if mixup_alpha <= 0:
        use_mixup = torch.zeros(batch, dtype=torch.bool)
    share = torch.ones(batch)
    if mixup_alpha > 0:
        share = torch.where(use_mixup, _beta(mixup_alpha, batch, generator), share)
    other = images[partner.to(device)]
    weight = share.to(device)[:, None, None, None]
    mixed = images * weight + other * (1 - weight)
    if not images.is_floating_point():
        mixed = mixed.round()
    mixed = mixed.to(images.dtype)
    if cutmix:
        boxes, kept = _boxes(batch, images.shape[-2], images.shape[-1], generator)
        boxes &= ~use_mixup[:, None, None]
        share = torch.where(use_mixup, share, kept)
        mixed = torch.where(boxes.to(device)[:, None], other, mixed)
    return mixed, partner.to(device), share.to(device)


def _beta(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """Draw Beta(alpha, alpha) by Johnk's method, which needs uniform numbers only."""
    result, todo = torch.zeros(count), torch.arange(count)
    while len(todo):
        x, y = torch.rand(2, len(todo), dtype=torch.float64, generator=generator).pow(1 / alpha)
        accepted = (x + y <= 1) & (x + y > 0)
        result[todo[accepted]] = (x / (x + y))[accepted].float()
        todo = todo[~accepted]
    return result


def _boxes(batch: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one box per image whose area is uniform: masks (B, H, W) and the share of the image left outside (B,)."""
    area, y, x = torch.rand(3, batch, generator=generator)
    side = (1 - area).sqrt()
    tall, wide = (side * height).int(), (side * width).int()
    top, left = (y * height).int() - tall // 2, (x * width).int() - wide // 2
    bottom, right = (top + tall).clamp(max=height), (left + wide).clamp(max=width)
    top, left = top.clamp(min=0), left.clamp(min=0)
    rows, columns = torch.arange(height), torch.arange(width)
    inside = (rows >= top[:, None]) & (rows < bottom[:, None])
    across = (columns >= left[:, None]) & (columns < right[:, None])
    boxes = inside[:, :, None] & across[:, None, :]
    return boxes, 1 - boxes.float().mean((1, 2))
