"""Submit a recipe or a search as a Ray job; everything that would stop the job on the cluster is refused first."""

import itertools
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster.jobs.commands import OUTPUT, RECIPE, RUN, STOP_WAIT, list_jobs
from cluster.jobs.config import JobSpec, Submission
from cluster.jobs.package import (
    build_package,
    copy_sources,
    locked_requirements,
    named_files,
    path_in_package,
    recipe_files,
)
from cluster.jobs.paths import check_paths, is_here, tracking_note
from cluster.jobs.plugins import needed_packages, unpack
from cluster.jobs.secrets import check_secret_files, check_secrets, needed
from cluster.jobs.server import JobServer, text_object
from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.file import read_tree
from cluster.recipe.placement import Node, check_task_memory
from cluster.recipe.preflight import check_worker_range, data_need, place_some
from cluster.record.run_folder import named_run
from cluster.runtime.local import QUIET_ENVIRONMENT
from cluster.runtime.session import CONTINUE_COMMAND
from perceiver.config import UserError
from perceiver.storage import first_line, parse_json
from perceiver.tracking.redaction import redact_text


def training(wanted: Submission) -> JobSpec:
    """Return the work of a job that trains a recipe.

    Raises:
        UserError: a mistake in the recipe.
    """
    tree = read_tree(wanted.recipe, wanted.overrides)
    recipe = build_recipe(tree, source=wanted.recipe)
    files = [*recipe_files(wanted.recipe), *named_files(tree)]
    return JobSpec("train", recipe, recipe.name, tree, files, partial(check_places, recipe=recipe))


def submit(server: JobServer, wanted: Submission, work: JobSpec, say: Callable[[str], None] = print) -> str:
    """Check, package and submit a job; return its name.

    Raises:
        UserError: the first problem that would stop the job.
    """
    recipe = work.recipe
    run = named_run(recipe.output, wanted.run or work.name).name
    runtime_env = build_runtime_env(recipe, wanted)
    runtime_env["env_vars"][CONTINUE_COMMAND] = shlex.join(
        ["perceiver", "submit", file_name(wanted), *wanted.overrides, "--run", run, *_plugin_words(wanted)]
    )
    nodes = server.nodes()
    check_secrets(work.tree, wanted, runtime_env)
    check_secret_files(work.files)
    check_worker_range(recipe)
    work.fits(nodes)
    check_entrypoint(nodes, work, wanted)
    here = is_here(nodes, server.url)
    notes = [
        *check_paths(recipe, here, server.url),
        tracking_note(recipe, here, {*wanted.secrets, *runtime_env["env_vars"]}),
    ]
    for line in filter(None, notes):
        say(line)
    name = free_name(server, wanted, run, recipe.output)
    metadata = {RUN: run, OUTPUT: recipe.output, RECIPE: file_name(wanted), STOP_WAIT: str(recipe.cluster.stop_wait_s)}
    given = text_object(wanted.metadata_json, "--metadata-json") if wanted.metadata_json else {}
    own, excludes = runtime_env.pop("working_dir", None), runtime_env.pop("excludes", [])
    with tempfile.TemporaryDirectory(prefix="perceiver-job-") as folder:
        working = Path(folder, "files")
        working.mkdir()
        left = build_package(working, work.files, own, excludes)
        if left:
            say(f"note: {', '.join(left)} of {own} not uploaded: may contain secrets")
        runtime_env["working_dir"] = str(working)
        # Ray puts them before the working directory on PYTHONPATH.
        taken = [unpack(place, Path(folder, f"plugin-{number}")) for number, place in enumerate(wanted.plugins)]
        modules = [str(copy_sources(Path(folder))), *itertools.chain(*taken)]
        runtime_env["py_modules"] = [*modules, *runtime_env.get("py_modules", [])]
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


def entrypoint(wanted: Submission, work: JobSpec, run: str, folder: str | None) -> str:
    """Return the shell command of a job: `cluster.jobs.entrypoint`, which becomes `perceiver train` or `tune`.

    Args:
        wanted: the user's request.
        work: the job's work.
        run: name of the run.
        folder: the current folder if the cluster's nodes see it too; None if the job has only its package.
    """
    words = job_words(run, work.recipe.output, needed(work.tree, wanted))
    words += ["--folder", folder] if folder else []
    packages = needed_packages(work.recipe)
    words += ["--packages", ",".join(packages)] if packages else []
    reserved = _reserved(wanted)
    words += ["--reserved", json.dumps(reserved)] if reserved else []
    words += ["--sent"] if folder and wanted.sent else []
    words += [work.verb, file_name(wanted) if folder else path_in_package(wanted.recipe), *wanted.overrides]
    words += [] if folder else work.found_by
    return "exec " + shlex.join(words)


def file_name(wanted: Submission) -> str:
    """Return the job's recipe or search as it was given, or its path in the package if it is there only."""
    return path_in_package(wanted.recipe) if wanted.sent else wanted.recipe


def _plugin_words(wanted: Submission) -> list[str]:
    return [word for place in wanted.plugins for word in ("--plugin", place)]


