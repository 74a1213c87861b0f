"""The jinja2 environment of all pages, and the formatting of values."""

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from perceiver.tracking.printable import printable
from perceiver.tracking.redaction import redact, redact_text

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class CardPart:
    """A picture, strip, audio, video, points or text on the page.

    Attributes:
        kind: one of these words.
        content: a data URI; a text itself; for points base64 of int8 x, y, z.
        note: text below it.
    """

    kind: str
    content: str
    note: str = ""


@dataclass(frozen=True)
class Words:
    """A part of a text on the page.

    Attributes:
        words: the part.
        state: "given", or "right" or "wrong" of what a model filled in.
        truth: what stood there, of a part that was filled in.
    """

    words: str
    state: str = "given"
    truth: str = ""


@dataclass(frozen=True)
class Card:
    """A sample with what a model answers.

    Attributes:
        key: where the sample came from; empty: not shown.
        parts: pictures and sound.
        text: a text with what was filled in.
        note: figures of the sample.
    """

    key: str = ""
    parts: Sequence[CardPart] = ()
    text: Sequence[Words] = ()
    note: str = ""


def render(template: str, **values: Any) -> str:
    """Return a page as HTML: one file without external resources, all text escaped.

    Args:
        template: file name in this folder.
        values: variables of the template. All pages take `kind` (of the page), `name`, and optionally `headline` (a
            figure and what it is), `facts` (caption -> value) and `commands` (caption -> command line); secrets in
            facts and commands are masked.
    """
    page = {"headline": None, "facts": {}, "commands": {}, **values}
    for key in ("facts", "commands"):
        page[key] = {caption: text(value) for caption, value in page[key].items()}
    return _environment().get_template(template).render(page)


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_safe,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(text=text, percent=percent, size=size)
    return environment


def _safe(value: Any) -> Any:
    """Return what an expression of a template shows: texts are printable and without secrets; markup stays."""
    if not isinstance(value, str) or hasattr(value, "__html__") or value.startswith("data:"):
        return value
    return printable(redact_text(value), lines=True)


def text(value: Any) -> str:
    """Return a value as text: thousands separators, four significant digits, secrets masked."""
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | float | np.number):
        return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"
    return redact_text(str(value))


def percent(share: float | None) -> str:
    """Return a share in per cent with one decimal."""
    return "–" if share is None else f"{100 * share:.1f} %"


def is_share(metric: str) -> bool:
    """Return whether a metric is a share between 0 and 1, shown in per cent."""
    return metric.startswith("accuracy")


def size(count: float) -> str:
    """Return a number of bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def yaml_text(tree: Mapping[str, Any]) -> str:
    """Return settings as YAML, secrets masked; an empty text for none."""
    return yaml.safe_dump(redact(dict(tree)), sort_keys=False, allow_unicode=True) if tree else ""


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Return bytes of a media type as a `data:` URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
