"""The end of a run: report, MLflow's last entries, and the commands for the next step."""

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.recipe.config import kind_of, zero_stage
from cluster.recipe.resources import machine_cpus
from cluster.recipe.resume import longer
from cluster.record.failures import EXIT_STOPPED
from cluster.record.run_folder import DRIVER_LOG, REPORT, WEIGHTS, RunFolder
from cluster.record.sessions import ended_sessions, work_time
from cluster.run.context import Launch
from cluster.runtime.session import continue_command, mlflow_place
from perceiver.config import UserError
from perceiver.tracking.record import unsent
from perceiver.tracking.runs import TrackingConfig, load_handle, open_tracker, reconcile
from perceiver.tracking.tracker import Tracker

log = logging.getLogger(__name__)

EXIT_CODES = {"finished": 0, "stopped": EXIT_STOPPED, "refused": 2}


@dataclass(frozen=True)
class RunEnd:
    """How a start of a run has ended.

    Attributes:
        folder: of the run.
        status: finished, stopped, refused or failed.
        error: what went wrong; empty if nothing did.
        code: exit code of the command (0 finished, 1 failed, 2 refused, 130 stopped).
        facts: what the workers returned: step, total_steps, evaluation, ...
        result: Ray's `Result`; None without one.
    """

    folder: RunFolder
    status: str
    error: str = ""
    code: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None


def conclude(launch: Launch, outcome: Mapping[str, Any]) -> RunEnd:
    """Write the report and MLflow's last entries, and print the outcome and the next commands; return the end.

    Its code is 1 if the report of a finished run could not be written.
    """
    status, folder, say = outcome.get("status", "failed"), launch.folder, launch.console.say
    if status != "finished":
        note_end(launch, outcome, status)
    continue_with = f"continue with: {continue_command(launch.command, folder)}"
    code, error = EXIT_CODES.get(status, 1), ""
    handle = outcome.get("handle")
    tracker = open_tracker(handle, folder.local)
    report = _report(launch, outcome) if status == "finished" else None
    if status == "finished" and report is None:
        code, error = 1, f"the report could not be written, see {folder.local / DRIVER_LOG}"
        launch.console.error(error)
    _finish_run(launch, tracker, status, report)
    if status == "finished":  # noted last: a driver that dies before leaves a run that --resume concludes
        note_end(launch, outcome, status)
    if handle and (left := unsent(folder.local)):
        say(f"{left:,} rows of the run's history in {folder.local} are not in mlflow yet: --resume sends them")
    if status == "finished":
        if launch.console.shell:
            _say_results(launch, outcome, report)
    elif status == "stopped" and "step" not in outcome:
        say(f"stopped at once, without a new checkpoint; {continue_with}")
    elif status == "stopped":
        say(f"stopped after step {outcome['step']} of {outcome['total_steps']}, checkpoint saved; {continue_with}")
    else:
        error = str(outcome.get("error", "the workers exited without an error message"))
        launch.console.error(error if status == "refused" else f"{error}; {continue_with}")
        say(f"logs {folder.local / 'logs'}")
    facts = {name: value for name, value in outcome.items() if name not in ("handle", "status", "result")}
    return RunEnd(folder, status, error, code, facts, outcome.get("result"))


def note_end(launch: Launch, outcome: Mapping[str, Any], status: str) -> None:
    """Record in run.json how the session has ended."""
    folder = launch.folder
    try:
        sessions = ended_sessions(folder)
        facts = {key: outcome.get(key) for key in ("step", "evaluation", "early_stop")}
        folder.note(status=status, **facts, sessions=sessions)
    except UserError as error:
        if status == "finished":
            raise
        log.error("%s", error)  # the failed store may be the cause of the outcome, which is printed below


def is_concluded(launch: Launch) -> bool:
    """Return whether a run whose steps are done has its weights, its report and its status."""
    facts, folder = launch.folder.facts(), launch.folder
    if facts.get("status") != "finished" or facts.get("step") != launch.start_step:
        return False
    return all(folder.exists(part) for part in (WEIGHTS, REPORT))


def send_waiting(launch: Launch, config: TrackingConfig) -> None:
    """Send MLflow the rows that it lacks of a finished run's history, if its server did not answer before."""
    folder, checkpoints = launch.folder.local, launch.folder.checkpoints
    if not config.enabled or load_handle(folder) is None or not unsent(folder):
        return
    left = reconcile(config, folder, history=checkpoints.history(checkpoints.steps()[-1]))
    where = f"{left:,} rows of the history wait in {folder}" if left else "has all metrics now"
    launch.console.say(f"mlflow {'does not answer: ' if left else ''}{where}")


