"""Submitting a recipe or a search: everything that would stop the job on the cluster is refused here first."""

import json
import os
import re
import shlex
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cluster.job_server import JobServer, text_object
from cluster.jobs import LIVE, OUTPUT, RECIPE, RUN, STOP_WAIT, list_jobs
from cluster.local import QUIET_ENVIRONMENT
from cluster.package import build_package, locked_requirements, named_files, path_in_package
from cluster.placement import Node, check_memory, place
from cluster.preflight import check_batch, data_need
from cluster.recipe import Recipe, build_recipe
from cluster.recipe_file import read_tree
from cluster.run_folder import named_run
from cluster.session import GO_ON
from perceiver.config import UserError
from perceiver.train.redaction import MASK, flatten, is_reference, redact_value

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
HIDDEN_URL = ("http://", "https://", "s3://", "gs://", "az://", "abfs://")


@dataclass(frozen=True)
class Submission:
    """What the user asks for; the fields after ``run`` are the flags of ``ray job submit``.

    Attributes:
        recipe: file of this machine: a recipe, or a search.
        overrides: ``key=value``, as typed.
        run: name of the run, continued if it exists; default: the recipe's name.
        secrets: environment variables that the cluster must hold; only their names travel.
        env: environment variables of this machine whose values travel.
        install: install the locked dependencies for the job instead of taking the cluster's.
    """

    recipe: str
    overrides: Sequence[str] = ()
    run: str | None = None
    submission_id: str | None = None
    runtime_env_json: str | None = None
    working_dir: str | None = None
    metadata_json: str | None = None
    entrypoint_num_cpus: float | None = None
    entrypoint_num_gpus: float | None = None
    entrypoint_resources: Mapping[str, float] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    env: Sequence[str] = ()
    install: bool = False


@dataclass(frozen=True)
class Work:
    """What a job does: a perceiver command, and all that it reads when it starts.

    Attributes:
        verb: the command.
        recipe: what it trains, overrides applied.
        name: of the run, unless the user gives one.
        tree: every setting that travels, the recipe's first.
        files: those of this machine that travel; the command's own is the first.
        fits: refuses a cluster, given its nodes, that cannot hold it.
        found_by: overrides by which the files find each other in the package.
    """

    verb: str
    recipe: Recipe
    name: str
    tree: Mapping[str, Any]
    files: Sequence[str]
    fits: Callable[[Sequence[Node]], None]
    found_by: Sequence[str] = ()


def training(wanted: Submission) -> Work:
    """Return the work of a job that trains a recipe.

    Raises:
        UserError: a mistake in the recipe.
    """
    tree = read_tree(wanted.recipe, wanted.overrides)
    recipe = build_recipe(tree, source=wanted.recipe)
    files = [wanted.recipe, *named_files(tree)]
    return Work("train", recipe, recipe.name, tree, files, partial(check_places, recipe=recipe))


def submit(server: JobServer, wanted: Submission, work: Work, say: Callable[[str], None] = print) -> str:
    """Check, pack and submit; return the job's name.

    Raises:
        UserError: the first thing that would stop the job.
    """
    recipe = work.recipe
    run = named_run(recipe.output, wanted.run or work.name).name
    runtime_env = _runtime_env(recipe, wanted)
    runtime_env["env_vars"][GO_ON] = shlex.join(["perceiver", "submit", wanted.recipe, *wanted.overrides, "--run", run])
    nodes = server.nodes()
    check_secrets(work.tree, wanted, runtime_env)
    check_batch(recipe)
    work.fits(nodes)
    check_entrypoint(nodes, recipe, wanted)
    here = is_here(nodes)
    for line in check_paths(recipe, here, server.url):
        say(line)
    name = _free_name(server, wanted, run, recipe.output)
    metadata = {RUN: run, OUTPUT: recipe.output, RECIPE: wanted.recipe, STOP_WAIT: str(recipe.cluster.stop_wait_s)}
    given = text_object(wanted.metadata_json, "--metadata-json") if wanted.metadata_json else {}
    with tempfile.TemporaryDirectory(prefix="perceiver-job-") as folder:
        if not runtime_env.get("working_dir"):
            build_package(Path(folder), work.files, wanted.working_dir)
            runtime_env["working_dir"] = folder
        with server.answers(f"the job {name}"):
            return server.client.submit_job(
                entrypoint=entrypoint(wanted, work, run, str(Path.cwd()) if here else None),
                submission_id=name,
                runtime_env=runtime_env,
                metadata={**given, **metadata},
                entrypoint_num_cpus=wanted.entrypoint_num_cpus,
                entrypoint_num_gpus=wanted.entrypoint_num_gpus,
                entrypoint_resources=dict(wanted.entrypoint_resources) or None,
            )


