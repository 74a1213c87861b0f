"""`perceiver doctor`: checks of everything that a run needs."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from perceiver.cli._access import access_options
from perceiver.tracking.printable import safe_line, say_json

if TYPE_CHECKING:
    from cluster.recipe.config import Recipe


@click.command(
    epilog="""\b
Examples:
  perceiver doctor
  perceiver doctor recipes/train/quickstart.yaml output=s3://bucket/runs
  perceiver doctor --address http://127.0.0.1:8265 --json"""
)
@click.argument("recipe", required=False, type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@access_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per check.")
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    address: str | None,
    headers: str | None,
    verify: str,
    as_json: bool,
) -> int:
    """Check what a run needs on this machine.

    With RECIPE, check also its data, and whether its workers fit on this machine or, with --address, on the cluster.
    Exit code 1 if something would stop the run.
    """
    from rich.console import Console
    from rich.table import Table

    from cluster.doctor.checks import FAIL, examine, setup_of
    from cluster.recipe.config import load_recipe

    loaded = load_recipe(recipe, overrides) if recipe else None
    nodes = (lambda: _nodes(address, headers, verify, loaded)) if address else None
    findings = list(examine(setup_of(loaded, nodes)))
    if as_json:
        for finding in findings:
            say_json(asdict(finding))
    else:
        from rich.text import Text

        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("check", "", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            state = Text(finding.state, colours[finding.state])
            table.add_row(finding.check, state, Text(safe_line(finding.found)), Text(safe_line(finding.fix)))
        Console(highlight=False).print(table)
    return 1 if any(finding.state == FAIL for finding in findings) else 0


def _nodes(address: str | None, headers: str | None, verify: str, recipe: "Recipe | None") -> str:
    """Return one line about the cluster's nodes.

    Raises:
        UserError: the recipe's workers do not fit on them.
    """
    from cluster.jobs.submit import check_places
    from perceiver.cli._access import reach

    server = reach(address, headers, verify)
    nodes = server.nodes()
    if recipe is not None:
        check_places(nodes, recipe)
    cpus, gpus = (sum(node.resources.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    return f"{server.url}: {len(nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"
