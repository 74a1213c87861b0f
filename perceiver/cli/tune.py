"""`perceiver tune`: a search over the keys of a recipe."""

import click

from perceiver.cli import leave
from perceiver.cli._types import RunName


@click.command(
    epilog="""\b
Examples:
  perceiver tune recipes/tune/quickstart.yaml
  perceiver tune recipes/tune/quickstart.yaml trials=4 train.epochs=6
  perceiver tune recipes/tune/quickstart.yaml --dry-run
  perceiver tune recipes/tune/quickstart.yaml --resume"""
)
@click.argument("search", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Continue the newest search of this name (or --run).")
@click.option("--run", type=RunName(), metavar="NAME", help="Name of the search's folder; default: NAME-001, ...")
@click.option("--dry-run", is_flag=True, help="Print trials, resources and expected time; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON line at the end.")
def command(
    search: str, overrides: tuple[str, ...], resume: bool, run: str | None, dry_run: bool, as_json: bool
) -> None:
    """Search over the keys of a recipe.

    SEARCH is a file with the base recipe and the search space. The search writes its trials, a report and the best
    recipe. KEY=VALUE overrides a key of the search file, or of its base recipe (train.epochs=3), in dotted form. On
    Ctrl-C the running trials save a checkpoint first.
    """
    from cluster.runtime.local import set_quiet_environment

    set_quiet_environment()
    from tune.search.launch import launch_search

    leave(launch_search(search, overrides, resume=resume, run=run, as_json=as_json, dry_run=dry_run))