def entrypoint(wanted: Submission, work: Work, run: str, folder: str | None) -> str:
    """Return the shell command of the job: `cluster.job`, which becomes `perceiver train` or `perceiver tune`.

    Args:
        wanted: what the user asked for.
        work: what that comes to.
        run: name of the run.
        folder: the current folder, if the cluster's nodes see it too; else the job finds all in its package.
    """
    needs = needed(work.tree, wanted)
    words = ["python", "-m", "cluster.job", "--run", run, "--output", work.recipe.output]
    words += ["--needs", ",".join(needs)] if needs else []
    words += ["--folder", folder] if folder else []
    words += [work.verb, wanted.recipe if folder else path_in_package(wanted.recipe), *wanted.overrides]
    words += [] if folder else work.found_by
    return "exec " + shlex.join(words)


def needed(tree: Mapping[str, Any], wanted: Submission) -> list[str]:
    """Return the names of the environment variables that the job reads on the cluster."""
    values = [value for value in flatten(tree).values() if isinstance(value, str)]
    named = [value.removeprefix("env:") for value in values if value.startswith("env:")]
    named += [value[1:] for value in values if value.startswith("$") and NAME.fullmatch(value[1:])]
    return sorted({*named, *wanted.secrets})


def check_secrets(tree: Mapping[str, Any], wanted: Submission, runtime_env: Mapping[str, Any]) -> None:
    """Refuse secrets by value: the job's package, command, environment and metadata can be read by all of its users."""
    for name in wanted.secrets:
        if not NAME.fullmatch(name):
            raise UserError(f"--secret {name.split('=')[0]}: wanted the name of an environment variable of the cluster")
    for key, value in flatten(tree).items():
        if isinstance(value, str) and not value.startswith("$") and _hides(key, value):
            raise UserError(
                f"{key} holds a secret, which would travel with the job: write env:NAME or $NAME there and set NAME "
                "where the cluster's nodes start"
            )
    metadata = text_object(wanted.metadata_json, "--metadata-json") if wanted.metadata_json else {}
    for option, values in (("--runtime-env-json", runtime_env.get("env_vars", {})), ("--metadata-json", metadata)):
        for key, value in values.items():
            if _hides(key, str(value)):
                raise UserError(
                    f"{option}: {key} looks like a secret, and everyone who sees the job sees it: name it with "
                    f"--secret {key} and set it where the cluster's nodes start"
                )


def _hides(key: str, value: str) -> bool:
    """Return whether a value is one that we would mask."""
    return not is_reference(value) and MASK in str(redact_value(key, value)) and MASK not in value


def check_places(nodes: Sequence[Node], recipe: Recipe) -> None:
    """Refuse workers or data tasks that fit on no node."""
    if not recipe.cluster.autoscaling:
        check_memory(nodes, data_need(recipe))
    place(recipe.cluster, nodes, data_need(recipe))


def check_entrypoint(nodes: Sequence[Node], recipe: Recipe, wanted: Submission) -> None:
    """Refuse a driver that asks for more than any node has."""
    need = {
        "CPU": wanted.entrypoint_num_cpus or 0,
        "GPU": wanted.entrypoint_num_gpus or 0,
        **wanted.entrypoint_resources,
    }
    need = {name: amount for name, amount in need.items() if amount}
    if need and not recipe.cluster.autoscaling and not any(node.room(need) for node in nodes):
        asked = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
        raise UserError(f"the entrypoint asks for {asked}, which none of the {len(nodes)} nodes has: ask for less")


