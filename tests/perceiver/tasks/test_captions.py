"""Metrics of texts against values computed by hand."""

import math

import pytest

from perceiver.tasks._captions import cider_d, document_frequencies, exact_match, words

REFERENCES = [["a red seven"], ["a blue three"]]


@pytest.mark.parametrize(
    ("candidate", "score"),
    [
        # n = 1, 2 and 3 match; n-grams of four words do not exist. "a" is in both samples and weighs nothing.
        ("a red seven", 10 * 3 / 4),
        ("A red seven.", 10 * 3 / 4),
        # n = 1: one of two weighted words; n = 2: one of two pairs; n = 3: nothing.
        ("a red three", 10 * (1 / 2 + 1 / 2) / 4),
        # n = 1: the same weighted words; n = 2: one pair against two; one word too few.
        ("red seven", 10 * (1 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)),
        # The second "red" is clipped: L * L / (2 L * sqrt(2) L); one word too few.
        ("red red", 10 * (1 / (2 * math.sqrt(2))) / 4 * math.exp(-1 / 72)),
        ("a blue three", 0),
        ("", 0),
    ],
)
def test_cider_d_of_one_reference(candidate: str, score: float) -> None:
    found = cider_d([candidate, "a blue three"], REFERENCES)
    assert found[0] == pytest.approx(score) and found[1] == pytest.approx(7.5)


def test_several_references_have_their_mean() -> None:
    references = [["a red seven", "one seven"], ["a blue three"]]
    # Against "one seven": n = 1: "seven" of two weighted words each; one word too many.
    wanted = (10 * 3 / 4 + 10 * (1 / 2) / 4 * math.exp(-1 / 72)) / 2
    assert cider_d(["a red seven", ""], references).tolist() == pytest.approx([wanted, 0])


def test_the_weights_of_a_corpus_serve_a_part_of_it() -> None:
    whole = cider_d(["red seven", "a blue two"], REFERENCES)
    known = document_frequencies(REFERENCES)
    assert known[("a",)] == 2 and known[("red", "seven")] == 1
    parts = [
        cider_d([text], [wanted], frequencies=known, samples=2)[0]
        for text, wanted in zip(["red seven", "a blue two"], REFERENCES)
    ]
    assert parts == pytest.approx(whole.tolist())
    assert cider_d(["a red seven"], [["a red seven"]]).tolist() == [0]


def test_exact_match_ignores_case_punctuation_and_spaces() -> None:
    assert words("A red seven,  a blue one's!") == ["a", "red", "seven", "a", "blue", "one's"]
    found = exact_match(["Two.", "two red", "", "grün"], [["2", "two"], ["red two"], [""], ["grün"]])
    assert found.tolist() == [True, False, True, True]
