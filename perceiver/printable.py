"""Text from outside in a form that a terminal, a log or a page shows as it is: names, keys, reasons, lines of a job."""

import re

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Control characters (escape sequences, line ends), marks that reorder or hide text, and halves of surrogate pairs."""


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return a text in which characters that control a terminal or hide text are escapes such as `\x1b`.

    Args:
        text: from outside.
        lines: keep line ends and tabs, for texts of several lines; otherwise the result is one line.
    """
    if lines:
        return "\n".join(
            "\t".join(map(printable, line.split("\t"))) for line in re.sub(r"\r\n?", "\n", text).split("\n")
        )
    return _UNPRINTABLE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
