"""The driver of a search: check, start Ray and MLflow, run Ray Tune, conclude."""

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml

from cluster.recipe.config import build_recipe
from cluster.recipe.placement import Node, connected_nodes
from cluster.recipe.preflight import data_facts, tracked_data
from cluster.recipe.resources import machine_cpus
from cluster.recipe.resume import check_same_data
from cluster.record.failures import one_line
from cluster.record.run_folder import RunFolder, choose_run
from cluster.run.console import Show
from cluster.run.driver import Fit
from cluster.runtime.local import RaySession
from cluster.runtime.session import (
    Tracked,
    connected,
    is_joined,
    log_file,
    raise_on_signal,
    ray_and_mlflow,
    stop_on_signal,
)
from cluster.worker.monitor import ActorMonitor
from perceiver.config import UserError
from perceiver.export.weights import open_weights
from perceiver.tracking.record import unsent
from perceiver.tracking.redaction import redact
from perceiver.tracking.runs import RunHandle, TrackingConfig, load_handle, open_tracker, reconcile
from perceiver.tracking.tracker import Status
from perceiver.yaml_reader import parse_yaml
from pipelines.feed.ingest import load_data
from tune.config import OptunaSearch, Search, build_search
from tune.search.checks import baseline, check_search, check_trials, steps_of
from tune.search.conclude import conclude
from tune.search.console import SearchConsole
from tune.search.coordinator import Coordinator
from tune.search.dry_run import say_plan
from tune.search.resources import Slots, divide
from tune.search.state import Concluder, SearchLaunch, SearchPlan, SearchStart
from tune.search.tuner import build_tuner
from tune.search_file import SEARCH, read_search
from tune.search_record import SearchRecord, TrialRecord, load_record, reopen, save_record, trial_name
from tune.space.samplers import FixedSampler, OptunaSampler, Sampler, known_trials
from tune.space.space import Values, with_values

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
STOPPING = "stopping: the running trials save a checkpoint first (again to leave at once)"
FREE_ON_RESUME = ("trials", "concurrency", "max_failures")


def launch_search(
    search_file: str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    run: str | None = None,
    as_json: bool = False,
    dry_run: bool = False,
    show: Show = "shell",
) -> int:
    """Run a search; return the exit code (0 finished, 1 failed, 130 stopped).

    Args:
        search_file: the search file, or its keys.
        overrides: ``key=value``, of the search or of its base recipe.
        resume: continue the newest search of the name, or ``run``.
        run: name of the search's folder.
        as_json: print the outcome as one JSON line at the end.
        dry_run: print the plan only.
        show: what to print.

    Raises:
        UserError: a mistake in the search, the recipe, the data or the resources, before anything starts.
    """
    tree, base, where = read_search(search_file, overrides)
    set_environment()
    path = search_file if isinstance(search_file, str) else ""
    search = build_search(tree, base, where, path or SEARCH)
    checker = check_search(search)
    known = known_trials(search, baseline(search))
    slots = find_slots(search, known)
    check_trials(checker, known or [])
    if dry_run:
        say_plan(search, checker, slots, known)
        return 0
    command = shlex.join(["perceiver", "tune", path or "SEARCH", *overrides])
    start = SearchStart(command, resume, run, as_json, show=show)
    return run_search(SearchPlan(search, checker, slots, known), start, conclude)


