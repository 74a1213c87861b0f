"""`perceiver submit`: a training run or a search as a job of a Ray cluster."""

import json
from typing import Any

import click

from perceiver.cli._access import access_options, reach
from perceiver.cli._types import Number, RunName
from perceiver.tracking.printable import say, say_json, say_log


@click.command(
    epilog="""\b
Examples:
  perceiver submit recipes/train/quickstart.yaml
  perceiver submit recipes/train/imagenet_perceiver.yaml --address http://127.0.0.1:8265 --no-wait
  perceiver submit recipes/train/quickstart.yaml train.epochs=90      # continues the same run
  perceiver submit recipes/tune/quickstart.yaml trials=20             # a search"""
)
@click.argument("recipe", type=click.Path(), metavar="RECIPE|SEARCH")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--run",
    type=RunName(),
    metavar="NAME",
    help="Name of the run, continued if it exists; default: the recipe's name.",
)
@click.option("--tune", is_flag=True, help="Treat the file as a search; default: decided by its keys.")
@access_options
@click.option("--submission-id", metavar="ID", help="Name of the job; default: the run's name with a number.")
@click.option("--runtime-env-json", metavar="JSON", help="Ray runtime environment of the job.")
@click.option(
    "--working-dir", metavar="DIR", help="Folder to upload, without data, runs and files that may contain secrets."
)
@click.option("--metadata-json", metavar="JSON", help="Metadata of the job, readable by everyone on the cluster.")
@click.option("--entrypoint-num-cpus", type=Number(0, 10_000), help="CPUs reserved for the driver, on any node.")
@click.option("--entrypoint-num-gpus", type=Number(0, 10_000), help="GPUs reserved for the driver.")
@click.option("--entrypoint-resources", metavar="JSON", help="Custom resources reserved for the driver.")
@click.option(
    "--secret", "secrets", multiple=True, metavar="NAME", help="Environment variable that must be set on the cluster."
)
@click.option("--env", multiple=True, metavar="NAME", help="Environment variable to pass on to the job.")
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="PATH|WHEEL",
    help="Package with plug-ins that the job takes along; others must be installed on the cluster.",
)
@click.option("--install", is_flag=True, help="Install the dependencies for the job, in the versions of this machine.")
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
    """Submit a training run or a search as a job of a Ray cluster.

    The job trains RECIPE, or runs SEARCH as perceiver tune does; its log is followed. It contains this package's
    sources and the recipe, but no data. Submitting a run again continues it from its newest checkpoint in the same
    MLflow run; submitting a search again continues its unfinished trials. Ctrl-C leaves the job running. Exit code:
    that of the job, 130 if it was stopped.
    """
    from cluster.jobs.commands import follow
    from cluster.jobs.config import Submission
    from perceiver.api.jobs import start_job

    resources = _resources(entrypoint_resources)
    wanted = Submission(recipe=recipe, entrypoint_resources=resources, **options)
    submitted = start_job(wanted, lambda: reach(address, headers, verify), progress=True, search=tune)
    name, server, job = submitted.name, submitted.server, submitted.job()
    if not as_json or not no_wait:
        say(f"job {name} {'runs search' if submitted.verb == 'tune' else 'trains run'} {job.run} at {server.url}")
    if not no_wait:
        try:
            job = follow(server, job, say_log)
        except KeyboardInterrupt:
            say()
            say(f"the job keeps running: perceiver logs -f {name}, perceiver stop {name}")
            return 130
        say(f"job {name} {job.status}")
    elif not as_json:
        say(f"follow the job with perceiver logs -f {name}, stop it with perceiver stop {name}")
    if as_json:
        say_json(job.facts())
    return 0 if no_wait else job.code()


def _resources(text: str | None) -> dict[str, float]:
    from perceiver.config import UserError

    try:
        tree = json.loads(text or "{}")
        amounts = {str(name): float(amount) for name, amount in tree.items()}
        if any(isinstance(amount, bool) for amount in tree.values()) or not all(
            0 <= amount <= 1e15 for amount in amounts.values()
        ):
            raise ValueError("not amounts")
        return amounts
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"--entrypoint-resources {text!r}: wanted JSON such as '{{\"storage\": 1}}'") from None
