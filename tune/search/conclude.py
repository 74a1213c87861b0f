"""The end of a search: best recipe, report, last MLflow entries, and the commands to continue."""

import logging
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from cluster.recipe.resources import machine_cpus
from cluster.record.failures import EXIT_STOPPED
from cluster.record.run_folder import DRIVER_LOG
from cluster.run.console import duration
from cluster.runtime.session import mlflow_place
from perceiver.tracking.printable import say_json
from perceiver.tracking.redaction import redact
from tune.config import Search
from tune.report.numbers import figures, verdict, workers
from tune.search_record import DONE, SearchRecord, TrialRecord
from tune.space.space import with_values

if TYPE_CHECKING:
    from tune.search.state import SearchLaunch

log = logging.getLogger(__name__)


def conclude(launch: "SearchLaunch", outcome: dict[str, Any]) -> int:
    """Write best recipe, report and the last MLflow entries; print the results; return the exit code.

    The code is 1 if the report could not be written.
    """
    record = launch.record
    status, best = settle(launch, outcome), record.best()
    recipe = _write_best(launch, best) if best else None
    report = _report(launch) if best else None
    finish_run(launch, status, ("search.yaml", "best.yaml", "report.html", "trials.json"))
    if best and launch.console.shell:
        _say_results(launch, best, recipe, report, outcome.get("handle"))
    if launch.start.as_json:
        say_json(_facts(launch, status, best, recipe, report, outcome))
    code = say_ending(launch, status, outcome)
    return 1 if best and report is None and code == 0 else code


def settle(launch: "SearchLaunch", outcome: dict[str, Any]) -> str:
    """Return the status of a search that has ended; without an evaluation it has failed."""
    record, status = launch.record, outcome["status"]
    if status == "finished" and record.best() is None:
        status, outcome["error"] = "failed", all_failed(record)
    return status


def say_ending(launch: "SearchLaunch", status: str, outcome: Mapping[str, Any]) -> int:
    """Print how to continue a search that did not finish; return the exit code."""
    record, folder, console = launch.record, launch.folder, launch.console
    if status == "stopped":
        left = sum(trial.status not in DONE for trial in record.trials)
        done = f"stopped with {len(record.ended())} of {launch.total} trials done, {left} saved"
        console.say(f"{done}; continue with: {launch.continue_with}")
    elif status == "failed":
        console.error(outcome.get("error", "the search exited without an error message"))
        console.say(f"logs {folder.local / 'logs'}; continue with: {launch.continue_with}")
    return {"finished": 0, "stopped": EXIT_STOPPED}.get(status, 1)


def all_failed(record: SearchRecord) -> str:
    """Return the error of a search without an evaluation, with the first trial's reason."""
    reasons = [f"trial {trial.number}: {trial.reason}" for trial in record.trials if trial.reason]
    return f"none of {len(record.trials)} trials was evaluated" + (f"; {reasons[0]}" if reasons else "")


def best_recipe(search: Search, trial: TrialRecord, record: SearchRecord, where: str) -> str:
    """Return the recipe of a trial as a file for `perceiver train`.

    Args:
        search: the search, with the base recipe.
        trial: its values are set in the recipe.
        record: for the metrics in the header.
        where: the search's folder, for the header.
    """
    tree = with_values(search.base, {**trial.values, "name": f"{search.config.name}-best"})
    lines = [
        f"# Best of {len(record.trials)} trials of {where}: trial {trial.number}.",
        f"# Reached    {figures(trial, record)} after {trial.epoch:.4g} epochs; selected by it, so it is optimistic.",
        f"# Command    perceiver train {where}/best.yaml",
    ]
    if trial.exchanges:
        lines.append(
            "# These are its last values. Before, it had other values and other trials' weights: see the report."
        )
    return "\n".join(lines) + "\n" + yaml.safe_dump(redact(tree), sort_keys=False)


def _write_best(launch: "SearchLaunch", best: TrialRecord) -> str:
    launch.folder.write("best.yaml", best_recipe(launch.search, best, launch.record, launch.folder.url))
    return launch.folder.location("best.yaml")


