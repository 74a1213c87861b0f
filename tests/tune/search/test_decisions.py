"""Schedulers, ranking and the coordinator: decisions tested without processes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ray.train import Checkpoint
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search import Searcher

from cluster.record.run_folder import RunFolder
from cluster.runtime.ray_internals import can_take_turns
from perceiver.config import UserError
from tests.tune.searches import load, record, trial
from tune.config import SearchConfig
from tune.report.importance import Importance, importance
from tune.report.numbers import verdict
from tune.search.coordinator import Coordinator, CoordinatorCallback, CoordinatorSearcher, placed, reason
from tune.search.schedulers import ReplayedTrial, build_scheduler, clipped, replay, takes_turns
from tune.search.tuner import RecordedValues
from tune.search_record import (
    Evaluation,
    SearchRecord,
    TrialRecord,
    load_record,
    number_of,
    reopen,
    save_record,
    trial_name,
)
from tune.space.samplers import FixedSampler


def decide(scheduler: Any, number: int, epoch: float, score: float) -> str:
    past = ReplayedTrial(f"trial-{number}", {"number": number})
    if epoch == 1:
        scheduler.on_trial_add(None, past)
    return scheduler.on_trial_result(None, past, {"epoch": epoch, "accuracy": score})


def test_asha_keeps_the_best_share_and_the_baseline(tmp_path: Path, tree: dict[str, Any]) -> None:
    search = load(tmp_path, tree, "scheduler={kind: asha, grace: 1, reduction: 2}")
    scheduler = build_scheduler(search.config, 4.0, 2)
    assert decide(scheduler, 1, 1, 0.5) == "CONTINUE"
    assert decide(scheduler, 2, 1, 0.4) == "STOP"
    assert decide(scheduler, 0, 1, 0.1) == "CONTINUE", "the baseline"
    assert decide(scheduler, 3, 1, 0.6) == "CONTINUE"
    assert decide(scheduler, 3, 2, 0.7) == "CONTINUE"
    assert decide(scheduler, 1, 2, 0.6) == "STOP"
    assert decide(scheduler, 3, 4, 0.1) == "CONTINUE", "a trial at its end comes to it by itself"
    assert search.config.scheduler.rungs(4.0) == [1.0, 2.0]  # type: ignore[union-attr]


def test_median_spares_the_baseline_and_never_pauses(tmp_path: Path, tree: dict[str, Any]) -> None:
    search = load(tmp_path, tree, "scheduler={kind: median, grace: 1, min_trials: 2}")
    scheduler = build_scheduler(search.config, 4.0, 2)
    pasts = {number: ReplayedTrial(f"trial-{number}", {"number": number}) for number in range(4)}

    class Busy:
        def get_live_trials(self) -> list[Any]:
            return [ReplayedTrial("waiting", {"number": 9}, status="PENDING")]

    def tell(number: int, epoch: float, score: float) -> str:
        return scheduler.on_trial_result(Busy(), pasts[number], {"epoch": epoch, "accuracy": score})

    assert [tell(number, 1, score) for number, score in ((1, 0.5), (2, 0.6))] == ["CONTINUE", "CONTINUE"]
    assert tell(3, 1, 0.1) == "STOP"
    assert [tell(0, epoch, 0.1) for epoch in (1, 2)] == ["CONTINUE", "CONTINUE"]


def test_median_does_without_a_trial_that_was_never_evaluated(tmp_path: Path, tree: dict[str, Any]) -> None:
    """A refused trial ends with a result without an epoch, which Ray's rule would need later."""
    search = load(tmp_path, tree, "scheduler={kind: median, grace: 1, min_trials: 2}")
    scheduler = build_scheduler(search.config, 4.0, 2)
    refused = ReplayedTrial("trial-3", {"number": 3})
    scheduler.on_trial_complete(None, refused, {"done": True, "ending": "refused", "error": "the loss is nan"})
    for number in (1, 2):
        assert decide(scheduler, number, 1, 0.5) == "CONTINUE"


