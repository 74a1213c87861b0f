"""`perceiver reproduce`: the papers' tables."""

from typing import Any

import click

from perceiver.cli import leave
from perceiver.cli._types import RunName
from perceiver.config import UserError
from perceiver.tracking.printable import say


@click.command(
    epilog="""\b
Examples:
  perceiver reproduce --list
  perceiver reproduce permuted-imagenet --dry-run
  perceiver reproduce permuted-imagenet --seeds 3
  perceiver reproduce imagenet --scale full data.url=s3://bucket/imagenet
  perceiver reproduce modelnet40 train.epochs=2 --resume"""
)
@click.argument("table", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--list", "as_list", is_flag=True, help="List the tables and their sources.")
@click.option(
    "--scale",
    type=click.Choice(["small", "full"]),
    default="small",
    show_default=True,
    help="Small models on data that Python packages contain, or the papers' settings on your copy of their data.",
)
@click.option(
    "--seeds", type=click.IntRange(1, 1000), help="Train each row with seeds 0, 1, ...; default: the table's."
)
@click.option("--resume", is_flag=True, help="Continue the newest run of this table and scale (or --run).")
@click.option("--run", type=RunName(), metavar="NAME", help="Name of the output folder; default: TABLE-SCALE-001, ...")
@click.option("--dry-run", is_flag=True, help="Print rows, resources and expected time; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON line at the end.")
def command(table: str | None, overrides: tuple[str, ...], as_list: bool, scale: str, **options: Any) -> None:
    """Reproduce a table of the papers.

    Trains the rows of TABLE and writes the results next to the paper's as Markdown, HTML and JSON. TABLE is one of
    --list, or a file. Each row and seed is a trial of a search without a scheduler. KEY=VALUE overrides a key of all
    rows' recipes (data.url=...), or concurrency and max_failures. On Ctrl-C the running trials save a checkpoint first.
    """
    if as_list:
        list_tables()
        return
    if table is None:
        raise UserError("no table was given; perceiver reproduce --list names them")
    from cluster.runtime.local import set_quiet_environment

    set_quiet_environment()
    from tune.tables.launch import reproduce

    leave(reproduce(table, overrides, scale="full" if scale == "full" else "small", **options))


def list_tables() -> None:
    """Print name, number of rows, source and title of each table."""
    from tune.tables.config import load_table, tables

    for name in tables():
        table = load_table(name).config
        say(f"{name:<24}{len(table.rows):>3} rows  {table.title} ({table.source})")