def _report(launch: "SearchLaunch") -> str | None:
    """Write the report; return None if that fails, so that the other results are still written and shown."""
    from tune.report.page import search_page

    try:
        page = search_page(
            launch.folder.name,
            launch.record,
            launch.search,
            eval_samples=_eval_samples(launch),
            facts=report_facts(launch),
            commands=commands(launch),
            best_recipe=launch.folder.read("best.yaml") or "",
        )
        launch.folder.write("report.html", page)
        return launch.folder.location("report.html")
    except Exception:  # noqa: BLE001  a plot that fails must not lose the best recipe
        log.exception("cannot write the report")
        launch.console.error(f"cannot write the report, see {launch.folder.local / DRIVER_LOG}")
        return None


def _eval_samples(launch: "SearchLaunch") -> int:
    data = launch.search.recipe.data
    return launch.checker.manifest(data.url, data.storage_options).split(data.eval_split).samples


def report_facts(launch: "SearchLaunch") -> dict[str, str]:
    """Return the report's tiles."""
    record, config, recipe = launch.record, launch.search.config, launch.search.recipe
    counts = {status: sum(trial.status == status for trial in record.trials) for status in (*DONE, "unfinished")}
    return {
        "trials": f"{len(record.trials)}: "
        + ", ".join(f"{count} {status}" for status, count in counts.items() if count),
        "search": f"{config.search.kind}, scheduler {config.scheduler.kind}",
        "base recipe": recipe.name,
        "data": recipe.data.url,
        "at a time": f"{launch.slots.concurrency} trials, {workers(recipe)} each",
        "wall time": f"{duration(record.seconds)}, start-up included",
        "cost": f"{record.worker_seconds():,.0f} worker-seconds",
        "machine": machine(),
    }


def machine() -> str:
    """Return a description of this machine."""
    return f"{machine_cpus()} CPUs ({platform.machine()}), {platform.system()}"


def commands(launch: "SearchLaunch", handle: Any = None) -> dict[str, str]:
    """Return the next commands by caption."""
    found = {"train it": shlex.join(["perceiver", "train", launch.folder.location("best.yaml")])}
    if handle is not None:
        found["mlflow"] = mlflow_place(handle.uri)
    more = launch.total * 2
    return {**found, "search on": f"{launch.continue_with} trials={more}"}


def _say_results(
    launch: "SearchLaunch", best: TrialRecord, recipe: str | None, report: str | None, handle: Any
) -> None:
    say = launch.console.say
    say("")
    say(verdict(launch.record, 0 if launch.search.config.with_baseline else None, _eval_samples(launch)))
    say("values      " + "  ".join(f"{key}={value}" for key, value in best.values.items()))
    say(f"cost        {launch.record.worker_seconds():,.0f} worker-seconds, {duration(launch.record.seconds)} in all")
    if recipe:
        say(f"recipe      {recipe}")
    if report:
        say(f"report      {report}")
    for caption, line in commands(launch, handle).items():
        say(f"{caption:<12}{line}")


def finish_run(launch: "SearchLaunch", status: str, files: Sequence[str]) -> None:
    """Send files of the search's folder and its status to MLflow, then record the status in run.json.

    It comes last: a driver that dies before leaves a search that --resume concludes.
    """
    tracker = launch.tracker
    for name in files:
        path = launch.folder.local / name
        if path.exists():
            tracker.log_artifact(path)
    tracker.close("finished" if status == "finished" else "stopped" if status == "stopped" else "failed")
    launch.folder.note(status=status, seconds=launch.record.seconds)


def _facts(
    launch: "SearchLaunch",
    status: str,
    best: TrialRecord | None,
    recipe: str | None,
    report: str | None,
    outcome: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of the JSON line."""
    record = launch.record
    return {
        "status": status,
        "search": launch.folder.url,
        "error": outcome.get("error"),
        "trials": {trial.number: trial.status for trial in record.trials},
        "best": {"trial": best.number, "values": best.values, "scores": best.scores(list(record.metrics))}
        if best
        else None,
        "recipe": recipe,
        "report": report,
        "seconds": round(record.seconds, 1),
        "worker_seconds": round(record.worker_seconds(), 1),
        "measured": time.strftime("%Y-%m-%d"),
    }