def job_words(run: str, output: str, needs: Collection[str]) -> list[str]:
    """Return the first words of a job's command: the entrypoint, the run, and the variables that it needs."""
    words = [
        "python",
        "-P",
        "-m",
        "perceiver_train.module",
        "cluster.jobs.entrypoint",
        "--run",
        run,
        "--output",
        output,
    ]
    return [*words, "--needs", ",".join(needs)] if needs else words


def check_places(nodes: Sequence[Node], recipe: Recipe) -> None:
    """Raise a UserError if the workers or data tasks do not fit on the nodes."""
    if not recipe.cluster.autoscaling:
        check_task_memory(nodes, data_need(recipe))
    place_some(recipe, nodes)


def check_entrypoint(nodes: Sequence[Node], work: JobSpec, wanted: Submission) -> None:
    """Refuse a driver that requests more than any node has, or that leaves too little for the workers on every node."""
    need = _reserved(wanted)
    if not need or work.recipe.cluster.autoscaling:
        return
    asked = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
    reason = f"none of the {len(nodes)} nodes has that: request less"
    for number, node in enumerate(nodes):
        if node.room(need):
            try:
                work.fits([*nodes[:number], node.less(need), *nodes[number + 1 :]])
            except UserError as error:
                reason = f"then {error}; or request less for the entrypoint"
            else:
                return
    raise UserError(f"the entrypoint requests {asked} (--entrypoint-...), and {reason}")


def _reserved(wanted: Submission) -> dict[str, float]:
    """Return the resources that the driver reserves on its node."""
    need = {"CPU": wanted.entrypoint_num_cpus or 0.0, "GPU": wanted.entrypoint_num_gpus or 0.0}
    return {name: amount for name, amount in {**need, **wanted.entrypoint_resources}.items() if amount}


def free_name(server: JobServer, wanted: Submission, run: str, output: str) -> str:
    """Return an unused name for the job.

    Raises:
        UserError: the user's name is in use, or a live job trains the same run.
    """
    jobs = list_jobs(server)
    busy = next((job for job in jobs if job.run == run and job.output == output and job.live), None)
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
                f"--submission-id {wanted.submission_id} is taken by a job that is {status}: choose another, or omit it"
            )
        return wanted.submission_id
    number = 1
    while f"{run}-{number}" in taken:
        number += 1
    return f"{run}-{number}"


def build_runtime_env(recipe: Recipe, wanted: Submission) -> dict[str, Any]:
    """Return the job's runtime environment: ours, overridden by the user's; ``working_dir`` is the user's folder."""
    given = _given_env(wanted.runtime_env_json or "{}")
    folder = _folder(wanted, given)
    ours = {name: value for name, value in QUIET_ENVIRONMENT.items() if not name.startswith("RAY_USAGE")}
    ours["RAY_JOB_STOP_WAIT_TIME_S"] = str(recipe.cluster.stop_wait_s)
    given["env_vars"] = {**ours, **_passed(wanted.env), **given.get("env_vars", {})}
    if wanted.install:
        if "pip" in given or "uv" in given or "conda" in given:
            raise UserError("--install and pip, uv or conda in --runtime-env-json exclude each other: give one")
        given["pip"] = {"packages": locked_requirements(), "pip_check": False}
    return {**given, "working_dir": folder} if folder else given


def _given_env(text: str) -> dict[str, Any]:
    """Read ``--runtime-env-json`` as Ray does, with the contents of the requirement files that it names.

    Raises:
        UserError: it is not JSON, or Ray refuses it.
    """
    from ray.runtime_env import RuntimeEnv

    try:
        given = parse_json(text, "--runtime-env-json")
    except UserError as error:
        raise UserError(redact_text(str(error).removesuffix(": restore the file"))) from None
    if not isinstance(given, dict) or not isinstance(given.get("env_vars", {}), dict):
        raise UserError("""--runtime-env-json is not an object such as '{"env_vars": {"NCCL_DEBUG": "INFO"}}'""")
    if "worker_process_setup_hook" in given:
        raise UserError("--runtime-env-json: worker_process_setup_hook is used by perceiver itself: remove it")
    folder = {key: given.pop(key) for key in ("working_dir",) if key in given}
    try:
        read = RuntimeEnv(**given).to_dict()
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"--runtime-env-json: {redact_text(first_line(error))}") from None
    return {**given, **{key: read[key] for key in ("pip", "uv", "conda") if key in read}, **folder}


def _folder(wanted: Submission, given: dict[str, Any]) -> str | None:
    """Return the user's folder to upload, and remove it from the environment.

    Raises:
        UserError: two folders are given, or the folder does not exist on this machine.
    """
    named = given.pop("working_dir", None)
    if named is not None and wanted.working_dir:
        raise UserError("--working-dir and working_dir in --runtime-env-json exclude each other: give one")
    option = "--working-dir" if wanted.working_dir else "--runtime-env-json: working_dir"
    folder = wanted.working_dir or named
    if folder is not None and (not isinstance(folder, str) or "://" in folder or not Path(folder).is_dir()):
        raise UserError(
            f"{option} = {redact_text(str(folder))} is not a folder on this machine: give a local folder, or name an "
            "archive that the cluster fetches in py_modules of --runtime-env-json"
        )
    return folder


def _passed(names: Sequence[str]) -> dict[str, str]:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"--env {missing[0]}: no such environment variable here: set it, or omit the option")
    return {name: os.environ[name] for name in names}
