"""Hostile names reach terminals, Markdown, CSV files and logs as harmless text."""

import csv
import io
import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perceiver.tracking.printable import SafeFormatter, csv_cell, markdown_code, markdown_text, printable, safe_line

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "a\nb",
    "a\r\nb",
    "\x9b2J",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "a\u2028b",
    "\x07",
    "\ud800",
]
PLAIN = ["ordinary", "Größe", "日本", "👩‍🔬", "a b", "x/y.jpg", "[red]"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_become_one_printable_line(name: str) -> None:
    shown = printable(name)
    assert len(shown.splitlines()) == 1 and shown != name and "\\" in shown
    assert shown.encode() and "\x1b" not in shown


@pytest.mark.parametrize("name", PLAIN)
def test_ordinary_names_are_unchanged(name: str) -> None:
    assert printable(name) == name == safe_line(name)


@given(st.text())
def test_nothing_printed_controls_a_terminal(text: str) -> None:
    for shown, kept in ((printable(text), ""), (printable(text, lines=True), "\n\t")):
        assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in kept]
        assert not set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200f") & set(shown)
        assert printable(shown, lines=True) == shown


def test_texts_of_several_lines_keep_their_line_ends() -> None:
    assert printable("a\r\n\tb\rc\x1b", lines=True) == "a\n\tb\nc\\x1b"


@pytest.mark.parametrize("cell", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "  =1", "\n=1"])
def test_formulas_are_texts_in_csv(cell: str) -> None:
    sink = io.StringIO()
    csv.writer(sink).writerow([csv_cell(cell)])
    (read,) = next(csv.reader(io.StringIO(sink.getvalue())))
    assert read.startswith("'") and len(read.splitlines()) == 1


@pytest.mark.parametrize("cell", ["-1.5", "+3e-4", "cat", "", 3, -0.5, None, "a=b"])
def test_other_cells_are_unchanged(cell: object) -> None:
    assert csv_cell(cell) == cell


def test_markdown_has_no_markup_of_a_name() -> None:
    shown = markdown_text("<script>a|b</script>\n# [x](javascript:y) `c` ![i](http://u:hunter2@h)")
    assert "\n" not in shown and "hunter2" not in shown
    assert "\\<script\\>" in shown and "\\|" in shown and "\\[x\\](" in shown
    assert markdown_code("a`b|c\nd") == "`a'b\\|c\\nd`"


def test_records_of_a_log_are_printable_and_without_secrets() -> None:
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "at %s\nnext", ("https://u:hunter2@h \x1b[2J",), None)
    assert SafeFormatter("%(message)s").format(record) == "at https://***@h \\x1b[2J\nnext"
