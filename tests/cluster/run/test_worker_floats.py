"""Denormal numbers in a worker."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cluster.run import worker


def test_denormal_numbers_are_zero_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a converged run becomes ten times slower, as the soak test showed."""
    found: list[float] = []

    def look(runs: int, threads: int | None) -> None:
        found.append(float(torch.full((8,), 1e-37).mul(1e-3).sum()))
        raise InterruptedError

    monkeypatch.setattr(worker, "find_rank", look)
    with ThreadPoolExecutor(1) as pool, pytest.raises(InterruptedError):  # in a thread, as in Ray Train
        pool.submit(worker.train_worker, {"runs": 1, "threads": None}).result()
    assert found == [0.0]
    assert float(torch.full((8,), 1e-37).mul(1e-3).sum()) > 0
