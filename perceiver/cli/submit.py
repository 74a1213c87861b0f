"""``perceiver submit``: train a recipe, or run a search, as a job of a Ray cluster."""

import json
from typing import Any

import click

from perceiver.cli._access import access_options, reach


@click.command(
    epilog="""\b
Examples:
  perceiver submit recipes/train/quickstart.yaml
  perceiver submit recipes/train/imagenet.yaml --address http://127.0.0.1:8265 --no-wait
  perceiver submit recipes/train/quickstart.yaml train.epochs=90      # goes on with the same run
  perceiver submit recipes/tune/quickstart.yaml trials=20             # a search"""
)
@click.argument("recipe", type=click.Path(), metavar="RECIPE|SEARCH")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--run", metavar="NAME", help="The run: continued if it exists, else started; default: the recipe's name."
)
@click.option("--tune", is_flag=True, help="The file is a search; default: if it has the keys of one.")
@access_options
@click.option("--submission-id", metavar="ID", help="Name of the job; default: the run's name and a number.")
@click.option("--runtime-env-json", metavar="JSON", help="Ray runtime environment of the job.")
@click.option(
    "--working-dir", metavar="DIR", help="A folder that travels along, less data, runs and files that hold secrets."
)
@click.option("--metadata-json", metavar="JSON", help="Metadata of the job; anyone on the cluster can read them.")
@click.option(
    "--entrypoint-num-cpus", type=click.FloatRange(0), help="CPUs reserved for the driver, on any node that has them."
)
@click.option("--entrypoint-num-gpus", type=click.FloatRange(0), help="GPUs reserved for the driver.")
@click.option("--entrypoint-resources", metavar="JSON", help="Custom resources reserved for the driver.")
@click.option("--secret", "secrets", multiple=True, metavar="NAME", help="A variable that the cluster must hold.")
@click.option("--env", multiple=True, metavar="NAME", help="A variable of this shell whose value the job gets.")
@click.option("--install", is_flag=True, help="Install the dependencies at the versions of this machine for the job.")
@click.option("--no-wait", is_flag=True, help="Return when the job is submitted instead of following its log.")
@click.option("--json", "as_json", is_flag=True, help="Print the job as one JSON line at the end.")
def command(
    recipe: str,
    tune: bool,
    address: str | None,
    headers: str | None,
    verify: str,
    no_wait: bool,
    as_json: bool,
    entrypoint_resources: str | None,
    **options: Any,
) -> int:
    """Train RECIPE, or run SEARCH (perceiver tune), as a job of a Ray cluster, and follow its log.

    The job takes along our sources and the recipe, no data. Submitting a run again continues it from its newest
    checkpoint, in the same MLflow run; a search, with the trials that are not done. Ctrl-C leaves the job running.
    Exit code: the job's, 130 if it was stopped.
    """
    from cluster.jobs.commands import find_job, follow
    from cluster.jobs.config import Submission
    from cluster.jobs.submit import submit, training
    from tune.search.submission import is_search, searching

    resources = _resources(entrypoint_resources)
    wanted = Submission(recipe=recipe, entrypoint_resources=resources, **options)
    work = searching(wanted) if tune or is_search(recipe) else training(wanted)
    server = reach(address, headers, verify)
    name = submit(server, wanted, work, click.echo)
    job = find_job(server, name)
    if not as_json or not no_wait:
        click.echo(f"job {name} {'runs search' if work.verb == 'tune' else 'trains run'} {job.run} at {server.url}")
    if not no_wait:
        try:
            job = follow(server, job, lambda text: click.echo(text, nl=False))
        except KeyboardInterrupt:
            click.echo(f"\nthe job goes on: perceiver logs -f {name}, perceiver stop {name}")
            return 130
        click.echo(f"job {name} {job.status}")
    elif not as_json:
        click.echo(f"follow it with perceiver logs -f {name}, stop it with perceiver stop {name}")
    if as_json:
        click.echo(json.dumps(job.facts()))
    return 0 if no_wait else job.code()


def _resources(text: str | None) -> dict[str, float]:
    from perceiver.config import UserError

    try:
        tree = json.loads(text or "{}")
        return {str(name): float(amount) for name, amount in tree.items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"--entrypoint-resources {text!r}: wanted JSON such as '{{\"storage\": 1}}'") from None
