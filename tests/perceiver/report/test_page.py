"""What all pages have in common, and how they format values."""

import math
from pathlib import Path

import pytest

from perceiver import report
from perceiver.report.page import render, size, text
from tests.perceiver.report.pages import Page

TEMPLATES = sorted(path.name for path in Path(report.__file__).parent.glob("*.html"))
EVIL = "<script>alert('x')</script>"


def test_there_is_one_base_template() -> None:
    """Only the base has a head and a style; the others fill it in."""
    folder = Path(report.__file__).parent
    whole = [name for name in TEMPLATES if "<style" in (text := (folder / name).read_text()) or "<html" in text]
    extending = [name for name in TEMPLATES if '{% extends "base.html" %}' in (folder / name).read_text()]
    assert whole == ["base.html"]
    assert extending == ["inspection.html", "run.html", "search.html", "table.html"]


def test_the_base_escapes_and_masks_what_it_is_given() -> None:
    commands = {EVIL: "mlflow ui --backend-store-uri postgresql://me:hunter2@db/x"}
    html = render("base.html", kind=EVIL, name=EVIL, headline=(EVIL, EVIL), facts={EVIL: EVIL}, commands=commands)
    page = Page(html)
    assert page.count("script") == 0 and page.words.count(EVIL) >= 6
    assert "hunter2" not in html and page.fetched() == []
    assert "prefers-color-scheme: dark" in html and {"name": "color-scheme", "content": "light dark"} in page.all(
        "meta"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (None, "–"),
        (True, "yes"),
        ("s", "s"),
    ],
)
def test_values_are_shown_as_a_reader_wants_them(value: object, shown: str) -> None:
    assert text(value) == shown


@pytest.mark.parametrize(("count", "shown"), [(999, "999 B"), (1_440_000, "1.44 MB"), (2.5e12, "2.5 TB")])
def test_sizes_have_units(count: float, shown: str) -> None:
    assert size(count) == shown
