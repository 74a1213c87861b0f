"""Types of options: finite numbers, local files and folders to write, names of runs."""

import math
import re
from pathlib import Path
from typing import Any

import click

from perceiver.config import PLAIN_NAME

LONGEST_NAME = 200


class Number(click.FloatRange):
    """A number in a range; NaN is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; `click.BadParameter` if it is not one of the range."""
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return found


class LocalPath(click.ParamType):
    """The path of a local file or folder that will be written, as a `Path`."""

    name = "path"

    def __init__(self, *, folder: bool = False) -> None:
        self.folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; `click.BadParameter` if it is empty, a URL, or exists and is something else."""
        text = str(value)
        path = Path(text)
        if not text or "\0" in text or "://" in text:
            self.fail(f"{text!r} is not a local path.", param, ctx)
        try:
            exists = path.exists()
        except OSError as error:
            self.fail(f"{text!r} cannot be used: {error.strerror}.", param, ctx)
        if exists and not (path.is_dir() if self.folder else path.is_file()):
            self.fail(f"{text!r} is not a {'folder' if self.folder else 'regular file'}.", param, ctx)
        return path


class RunName(click.ParamType):
    """The name of a run or search, which names a folder."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name; `click.BadParameter` if it is not a plain one."""
        if len(str(value)) > LONGEST_NAME or not re.fullmatch(PLAIN_NAME, str(value)):
            self.fail(f"{value!r} is not a plain name: use letters, digits, dot, dash and underscore.", param, ctx)
        return str(value)


BATCH = click.IntRange(1, 65_536)
"""Samples per forward pass."""

WEIGHTS = click.option(
    "--weights",
    type=click.Choice(["ema", "last"]),
    help="Of a run or checkpoint with train.ema: the moving average, or the last weights. Default: the average.",
)
"""The option of the commands that read a run's weights."""
