"""Texts as ids: bytes between CLS and SEP, pairs with SEP between them, the longest cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perceiver.text_ids import CLS, PAD, SEP, SPECIALS, byte_ids, byte_text, joined
from pipelines.features.text import byte_tokens


def ids_of(*texts: str) -> list[int]:
    found = [CLS]
    for text in texts:
        found += [*(byte + SPECIALS for byte in text.encode()), SEP]
    return found


def test_a_pair_has_sep_after_each_text() -> None:
    assert byte_ids(joined("Is it?", "Yes, é."), 40) == ids_of("Is it?", "Yes, é.")
    assert byte_text(byte_ids(joined("Is it?", "Yes"), 40)) == "Is it?"


@pytest.mark.parametrize(
    ("texts", "length", "kept"),
    [
        (("abcdefgh",), 6, ("abcd",)),
        (("abcdefgh", "xy"), 10, ("abcde", "xy")),
        (("abcdefgh", "uvwxyz"), 10, ("abcd", "uvw")),
        (("abcdefgh", "uvwxyz"), 9, ("abc", "uvw")),
        (("xy", "abcdefgh", "klm"), 12, ("xy", "abc", "klm")),
        (("ab", "cd"), 3, ("", "")),
    ],
)
def test_the_longest_texts_are_cut(texts: tuple[str, ...], length: int, kept: tuple[str, ...]) -> None:
    assert byte_ids(joined(*texts), length) == ids_of(*kept)


def test_the_separator_in_a_text_does_not_divide_it() -> None:
    assert byte_ids(joined("a\x1fb", "c"), 20) == ids_of("a b", "c")


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6), st.integers(2, 40))
def test_data_tasks_and_models_give_the_same_ids(texts: list[str], length: int) -> None:
    text = joined(*texts)
    ids, count = byte_tokens(text, length)
    assert byte_ids(text, length) == ids[:count].tolist() and count <= length
    assert (ids[count:] == PAD).all() and ids.shape == (length,) and ids.dtype == np.int64
    assert ids[0] == CLS and ids[count - 1] == SEP


def test_many_separators_fit_into_any_length() -> None:
    assert byte_ids("\x1f" * 100, 6) == [CLS, SEP, SEP, SEP, SEP, SEP]
