"""Blocks of data tasks to batches."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.feed.stream import Tensors, cut


@given(st.integers(1, 7), st.lists(st.integers(1, 20), max_size=6))
def test_blocks_of_any_size_become_batches_of_one_in_order(rows: int, sizes: list[int]) -> None:
    sizes = [*sizes, rows - sum(sizes) % rows]
    total = sum(sizes)
    numbers = torch.arange(total)
    blocks = ({"id": part, "twice": torch.stack([part, part], 1)} for part in numbers.split(sizes))
    batches: list[Tensors] = list(cut(blocks, rows))
    assert [batch["id"].tolist() for batch in batches] == [part.tolist() for part in numbers.split(rows)]
    assert all(torch.equal(batch["twice"][:, 1], batch["id"]) for batch in batches)


def test_whole_batches_of_a_block_are_not_copied() -> None:
    block = {"id": torch.arange(12)}
    (first, second) = cut((part for part in [block]), 6)
    assert first["id"].data_ptr() == block["id"].data_ptr() and second["id"][0] == 6


def test_closing_the_batches_closes_the_blocks() -> None:
    closed = []

    def blocks():
        try:
            while True:
                yield {"id": torch.arange(4)}
        finally:
            closed.append(True)

    batches = cut(blocks(), 2)
    next(batches)
    batches.close()
    assert closed
