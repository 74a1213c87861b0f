"""``perceiver train``: the main job."""

import click

from perceiver.cli import leave


@click.command(
    epilog="""\b
Examples:
  perceiver train recipes/train/quickstart.yaml
  perceiver train recipes/train/quickstart.yaml optim.lr=2e-3 train.epochs=3
  perceiver train recipes/train/quickstart.yaml --resume"""
)
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on with the recipe's newest run (or --run) from its last checkpoint.")
@click.option("--run", metavar="NAME", help="Name of the run's folder; default: NAME-001, ...")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON line at the end.")
def command(recipe: str, overrides: tuple[str, ...], resume: bool, run: str | None, as_json: bool) -> int:
    """Train the model of RECIPE, evaluate it, and leave behind checkpoint, MLflow run and report.

    KEY=VALUE overrides a key of the recipe, in dotted form. Stop with Ctrl-C: the run saves a checkpoint first.
    """
    from cluster.recipe.file import read_tree
    from cluster.runtime.local import EarlyRay, set_quiet_environment

    set_quiet_environment()
    tree = read_tree(recipe, overrides)
    ray_start = EarlyRay(tree.get("cluster"))
    from cluster.run.launch import launch_training

    code = launch_training(recipe, tree, ray_start, overrides=overrides, resume=resume, run=run, as_json=as_json)
    if not ray_start.used:
        leave(code)
    return code
