"""Masks in texts are filled with the most probable bytes; the length of a single one is chosen."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver.tasks import build_task
from perceiver.tasks.masked_language import MaskedLanguageConfig

SENTENCES = [b"the cat sat on the mat", b"a dog runs in a big park"]


class Memory(nn.Module):
    """Knows two sentences: gives the bytes of the one that fits, if the length is right, else is not sure."""

    input_keys = ("text",)

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def example(self, batch: int, device: Any) -> dict[str, Tensor]:
        return {"text": torch.zeros(batch, 32, dtype=torch.int64)}

    def forward(self, raw: dict[str, Tensor]) -> Tensor:
        logits = torch.zeros(*raw["text"].shape, 262)
        for row, (ids, there) in enumerate(zip(raw["text"], raw["text_mask"], strict=True)):
            assert ids[0] == 4 and ids[there][-1] == 5 and not ids[~there].any()
            inner = ids[there][1:-1].tolist()
            for sentence in SENTENCES:
                if len(inner) == len(sentence) and all(i in (3, b + 6) for i, b in zip(inner, sentence, strict=True)):
                    for place, byte in enumerate(sentence, 1):
                        logits[row, place, byte + 6] = 8
        return logits


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the [MASK] sat on the mat", ("cat",)),
        ("a dog [MASK] in a big park", ("runs",)),
        ("the c[MASK][MASK] sat on the [MASK][MASK][MASK]", ("at", "mat")),
        ("a dog runs in a big park", ()),
    ],
)
def test_words_that_the_model_knows_are_found(text: str, words: tuple[str, ...]) -> None:
    task: Any = build_task(MaskedLanguageConfig(), classes=0)
    (found,) = task.fill(Memory(), [text])
    assert found.words == words and found.text.encode() in SENTENCES
    assert all(share > 0.9 for share in found.probability)


def test_a_text_that_is_too_long_is_refused() -> None:
    task: Any = build_task(MaskedLanguageConfig(), classes=0)
    with pytest.raises(ValueError, match="43 tokens with its masks, the model has 32"):
        task.fill(Memory(), ["[MASK]" + "x" * 40])
    with pytest.raises(ValueError, match="32"):  # before the first one is filled
        task.fill(Memory(), ["one [MASK]", "[MASK] " * 100_000])


def test_a_text_with_many_masks_is_refused_before_it_is_expanded() -> None:
    task: Any = build_task(MaskedLanguageConfig(), classes=0)
    with pytest.raises(ValueError, match="100,000 masks in a text; wanted at most 32"):
        task.fill(Memory(), ["[MASK] " * 100_000])
