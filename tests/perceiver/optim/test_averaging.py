"""The decay of the moving average of the weights; the engines' tests average."""

import pytest

from perceiver.optim.averaging import EmaConfig


@pytest.mark.parametrize(("update", "decay"), [(1, 2 / 11), (89, 90 / 99), (100_000, 0.999)])
def test_the_decay_begins_low_unless_warmup_is_off(update: int, decay: float) -> None:
    assert EmaConfig(decay=0.999).decay_of(update) == pytest.approx(decay)
    assert EmaConfig(decay=0.999, warmup=False).decay_of(update) == 0.999