class SavedTrial(Trial):
    """A trial whose first checkpoint is set by the test, and a later one by an exchange."""

    saved: Checkpoint | None = None

    @property
    def checkpoint(self) -> Checkpoint | None:
        return super().checkpoint or self.saved


class Controller:
    """A stand-in for Ray's controller: runs the trials that the scheduler chooses."""

    def __init__(self, config: SearchConfig, concurrency: int, coordinator: Any = None) -> None:
        self.scheduler = build_scheduler(config, 4.0, concurrency, coordinator)
        configs = [{"number": number, "values": {"optim.lr": 0.01}} for number in range(4)]
        self.trials: list[Any] = [SavedTrial("x", stub=True, config=config) for config in configs]
        self.live, self.search_alg = set(self.trials), None
        for number, one in enumerate(self.trials):
            one.custom_trial_name = trial_name(number)
            self.scheduler.on_trial_add(self, one)

    def get_trials(self) -> list[Any]:
        return self.trials

    def get_live_trials(self) -> set[Any]:
        return self.live

    def _schedule_trial_save(self, one: Any, result: Any) -> Any:
        return one.checkpoint

    def stop_trial(self, one: Any) -> None:
        one.set_status("TERMINATED")
        self.live.discard(one)

    def start(self) -> list[int]:
        """Start what the scheduler chooses; return the numbers of the trials that then run."""
        while chosen := self.scheduler.choose_trial_to_run(self):
            chosen.set_status("RUNNING")
        return [number_of(str(one)) for one in self.trials if one.status == "RUNNING"]

    def tell(self, number: int, epoch: float) -> None:
        """Evaluate a running trial, and pause it if the scheduler decides so."""
        one = self.trials[number]
        one.saved = Checkpoint(f"/{number}")
        result = {"epoch": epoch, "accuracy": 0.1 * number}
        if self.scheduler.on_trial_result(self, one, result) == "PAUSE":
            one.set_status("PAUSED")


@pytest.fixture
def population(tmp_path: Path, tree: dict[str, Any]) -> SearchConfig:
    return load(tmp_path, {**tree, "scheduler": {"kind": "pbt"}, "trials": 4}).config


def test_a_population_takes_turns_and_exchanges_at_each_round(population: SearchConfig) -> None:
    controller = Controller(population, 2)
    for epoch in (1.0, 2.016):
        assert controller.start() == [0, 1], "two at a time"
        controller.tell(0, epoch)
        controller.tell(1, epoch)
        assert controller.start() == [2, 3]
        controller.tell(2, epoch)
        assert controller.start() == [3], "the others wait for it"
        controller.tell(3, epoch)
        assert controller.trials[0].checkpoint.path == "/3" and str(controller.trials[0]) == "trial-000"
    controller.start()
    controller.tell(0, 4.0)
    assert controller.trials[0].status == "RUNNING", "at its end it has nothing to wait for"


@pytest.mark.parametrize("ending", ["ERROR", "TERMINATED"])
def test_a_population_does_not_wait_for_a_trial_that_is_over(population: SearchConfig, ending: str) -> None:
    """Ray would: it checks whether all have arrived only at a result, and counts a failed trial among them."""
    controller = Controller(population, 2)
    controller.start()
    controller.tell(0, 1.0)
    controller.tell(1, 1.0)
    controller.start()
    controller.tell(2, 1.0)
    controller.trials[3].set_status(ending)
    if ending == "TERMINATED":
        controller.live.discard(controller.trials[3])
    assert controller.start() == [0, 1] and controller.trials[0].checkpoint.path == "/2"
    controller.tell(0, 2.0)
    controller.tell(1, 2.0)
    assert controller.start() == [2]


