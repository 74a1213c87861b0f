"""Text from outside in a form that a terminal, a log or a page shows as it is: names, keys, reasons, lines of a job."""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import click

from perceiver.tracking.redaction import redact_text

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Control characters (escape sequences, line ends), marks that reorder or hide text, and halves of surrogate pairs."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return a text in which characters that control a terminal or hide text are escapes such as `\x1b`.

    Args:
        text: from outside.
        lines: keep line ends and tabs, for texts of several lines; otherwise the result is one line.
    """
    kept = "\n\t" if lines else ""
    text = re.sub(r"\r\n?", "\n", text) if lines else text
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in kept else _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def safe_line(text: str) -> str:
    """Return a text as one printable line without secrets."""
    return printable(redact_text(text))


def markdown_text(text: str) -> str:
    """Return a text as one line of Markdown that has no markup, links or HTML, also in a cell of a table."""
    return re.sub(r"([\\`|\[\]<>*])", r"\\\1", safe_line(text))


def markdown_code(text: str) -> str:
    """Return a text as a code span of Markdown, also in a cell of a table."""
    return "`" + safe_line(text).replace("`", "'").replace("|", "\\|") + "`"


def csv_cell(value: Any) -> Any:
    """Return a value for a CSV file; a text that a spreadsheet would run as a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    text = safe_line(value)
    formula = value.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n")) and not _NUMBER.fullmatch(text)
    return f"'{text}" if formula else text


class SafeFormatter(logging.Formatter):
    """Formats records of a log with printable texts and without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record, its traceback included."""
        return printable(redact_text(super().format(record)), lines=True)


def say(line: str = "", *, err: bool = False) -> None:
    """Print one line to stdout or stderr, see `safe_line`."""
    click.echo(safe_line(line), err=err)


def say_all(lines: Iterable[str]) -> None:
    """Print lines to stdout, see `safe_line`."""
    for line in lines:
        say(line)


def say_json(tree: Any) -> None:
    """Print a tree as one line of JSON in ASCII; the texts in it are without secrets."""
    click.echo(json.dumps(_redacted(tree)))


def _redacted(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _redacted(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_redacted(value) for value in tree]
    return redact_text(tree) if isinstance(tree, str) else tree


def say_log(text: str) -> None:
    """Print part of a log: its line ends stay, and no other line end is added."""
    click.echo(printable(redact_text(text), lines=True), nl=False)
