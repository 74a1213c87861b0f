"""How a worker computes with numbers that are nearly zero."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cluster.run import worker


def test_numbers_below_the_normal_range_are_zero_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run that has nothing left to learn becomes ten times slower, as the soak showed."""
    found: list[float] = []

    def look(runs: int) -> None:
        found.append(float(torch.full((8,), 1e-37).mul(1e-3).sum()))
        raise InterruptedError

    monkeypatch.setattr(worker, "find_rank", look)
    with ThreadPoolExecutor(1) as pool, pytest.raises(InterruptedError):  # a thread of its own, as under Ray Train
        pool.submit(worker.train_worker, {"runs": 1}).result()
    assert found == [0.0]
    assert float(torch.full((8,), 1e-37).mul(1e-3).sum()) > 0