def test_a_stopped_population_leaves_waiting_trials_for_a_resume(tmp_path: Path, population: SearchConfig) -> None:
    coordinator = make_coordinator(tmp_path, total=4)
    while len(coordinator.record.trials) < 4:
        coordinator.draw()
    controller = Controller(population, 2, coordinator)
    assert controller.start() == [0, 1]
    for number in (0, 1):
        coordinator.started(number)
    controller.tell(0, 1.0)
    coordinator.stopping = True
    assert controller.start() == [1]
    assert [one.status for one in controller.trials] == ["TERMINATED", "RUNNING", "TERMINATED", "TERMINATED"]
    coordinator.over(0)
    assert coordinator.record.trial(0).status == "unfinished", "it continues with --resume"


def test_a_resumed_search_compares_new_trials_with_old_ones(tmp_path: Path, tree: dict[str, Any]) -> None:
    search = load(tmp_path, tree, "scheduler={kind: asha, grace: 1, reduction: 2}")
    scheduler = build_scheduler(search.config, 4.0, 2)
    replay(
        scheduler, "accuracy", [trial(1, "finished", 0.5, 0.6, 0.7, 0.8), trial(2, "stopped", 0.4), trial(3, "failed")]
    )
    assert decide(scheduler, 4, 1, 0.42) == "STOP"
    assert decide(scheduler, 5, 1, 0.55) == "CONTINUE"


def test_without_private_names_a_population_runs_at_once_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, population: SearchConfig
) -> None:
    monkeypatch.setenv("PERCEIVER_PUBLIC_API", "1")
    assert type(build_scheduler(population, 4.0, 4)) is PopulationBasedTraining
    with pytest.raises(UserError, match="trials = 4, concurrency = 2.* 2,"):
        build_scheduler(population, 4.0, 2)