def set_environment() -> None:
    """Set Ray Tune's environment variables that the user has not set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def run_search(plan: SearchPlan, start: SearchStart, conclude: Concluder) -> int:
    """Run the remaining trials of a search; return the exit code of ``conclude``, 0 if there are none.

    Raises:
        UserError: there is no such search to resume, or it was started with other settings.
    """
    folder = _folder(plan.search, start)
    new = SearchRecord(metrics=plan.search.config.metrics, workers=plan.search.recipe.cluster.workers)
    record = load_record(folder) if start.resume else new
    waiting, concluded = reopen(record), folder.facts().get("status") == "finished"
    _keep_search(plan, folder, start.resume)
    _check_trials_data(plan, folder, record)
    save_record(record, folder)
    with SearchConsole(record, show=start.show) as console, ExitStack() as stack:
        stack.enter_context(raise_on_signal())
        stack.enter_context(log_file(folder))
        background = stack.enter_context(ThreadPoolExecutor(2))
        launch = SearchLaunch(plan, start, folder, record, waiting, console, background)
        if start.resume and not waiting and len(record.trials) >= launch.total:
            if concluded:
                console.say(f"{folder.url} is finished ({len(record.trials)} trials); {start.more}")
                return 0
            console.say(f"all {len(record.trials)} trials are done: writing what the last start did not finish")
            return conclude(launch, _reopened(launch))
        folder.note(status="running")
        try:
            outcome = _search(launch)
        except UserError:
            raise
        except KeyboardInterrupt:
            outcome = {"status": "stopped"}
        except Exception as error:  # noqa: BLE001  a defect of the program or the machine
            log.exception("the search failed")
            outcome = {"status": "failed", "error": one_line(error)}
        return conclude(launch, outcome)


def _reopened(launch: SearchLaunch) -> dict[str, Any]:
    """Return the outcome of a search whose trials are done and whose driver died while it concluded."""
    folder = launch.folder
    handle = load_handle(folder.local)
    if handle is not None:
        handle = replace(handle, uri=launch.tracking.store_uri(folder.local.parent))
        launch.tracker = open_tracker(handle, folder.local)
    return {"status": "finished", "handle": handle}


def find_slots(search: Search, known: list[Values] | None) -> Slots:
    """Divide the cluster, or this machine if the recipe has no address."""
    import torch

    nodes = [Node("this machine", {"CPU": machine_cpus(), "GPU": torch.cuda.device_count()})]
    if search.recipe.cluster.resolved_address() or is_joined():
        with connected(search.recipe.cluster):
            nodes = connected_nodes()
    cpus, gpus = (sum(float(node.resources.get(name, 0)) for node in nodes) for name in ("CPU", "GPU"))
    trials = len(known) if known is not None else search.config.trials
    return divide(search.recipe, search.config.concurrency, trials, cpus, gpus, nodes)


def _folder(search: Search, start: SearchStart) -> RunFolder:
    output = search.recipe.output
    folder = choose_run(output, search.config.name, start.resume, start.run)
    if not start.resume and folder.facts():
        raise UserError(
            f"search {folder.name!r} exists in {output}: add --resume to continue it, or choose another --run"
        )
    if not start.resume:
        folder.set_aside_record()
    return folder


def _keep_search(plan: SearchPlan, folder: RunFolder, resume: bool) -> None:
    """Write `search.yaml`; on a resume refuse a change of a key that the finished trials depend on."""
    search = plan.search
    wanted = {
        "search": search.config.model_dump(mode="json"),
        "base": search.recipe.model_dump(mode="json"),
        "rows": plan.rows,
    }
    wanted = redact(wanted)
    before = parse_yaml(folder.read("search.yaml") or "{}", folder.location("search.yaml")) if resume else {}
    if not isinstance(before, dict) or not all(isinstance(before.get(part, {}), dict) for part in wanted):
        raise UserError(f"{folder.location('search.yaml')} is not a search: wanted keys and values; restore it")
    before = redact(before)
    check_same_rows(folder, list(before.get("rows", {})), list(plan.rows))
    of = {"search": "{}", "base": "{} of the base recipe", "rows": "row {}"}
    free = {"search": FREE_ON_RESUME + (("space",) * bool(plan.rows)), "base": ("cluster", "tracking", "output")}
    for part, name in of.items():
        for key in before.get(part, {}):
            old, new = before[part][key], wanted[part].get(key)
            if key not in free.get(part, ()) and old != new:
                raise UserError(
                    f"{folder.url} was started with another {name.format(key)} ({_short(old)}, now {_short(new)}): "
                    f"resume with the value in {folder.location('search.yaml')}, or start again without --resume"
                )
    data = data_facts(search.recipe.data, load_data(search.recipe.data))
    if resume:
        check_same_data(search.recipe.data.url, data, folder)
    weights = _first_weights(search.recipe.train.initial_places(), folder, resume)
    folder.note(search=search.config.name, data=asdict(data), weights=weights)
    folder.write("search.yaml", yaml.safe_dump(wanted, sort_keys=False))


def _first_weights(places: Mapping[str, str], folder: RunFolder, resume: bool) -> str:
    """Return what identifies the weights that the trials start from; refuse to resume with others."""
    found = "".join(open_weights(place).digest() for place in places.values())
    before = folder.facts().get("weights") if resume else None
    if before is not None and before != found:
        raise UserError(
            f"train.init_from={', '.join(places.values())} has other weights than when {folder.url} was started: "
            "restore them, or start a new search without --resume"
        )
    return found


def _check_trials_data(plan: SearchPlan, folder: RunFolder, record: SearchRecord) -> None:
    """Refuse to resume with trials whose own data, other than the base recipe's, have changed since they started."""
    for trial in record.trials:
        if any(key.startswith("data.") for key in trial.values):
            own = RunFolder(folder.location("trials"), trial_name(trial.number))
            recipe = build_recipe(with_values(plan.search.base, trial.values), source=plan.search.source)
            if own.facts().get("data"):
                check_same_data(recipe.data.url, data_facts(recipe.data, load_data(recipe.data)), own)


