"""Masked language modelling with word masking.

Source: Perceiver IO §4.1 and App. F: each whitespace-separated word is masked with probability 0.15, all its bytes
together; the loss is over masked positions only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.config import Config, Real, Seed
from perceiver.tasks._base import Batch, LossOutput, RandomTask, Task, model_inputs, valid_rows
from perceiver.tasks._filling import Filled, fill

BYTE_SPACES = tuple(byte + 6 for byte in b" \t\n\r\x0b\x0c")


TokenId = Annotated[int, Field(ge=0, le=1 << 24)]
"""A token of the vocabulary."""


class MaskedLanguageConfig(Config):
    """Ids under the batch key `text` (B, M) with `text_mask`; the ids of `spaces` separate words."""

    kind: Literal["masked_language"] = "masked_language"
    probability: Real = Field(default=0.15, gt=0, lt=1, description="Chance that a word is masked.")
    mask_id: TokenId = Field(default=3, description="Id that stands for a masked token.")
    specials: TokenId = Field(default=6, description="Ids below this are special and never masked.")
    spaces: tuple[TokenId, ...] = Field(default=BYTE_SPACES, description="Ids between words (bytes + 6 by default).")
    word_start: tuple[TokenId, ...] = Field(
        default=(), description="Ids that begin a word (SentencePiece); used in place of `spaces` if any are given."
    )
    seed: Seed = Field(default=0, description="Seed of the masks.")

    def build(self, *, classes: int) -> Task:
        """Build the task."""
        return MaskedLanguage(self)


def word_numbers(ids: Tensor, spaces: Tensor, starts: Tensor, specials: int) -> Tensor:
    """Number the words of each text: (B, M), 0 for what belongs to none (spaces, special ids)."""
    if len(starts):
        begins = torch.isin(ids, starts)
        outside = ids < specials
    else:
        outside = torch.isin(ids, spaces) | (ids < specials)
        begins = ~outside & nn.functional.pad(outside[:, :-1], (1, 0), value=True)
    first = nn.functional.pad(outside[:, :-1], (1, 0), value=True) & ~outside
    return (begins | first).cumsum(1) * ~outside


class MaskedLanguage(RandomTask):
    """See `MaskedLanguageConfig`. The masks depend on seed, step and sample ids alone."""

    def __init__(self, config: MaskedLanguageConfig) -> None:
        super().__init__(config.seed)
        self.config = config

    def masked(self, batch: Batch) -> Tensor:
        """Return which positions are masked, (B, M) bool: whole words of valid rows."""
        ids = batch["text"]
        valid = valid_rows(batch, len(ids), ids.device)
        spaces = torch.tensor(self.config.spaces, device=ids.device, dtype=ids.dtype)
        starts = torch.tensor(self.config.word_start, device=ids.device, dtype=ids.dtype)
        words = word_numbers(ids, spaces, starts, self.config.specials)
        draws = torch.rand(len(ids), ids.shape[1] + 1, generator=self.generator(batch)).to(ids.device)
        chosen = draws.gather(1, words) < self.config.probability
        exists = batch.get("text_mask")
        chosen &= (words > 0) & valid[:, None]
        return chosen if exists is None else chosen & exists

    def count(self, batch: Batch) -> Tensor:
        """Return the number of masked positions."""
        return self.masked(batch).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum cross-entropy and right tokens over the masked positions."""
        ids = batch["text"]
        masked = self.masked(batch)
        hidden = ids.masked_fill(masked, self.config.mask_id)
        logits = model(model_inputs(model, {**batch, "text": hidden}))[masked].float()
        target = ids[masked]
        loss_sum = nn.functional.cross_entropy(logits, target, reduction="sum")
        right = (logits.argmax(-1) == target).sum().float()
        return LossOutput(loss_sum, {"loss": loss_sum.detach(), "correct": right})

    def summarise(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """Return loss (nats per masked token), its perplexity, and accuracy."""
        count = max(count, 1.0)
        loss = sums["loss"] / count
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0)), "accuracy": sums["correct"] / count}

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the most likely ids (B, M) as `prediction` and their `probability` (B, M), without further masking."""
        top = model(model_inputs(model, batch)).float().softmax(-1).max(-1)
        return {"prediction": top.indices, "probability": top.values}

    def fill(self, model: nn.Module, texts: Sequence[str]) -> list[Filled]:
        """Fill `[MASK]` in texts, see `perceiver.tasks._filling.fill`; for models of bytes."""
        return fill(model, texts, self.config.mask_id)