def test_changed_values_stay_in_their_ranges(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["scheduler"] = {"kind": "pbt"}
    search = load(tmp_path, tree)
    assert clipped(search.config, {"optim.lr": 0.12}) == {"optim.lr": 0.1}
    assert clipped(search.config, {"optim.lr": 1e-4}) == {"optim.lr": 1e-3}
    assert takes_turns(search.config, 2) and not takes_turns(search.config, 4)
    assert search.recipe.train.eval_every == search.recipe.train.checkpoint_every == 1
    assert search.recipe.train.keep_checkpoints >= 4, "another trial's turn may come a round later"


@pytest.mark.parametrize("kind", ["pbt", "pb2"])
def test_weights_may_be_exchanged_at_each_evaluation(
    tmp_path: Path, tree: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 31.25 steps per epoch, evaluations come after 32 and 63 steps: less than an epoch apart."""
    tree["scheduler"] = {"kind": kind, "interval": 1}
    tree["space"] = {"optim.lr": {"kind": "uniform", "low": 1e-3, "high": 1e-2}}
    monkeypatch.setattr("tune.search.schedulers.population_class", lambda base, **_: dict)  # keep its arguments
    scheduler: Any = build_scheduler(load(tmp_path, tree).config, 4.0, 2)
    assert scheduler["perturbation_interval"] < 2.016 - 1.024


@pytest.mark.parametrize("name", ["_trial_state", "_synch", "_next_perturbation_sync", "_perturbation_interval"])
def test_a_population_takes_no_turns_if_ray_has_renamed_what_that_needs(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base = PopulationBasedTraining
    assert can_take_turns(base) and not can_take_turns(object)
    started = base.__init__

    def renamed(self: Any, *args: Any, **options: Any) -> None:
        started(self, *args, **options)
        vars(self)[f"{name}_renamed"] = vars(self).pop(name)

    monkeypatch.setattr(base, "__init__", renamed)
    assert not can_take_turns(base)


def test_the_best_is_the_best_of_those_that_finished(tmp_path: Path) -> None:
    found = record(
        trial(0, "finished", 0.5, 0.8),
        trial(1, "stopped", 0.95),
        trial(2, "finished", 0.9, 0.85),
        trial(3, "failed", 0.99),
        trial(4, "finished", 0.9, float("nan")),
    )
    assert [t.number for t in found.ranked()] == [2, 0, 3, 1]
    low = record(trial(0, "finished", 0.5, metric="loss"), trial(1, "finished", 0.4, metric="loss"), loss="min")
    best = low.best()
    assert best is not None and best.number == 1


def test_a_pareto_front_has_the_unbeaten_trials() -> None:
    found = record(
        trial(0, "finished", 0.9, parameters=100),
        trial(1, "finished", 0.8, parameters=50),
        trial(2, "finished", 0.7, parameters=60),
        trial(3, "stopped", 0.99, parameters=1),
        accuracy="max",
        parameters="min",
    )
    assert [t.number for t in found.front()] == [0, 1]


def test_the_verdict_is_honest() -> None:
    worse = record(trial(0, "finished", 0.5, 0.9), trial(1, "finished", 0.5, 0.8))
    assert verdict(worse, 0, 1000).endswith("base recipe (trial 0) at the same 2 epochs")
    near = record(trial(0, "finished", 0.5, 0.955), trial(1, "finished", 0.5, 0.96))
    assert "less than the 1.8 points" in verdict(near, 0, 1000)
    clear = record(trial(0, "finished", 0.5, 0.9), trial(1, "finished", 0.5, 0.96))
    assert "the gain is more than" in verdict(clear, 0, 1000)
    shorter = record(trial(0, "finished", 0.5), trial(1, "finished", 0.5, 0.96))
    assert "after 1 instead of 2 epochs" in verdict(shorter, 0, 1000)


def test_importance_finds_the_key_that_matters(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["space"]["model.latents"] = {"kind": "choice", "values": [2, 4]}
    search = load(tmp_path, tree)
    trials = [
        trial(n, "finished", 0.5 + 0.05 * n, values={"optim.lr": 1e-3 * 1.6**n, "model.latents": 2 + 2 * (n % 2)})
        for n in range(9)
    ]
    trials[4].evaluations += trial(4, "finished", 0.0, 0.0).evaluations[1:]  # later than what all have in common
    found = importance(record(*trials), search.config.space, search.resolved)
    assert isinstance(found, Importance) and next(iter(found.shares)) == "optim.lr" and found.shares["optim.lr"] > 0.7
    assert (found.trials, found.epoch) == (9, 1)
    assert "3 comparable trials" in importance(record(*trials[:3]), search.config.space, search.resolved)  # type: ignore[operator]


def make_coordinator(tmp_path: Path, total: int = 3, waiting: tuple[int, ...] = ()) -> Coordinator:
    def prepare(values: dict[str, Any]) -> tuple[int, int]:
        if values["optim.lr"] == 2:
            raise UserError("optim.lr = 2 is too much")
        return 1000, 10

    source = FixedSampler([{"optim.lr": number + 1} for number in range(total)])
    return Coordinator(record(), RunFolder(str(tmp_path), "hunt-001"), source, prepare, list(waiting), total)


def test_the_desk_keeps_every_change_on_disk(tmp_path: Path) -> None:
    coordinator = make_coordinator(tmp_path)
    heard: list[tuple[str, int]] = []
    coordinator.listeners.append(lambda what, t: heard.append((what, t.number)))
    first = coordinator.next_trial()
    assert first is not None and first.number == 0
    coordinator.started(0)
    coordinator.result(
        0, {"step": 5, "epoch": 1.0, "evaluation": {"accuracy": 0.5}, "seconds": 2.0, "throughput": 80.0}
    )
    coordinator.broke(0, "a worker died", again=True)
    coordinator.result(0, {"step": 5, "epoch": 1.0, "evaluation": {"accuracy": 0.6}, "seconds": 1.0})
    coordinator.result(0, {"step": 10, "epoch": 2.0, "evaluation": {"accuracy": 0.7}, "seconds": 2.0})
    coordinator.result(0, {"ending": "finished", "seconds": 1.0})
    coordinator.over(0)
    second = coordinator.next_trial()
    assert second is not None and second.number == 2, "trial 1 cannot be trained: recorded, and the next one drawn"
    coordinator.started(2)
    coordinator.result(2, {"step": 5, "epoch": 1.0, "evaluation": {"accuracy": 0.1}, "seconds": 2.0})
    coordinator.over(2)
    assert coordinator.next_trial() is None
    coordinator.close()
    kept = load_record(coordinator.folder)
    assert [t.status for t in kept.trials] == ["finished", "failed", "stopped"]
    assert kept.trials[1].reason == "optim.lr = 2 is too much"
    assert [(e.step, e.metrics["accuracy"]) for e in kept.trials[0].evaluations] == [(5, 0.6), (10, 0.7)]
    assert kept.trials[0].seconds == 6 and kept.worker_seconds() == 8
    assert heard[0] == ("started", 0) and ("failed", 1) in heard and heard[-1] == ("stopped", 2)


def test_a_stop_starts_no_trial_and_open_ones_resume(tmp_path: Path) -> None:
    coordinator = make_coordinator(tmp_path)
    coordinator.next_trial()
    coordinator.started(0)
    coordinator.stopping = True
    assert coordinator.next_trial() is None
    coordinator.result(0, {"ending": "stopped", "seconds": 1.0})
    coordinator.over(0)
    coordinator.close()
    kept = load_record(coordinator.folder)
    assert reopen(kept) == [0]
    again = Coordinator(kept, coordinator.folder, coordinator.sampler, coordinator.prepare, [0], 3)
    trials = [again.next_trial(), again.next_trial(), again.next_trial()]
    assert [t.number if t else None for t in trials] == [0, 2, None]


def test_a_trial_waits_for_those_it_starts_from_and_gets_their_places(tmp_path: Path) -> None:
    coordinator = make_coordinator(tmp_path, total=5)
    coordinator.origins = {3: {"branches.audio": 0, "branches.video": 2}, 4: {"branches.audio": 1}}
    searcher = CoordinatorSearcher(coordinator)
    assert [searcher.suggest(name)["number"] for name in ("a", "b")] == [0, 2]
    coordinator.result(0, {"ending": "finished", "seconds": 1.0})
    assert searcher.suggest("c") is None and len(coordinator.record.trials) == 3, "trial 2 has not ended: ask again"
    coordinator.result(2, {"ending": "finished", "seconds": 1.0})
    found = searcher.suggest("c")
    trials = f"{tmp_path}/hunt-001/trials"
    places = {"branches.audio": f"{trials}/trial-000", "branches.video": f"{trials}/trial-002"}
    assert found["number"] == 3 and found["values"] == {"optim.lr": 4, "train.init_from": places}
    assert searcher.suggest("d") == Searcher.FINISHED
    failed = coordinator.record.trial(4)
    assert failed.status == "failed" and "starts from trial 1" in failed.reason and "has failed" in failed.reason


def test_a_record_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "hunt-001")
    with pytest.raises(UserError, match=r"trials\.json.*--resume"):
        load_record(folder)
    save_record(SearchRecord(metrics={"accuracy": "max"}, workers=1, format=9), folder)
    with pytest.raises(UserError, match="format 9"):
        load_record(folder)


@pytest.mark.parametrize(
    "keys, value",
    [
        ((), []),
        (("metrics",), {}),
        (("metrics",), {"accuracy": "best"}),
        (("workers",), 0),
        (("workers",), True),
        (("seconds",), float("nan")),
        (("trials",), {}),
        (("trials", 0, "number"), 1),
        (("trials", 1, "number"), "1"),
        (("trials", 0, "status"), "asleep"),
        (("trials", 0, "seconds"), -1.0),
        (("trials", 0, "parameters"), 1 << 80),
        (("trials", 0, "evaluations"), [{"step": -1, "epoch": 0, "metrics": {}, "at": 0}]),
        (("trials", 0, "evaluations"), [{"step": 1, "epoch": 0, "metrics": {"a": "b"}, "at": 0}]),
        (("trials", 0, "exchanges"), [{"donor": 2, "step": 1, "values": {}}]),
        (("trials", 0, "values"), None),
    ],
)
def test_a_record_with_values_out_of_range_is_one_line_with_the_key(
    tmp_path: Path, keys: tuple[Any, ...], value: Any
) -> None:
    folder = RunFolder(str(tmp_path), "hunt-001")
    trials = [TrialRecord(number=number, values={}) for number in range(2)]
    save_record(SearchRecord(metrics={"accuracy": "max"}, workers=1, trials=trials), folder)
    assert len(load_record(folder).trials) == 2
    tree: Any = {"": json.loads(folder.read("trials.json") or "")}
    node = tree
    for key in ("", *keys)[:-1]:
        node = node[key]
    node[("", *keys)[-1]] = value
    folder.write("trials.json", json.dumps(tree[""]))
    with pytest.raises(UserError, match=rf"trials\.json is damaged: {'.'.join(map(str, keys[:1]))}") as caught:
        load_record(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[" * 99_999, '{"format": 1, "format": 1}'])
def test_a_record_that_is_no_json_is_one_line(tmp_path: Path, text: str) -> None:
    folder = RunFolder(str(tmp_path), "hunt-001")
    folder.write("trials.json", text)
    with pytest.raises(UserError, match=r"trials\.json is not valid JSON"):
        load_record(folder)


def test_a_metric_that_is_nan_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "hunt-001")
    trial = TrialRecord(number=0, values={})
    trial.add(Evaluation(step=1, epoch=1.0, metrics={"accuracy": math.nan}, at=0.0))
    save_record(SearchRecord(metrics={"accuracy": "max"}, workers=1, trials=[trial]), folder)
    assert math.isnan(load_record(folder).trials[0].evaluations[0].metrics["accuracy"])


def test_the_reason_of_a_refusal_outlives_the_process_that_refused(tmp_path: Path) -> None:
    """With several workers the trial ends its own process; that alone would not explain the refusal."""
    coordinator = make_coordinator(tmp_path)
    coordinator.next_trial()
    coordinator.started(0)
    RunFolder(coordinator.folder.location("trials"), "trial-000").note(refusal="the loss is nan")
    coordinator.broke(0, "the trial's process died", again=False)
    assert coordinator.record.trial(0).reason == "the loss is nan"


def test_paths_mean_the_same_in_any_folder() -> None:
    values = {"data.url": "a", "train.init_from": "b", "data.mixture": [{"url": "c", "weight": 1}], "optim.kind": "d"}
    found = placed(values)
    here = str(Path.cwd())
    assert found["data.url"] == f"{here}/a" and found["train.init_from"] == f"{here}/b"
    assert found["data.mixture"] == [{"url": f"{here}/c", "weight": 1}] and found["optim.kind"] == "d"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Failure # 1 (x)\nValueError: old\nFailure # 2 (y)\nray...\nRuntimeError: worker 0: bad\n", "worker 0: bad"),
        ("Failure # 1 (x)\nTask was killed due to the node running low on memory.\n", "out of memory"),
        ("", "the trial's process died"),
        ("NODE_OUT_OF_MEMORY: the worker's node ran out\n", "out of memory"),
        ("ray.exceptions.OutOfMemoryError: Task was killed\n", "out of memory"),
        ("UserError: /data/BEDROOM/x does not exist\n", "UserError: /data/BEDROOM/x does not exist"),
        (
            "ray.exceptions.RayTaskError(OutOfMemoryError): ray::x\ntorch.OutOfMemoryError: CUDA out of memory.\n",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
    ],
)
def test_the_reason_of_a_failure_is_one_line(text: str, wanted: str) -> None:
    assert reason(text).startswith(wanted)


def test_objects_for_tune_are_pickled_without_the_record(tmp_path: Path) -> None:
    """Tune serializes it at its start; a coordinator has locks and caches."""
    from ray import cloudpickle

    coordinator = make_coordinator(tmp_path)
    for held in (CoordinatorSearcher(coordinator), CoordinatorCallback(coordinator), RecordedValues(coordinator)):
        assert b"optim.lr" not in cloudpickle.dumps(held)
