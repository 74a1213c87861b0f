"""Texts of a model's answers: the targets of bytes or words, and what was decoded."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver.config import UserError
from perceiver.tasks._base import Batch
from perceiver.text_ids import SEP


@dataclass(frozen=True)
class Answers:
    """Texts as ids (B, T): bytes + 6 and SEP at the end, or a model's words.

    Attributes:
        ids: the ids, 0 after the end.
        mask: (B, T) bool, True up to the end.
    """

    ids: Tensor
    mask: Tensor

    @property
    def ended(self) -> Tensor:
        """Which texts have an end (B,), of texts in bytes."""
        return (self.ids == SEP).any(1)

    def equal(self, others: Tensor) -> Tensor:
        """Return to which of other byte ids (B, R, U) each text is the same (B, R), its end included."""
        width = max(self.ids.shape[1], others.shape[2])
        a, b = (F.pad(ids, (0, width - ids.shape[-1])) for ids in (self.ids[:, None], others))
        return (a == b).all(2) & self.ended[:, None]

    def beside(self, others: Tensor) -> Tensor:
        """Return the ids (B, 2 + T + R * U) with other ids (B, R, U) after them, and first of all T and U."""
        sizes = self.ids.new_tensor([self.ids.shape[1], others.shape[2]]).expand(len(others), -1)
        return torch.cat([sizes, self.ids, others.flatten(1)], dim=1)


def answer_targets(batch: Batch, words: Any = None) -> Answers:
    """Return the ids that a model should decode: bytes, or those of its `words`."""
    ids, mask = batch["answer"], batch["answer_mask"]
    return Answers(ids, mask) if words is None else Answers(*words.encode(ids, mask))


def right_answers(batch: Batch) -> Tensor:
    """Return the byte ids (B, R, T) of each sample's right texts: those of `answers`, or that of `answer`."""
    single, several = batch["answer"][:, None], batch.get("answers")
    if several is None:
        return single
    return several.where(several.flatten(1).any(1)[:, None, None], F.pad(single, (0, 0, 0, several.shape[1] - 1)))


def predicted_answers(logits: Tensor, words: Any = None) -> Answers:
    """Return the most likely text of logits (B, T, tokens), in bytes, up to its end if there is one."""
    ids = logits.argmax(-1)
    if words is not None:
        ids = words.bytes(ids)
    ends = (ids == SEP).int()
    there = ends.cumsum(1) - ends == 0
    return Answers(ids.where(there, torch.zeros_like(ids)), there)


def check_length(ids: Tensor, queries: int) -> None:
    """Refuse answers that are longer than the text queries of the model.

    Raises:
        UserError: naming both keys.
    """
    if ids.shape[1] > queries:
        raise UserError(
            f"data.answer_length = {ids.shape[1]}, but the model has {queries} text queries: set "
            "model.decoder.length to at least that"
        )