def check_same_rows(folder: RunFolder, before: Sequence[str], now: Sequence[str]) -> None:
    """Refuse rows that were added, removed or moved since a table was started: trials belong to rows by position."""
    if before and before != now:
        raise UserError(
            f"{folder.url} was started with the rows {', '.join(before)}, now they are {', '.join(now)}: restore "
            "their order, or start a new table without --resume"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _search(launch: SearchLaunch) -> dict[str, Any]:
    """Run the trials; return the outcome, with ``status`` finished, stopped or failed."""
    folder, recipe = launch.folder, launch.search.recipe
    _say_header(launch)
    params = {"search": launch.search.config.model_dump(mode="json"), "base": recipe.model_dump(mode="json")}
    datasets = tracked_data(recipe.data, load_data(recipe.data))
    run = Tracked(launch.tracking, params, _source_tag(launch), datasets=datasets)
    with ray_and_mlflow(recipe.cluster, folder, run, launch.background, launch.console.say) as (session, handle):
        if handle is not None:
            launch.tracker = open_tracker(handle, folder.local, system_metrics_node="")
        return {**_tune(launch, session, handle), "handle": handle}


def _say_header(launch: SearchLaunch) -> None:
    config, slots, console = launch.search.config, launch.slots, launch.console
    here = "in its own process" if slots.here else f"with {launch.search.recipe.cluster.workers} workers"
    console.say(
        f"{launch.folder.url}: {launch.total} trials of {launch.search.recipe.name} ({config.search.kind}, scheduler "
        f"{config.scheduler.kind}), {slots.concurrency} at a time, each {here} on {slots.share.cpus:.4g} CPUs"
    )
    if launch.start.resume:
        done = len(launch.record.ended())
        console.say(f"resuming {launch.folder.name}: {done} trials are done, {len(launch.waiting)} continue")


def _sampler(launch: SearchLaunch) -> Sampler:
    settings = launch.search.config.search
    if isinstance(settings, OptunaSearch):
        told = len(launch.record.trials)
        return OptunaSampler(launch.search, settings, launch.search.config.metrics, told)
    assert launch.plan.known is not None
    return FixedSampler(launch.plan.known, launch.plan.labels)


def _tune(launch: SearchLaunch, session: RaySession, handle: RunHandle | None) -> dict[str, Any]:
    """Run Ray Tune in a thread; this one prints progress and handles the user's signals."""
    control = ActorMonitor()
    coordinator = Coordinator(
        launch.record, launch.folder, _sampler(launch), partial(_prepare, launch), launch.waiting, launch.total
    )
    tracking = _Tracking(launch)
    tracking.send_rest()
    coordinator.listeners += [launch.console.news, tracking.news]
    _add_baseline(launch, coordinator)
    tuner = build_tuner(launch, coordinator, control.address, _trial_tracking(launch, handle))

    def stopping(line: str) -> None:
        coordinator.stopping = True
        launch.console.say(line)

    fit = Fit(ThreadPoolExecutor(1, "fit").submit(tuner.fit), control, session.ended)
    launch.console.open()
    with stop_on_signal(control.request_stop, stopping, STOPPING):
        for event in fit.events():
            if event["kind"] == "progress":
                launch.console.progress(event)
            if event["kind"] == "exchange":
                coordinator.exchanged(event["trial"], event["donor"], event["step"], event["values"])
            if event["kind"] == "polled":
                launch.console.refresh()
    launch.console.close()
    coordinator.close()
    tracking.send_rest()
    if not fit.lost:
        control.close()
    return {"status": "stopped" if coordinator.stopping else "finished", **fit.outcome}


def _prepare(launch: SearchLaunch, values: Values) -> tuple[int, int]:
    """Check a trial's recipe; return its parameters and optimizer steps."""
    recipe, model = launch.checker.recipe(values)
    return model.parameters, steps_of(recipe, model)[0]


def _add_baseline(launch: SearchLaunch, coordinator: Any) -> None:
    """Add the trials that are known before the search: the baseline of a study, and a whole population."""
    if launch.plan.known is None and launch.search.config.with_baseline and not launch.record.trials:
        values = baseline(launch.search)
        parameters, steps = coordinator.prepare(values)
        launch.record.trials.append(TrialRecord(number=0, values=values, parameters=parameters, total_steps=steps))
        coordinator.waiting.append(0)
    if launch.search.config.exchanges:
        while len(launch.record.trials) < launch.total:
            coordinator.waiting.append(coordinator.draw().number)
    save_record(launch.record, launch.folder)


def _trial_tracking(launch: SearchLaunch, handle: RunHandle | None) -> tuple[TrackingConfig, dict[str, str]]:
    """Return the settings and tags of the trials' MLflow runs: children of the search's."""
    config = launch.tracking.model_copy(update={"system_metrics": False})
    tags = {**_source_tag(launch), "perceiver.search": launch.folder.name}
    if handle is not None and handle.run_id is not None:
        tags["mlflow.parentRunId"] = handle.run_id
    return config, tags


def _source_tag(launch: SearchLaunch) -> dict[str, str]:
    return {"mlflow.source.name": " ".join(launch.start.command.split()[:2])}


class _Tracking:
    """Logs results of trials into the search's MLflow run, and closes the runs of failed trials."""

    def __init__(self, launch: SearchLaunch) -> None:
        self.launch = launch

    def news(self, what: str, trial: TrialRecord) -> None:
        """Log a trial's end."""
        if what not in ("finished", "stopped", "failed"):
            return
        record = self.launch.record
        if what == "failed":
            self.launch.background.submit(self._send, trial.number, "failed")
        if best := record.best():
            ended = len(record.ended())
            figures = {f"best/{name}": value for name, value in best.scores(list(record.metrics)).items()}
            trials = {f"trial/{name}": value for name, value in trial.scores(list(record.metrics)).items()}
            self.launch.tracker.log_metrics(ended, {**figures, **trials, "trials_ended": float(ended)})

    def send_rest(self) -> None:
        """Send what MLflow lacks of ended trials: their processes may end, or be killed, before all is sent."""
        for trial in self.launch.record.ended():
            if unsent(self._folder(trial.number)):
                self.launch.background.submit(self._send, trial.number, cast(Status, trial.status))

    def _folder(self, number: int) -> Path:
        return RunFolder(self.launch.trials_url, trial_name(number)).local

    def _send(self, number: int, status: Status) -> None:
        folder = self._folder(number)
        if load_handle(folder):
            reconcile(self.launch.tracking, folder, status=status)
