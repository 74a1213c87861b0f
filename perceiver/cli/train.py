"""`perceiver train`: a training run."""

import shlex

import click

from perceiver.cli._types import RunName
from perceiver.tracking.printable import say_json


@click.command(
    epilog="""\b
Examples:
  perceiver train recipes/train/quickstart.yaml
  perceiver train recipes/train/quickstart.yaml optim.lr=2e-3 train.epochs=3
  perceiver train recipes/train/quickstart.yaml --resume"""
)
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Continue the recipe's newest run (or --run) from its last checkpoint.")
@click.option("--run", type=RunName(), metavar="NAME", help="Name of the run's folder; default: NAME-001, ...")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON line at the end.")
def command(recipe: str, overrides: tuple[str, ...], resume: bool, run: str | None, as_json: bool) -> int:
    """Train the model of a recipe.

    The run also evaluates the model and writes checkpoints, an MLflow run and a report. KEY=VALUE overrides a key of
    RECIPE in dotted form. On Ctrl-C the run saves a checkpoint and stops.
    """
    from cluster.recipe.config import load_recipe
    from cluster.runtime.local import set_quiet_environment

    set_quiet_environment()
    wanted = load_recipe(recipe, overrides)
    from cluster.run.launch import launch_training

    typed = shlex.join(["perceiver", "train", recipe, *overrides])
    end = launch_training(wanted, command=typed, resume=resume, run=run)
    if as_json:
        say_json({"status": end.status, "run": end.folder.url, **end.facts})
    return end.code