def is_here(nodes: Sequence[Node]) -> bool:
    """Return whether all nodes of a cluster are processes of this machine, which sees the same files."""
    own = {a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET}
    return all(node.name.startswith("127.") or node.name in own for node in nodes)


def check_paths(recipe: Recipe, here: bool, url: str) -> Iterator[str]:
    """Yield a warning for each path that all nodes must share; refuse those that only this machine can mean.

    Raises:
        UserError: a relative path, on a cluster of other machines.
    """
    if here:
        return
    places = {"data.url": recipe.data.url, "output": recipe.output}
    places |= {f"data.mixture.{i}.url": part.url for i, part in enumerate(recipe.data.mixture)}
    for key, place_ in places.items():
        if "://" in place_:
            continue
        if not Path(place_).is_absolute():
            raise UserError(
                f"{key} = {place_} is a folder of this machine, which the nodes behind {url} do not see: set {key} to "
                "a URL such as s3://bucket/folder, or to the absolute path of storage that all nodes share"
            )
        yield f"note: {key} = {place_} must be the same storage on every node"
    uri = recipe.tracking.uri or ""
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raise UserError(f"tracking.uri = {uri} is a file of this machine: give the URL of an MLflow server")


def _free_name(server: JobServer, wanted: Submission, run: str, output: str) -> str:
    """Return a name for the job that no other has.

    Raises:
        UserError: the name the user gave is taken, or a live job trains the same run.
    """
    jobs = list_jobs(server)
    busy = next((job for job in jobs if job.run == run and job.output == output and job.status in LIVE), None)
    if busy is not None:
        raise UserError(
            f"run {run!r} is being trained by the job {busy.name} ({busy.status}): follow it with perceiver logs -f "
            f"{busy.name}, stop it with perceiver stop {busy.name}, or give another --run"
        )
    taken = {job.name: job for job in jobs}
    if wanted.submission_id:
        if wanted.submission_id in taken:
            status = taken[wanted.submission_id].status
            raise UserError(
                f"--submission-id {wanted.submission_id} is taken by a job that is {status}: give another, or none"
            )
        return wanted.submission_id
    number = 1
    while f"{run}-{number}" in taken:
        number += 1
    return f"{run}-{number}"


def _runtime_env(recipe: Recipe, wanted: Submission) -> dict[str, Any]:
    """Return the job's environment: the user's, ours below it."""
    try:
        given = json.loads(wanted.runtime_env_json or "{}")
    except ValueError as error:
        raise UserError(f"--runtime-env-json is not JSON ({error})") from None
    if not isinstance(given, dict) or not isinstance(given.get("env_vars", {}), dict):
        raise UserError("""--runtime-env-json is not an object, such as '{"env_vars": {"NCCL_DEBUG": "INFO"}}'""")
    ours = {name: value for name, value in QUIET_ENVIRONMENT.items() if not name.startswith("RAY_USAGE")}
    ours["RAY_JOB_STOP_WAIT_TIME_S"] = str(recipe.cluster.stop_wait_s)
    given["env_vars"] = {**ours, **_passed(wanted.env), **given.get("env_vars", {})}
    if wanted.install:
        if "pip" in given or "uv" in given or "conda" in given:
            raise UserError("--install and an environment in --runtime-env-json exclude each other: give one")
        given["pip"] = {"packages": locked_requirements(), "pip_check": False}
    if wanted.working_dir and "://" in wanted.working_dir:
        given["working_dir"] = wanted.working_dir
    return given


def _passed(names: Sequence[str]) -> dict[str, str]:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"--env {missing[0]}: no such environment variable here; set it, or leave the option out")
    return {name: os.environ[name] for name in names}