def _report(launch: Launch, outcome: Mapping[str, Any]) -> str | None:
    """Write the report and return its URL; None if that fails: the weights and figures are still recorded."""
    from cluster.run.report import build_report

    try:
        manifest = launch.preflight.manifest
        return build_report(launch.recipe, launch.folder, manifest, _facts(launch, outcome), _commands(launch, outcome))
    except Exception:  # noqa: BLE001  an error in a plot must not lose the rest
        log.exception("the report failed")
        return None


def _facts(launch: Launch, outcome: Mapping[str, Any]) -> dict[str, str]:
    """Return the report's summary table."""
    recipe, preflight = launch.recipe, launch.preflight
    return {
        "model": f"{kind_of(recipe.model)}, {preflight.size}",
        "data": f"{recipe.data.url} ({preflight.manifest.name})",
        "workers": f"{recipe.cluster.workers}, ZeRO stage {zero_stage(recipe)}",
        "steps": f"{outcome['step']:,} of {recipe.train.global_batch} samples",
        **({"ended early": outcome["early_stop"]} if outcome.get("early_stop") else {}),
        "wall time": str(work_time(launch.folder)),
        "machine": f"{machine_cpus()} CPUs ({platform.machine()}), {platform.system()}",
        "checkpoint": launch.folder.checkpoints.location(outcome["step"]),
        **_best(launch, outcome),
        **_changes(launch.folder),
        **({"slow workers": "; ".join(slow)} if (slow := launch.folder.facts().get("stragglers")) else {}),
    }


def _best(launch: Launch, outcome: Mapping[str, Any]) -> dict[str, str]:
    """Return the best checkpoint by its caption; empty without `train.keep_best`."""
    config, step = launch.recipe.train.keep_best, outcome.get("best_step")
    if config is None or step is None:
        return {}
    return {"best": f"{launch.folder.checkpoints.location(step)} (by {config.metric})"}


def _changes(folder: RunFolder) -> dict[str, str]:
    """Return the keys with which the run was resumed, by step."""
    found = folder.facts().get("changes", {})
    return {f"changed at step {int(tag[-8:]):,}": "; ".join(text.split("\n")) for tag, text in found.items()}


def _finish_run(launch: Launch, tracker: Tracker, status: str, report: str | None) -> None:
    """Send the recipe, the report and the final status to MLflow."""
    recipe = launch.folder.local / "recipe.yaml"
    if recipe.exists():
        tracker.log_artifact(recipe)
    if report and "://" not in report:
        tracker.log_artifact(Path(report).parent, "report")
    if slow := launch.folder.facts().get("stragglers"):
        tracker.set_tag("stragglers", "; ".join(slow))
    tracker.set_tag("wall_time_s", f"{work_time(launch.folder).seconds:.1f}")
    tracker.close("finished" if status == "finished" else "stopped" if status == "stopped" else "failed")


def _say_results(launch: Launch, outcome: Mapping[str, Any], report: str | None) -> None:
    """Print the metrics, the paths of the results, and the next commands."""
    say, folder, recipe = launch.console.say, launch.folder, launch.recipe
    say("")
    figures = dict(outcome["evaluation"])
    if "accuracy" in figures:
        say(f"{recipe.data.eval_split} accuracy {100 * figures.pop('accuracy'):.1f} %")
    for name, value in figures.items():
        say(f"{recipe.data.eval_split} {name.replace('_', ' ')} {value:.4g}")
    say(f"wall time   {work_time(folder)}")
    say(f"checkpoint  {folder.checkpoints.location(outcome['step'])}")
    for caption, line in _best(launch, outcome).items():
        say(f"{caption:<12}{line}")
    say(f"weights     {folder.location('model.safetensors')}")
    if report:
        say(f"report      {report}")
    for caption, line in _commands(launch, outcome).items():
        say(f"{caption:<12}{line}")


def _commands(launch: Launch, outcome: Mapping[str, Any]) -> dict[str, str]:
    """Return useful next commands by caption."""
    recipe, handle = launch.recipe, outcome.get("handle")
    more = longer(recipe, outcome["step"], launch.preflight.manifest.split(recipe.data.train_split).samples)
    commands = {"mlflow": mlflow_place(handle.uri)} if handle else {}
    return {**commands, "train on": f"{continue_command(launch.command, launch.folder)} {more}"}
