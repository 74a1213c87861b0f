"""The `perceiver` command: one module per subcommand, imported only when it is called."""

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from perceiver.config import UserError, expand_home


class Verbs(click.Group):
    """Subcommands: `perceiver NAME` is the function `command` of `perceiver/cli/NAME.py`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; `~` is the home folder also in `output=~/x`, which shells leave as it is."""
        return super().parse_args(ctx, [_expand(argument) for argument in args])

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands, which are the modules of this package."""
        return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand; None if it does not exist."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return importlib.import_module(f"perceiver.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand, suggest the nearest name if it does not exist, and refuse unsupported libraries."""
        import difflib

        near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1) if args else []
        if args and near and near[0] != args[0] and not args[0].startswith("-"):
            raise UserError(f"no command {args[0]!r}; did you mean {near[0]}?")
        # `doctor` lists the versions in its table.
        if args and args[0] != "doctor" and not {"-h", "--help"}.intersection(args):
            from perceiver.environment import check_names, check_versions

            check_versions()
            if note := check_names():
                click.echo(note, err=True)
        return super().resolve_command(ctx, args)


def _expand(argument: str) -> str:
    """Return an argument, or the value after its first equals sign, with a leading `~` expanded."""
    key, equals, value = argument.partition("=")
    return f"{key}={expand_home(value)}" if equals and not key.startswith("~") else expand_home(argument)


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: perceiver train recipes/train/quickstart.yaml optim.lr=2e-3",
)
@click.version_option(package_name="perceiver-train")
def cli() -> None:
    """Train Perceiver and Perceiver IO models on Ray.

    Exit codes: 0 success, 1 failure at run time, 2 invalid input, 130 stopped by Ctrl-C.
    """


def leave(code: int) -> NoReturn:
    """Exit without waiting for threads: Ray may still be starting in one, and its processes exit with this one."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full device, a closed pipe
            stream.flush()
    os._exit(code)
