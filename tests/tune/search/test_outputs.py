"""What a search prints and writes: table, lines, report, best recipe, estimate, exchanged checkpoints."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from cluster.recipe.config import build_recipe
from cluster.record.run_folder import RunFolder
from cluster.run.console import duration
from perceiver.config import UserError
from perceiver.train.checkpoint.store import CheckpointStore
from tests.perceiver.report.pages import Page
from tests.perceiver.train.toy import toy_engine
from tests.tune.searches import load, record, trial, write_search
from tune.config import Asha
from tune.report.numbers import short_keys
from tune.report.page import search_page
from tune.search import conclude
from tune.search.conclude import best_recipe
from tune.search.console import SearchConsole, news_line
from tune.search.dry_run import estimate, kept_share, say_estimate
from tune.search.exchange import copy_checkpoint, pointer_of, take_over
from tune.search.launch import check_same_rows, launch_search
from tune.search.resources import divide
from tune.search_record import Exchange, save_record


def some_trials() -> Any:
    found = record(
        trial(0, "finished", 0.5, 0.9, seconds=61.0, samples_per_s=812.0),
        trial(1, "stopped", 0.4, seconds=20.0),
        trial(2, "running", 0.6, seconds=10.0),
        trial(3, "failed", reason="out of memory <b>"),
        trial(4, "finished", 0.6, 0.95, values={"optim.lr": 0.05, "model.latents": 8}),
        trial(5, "finished", 0.5, 0.91),
    )
    found.trials[4].exchanges.append(Exchange(donor=2, step=10, values={"optim.lr": 0.05}))
    return found


def test_the_table_has_each_trial_and_a_log_has_plain_lines() -> None:
    sink = io.StringIO()
    console = SearchConsole(some_trials(), Console(file=sink, width=160, force_terminal=False))
    console.progress({"trial": 2, "epoch": 1.6, "throughput": 777.0})
    console.console.print(console.table())
    text = sink.getvalue()
    assert "3 finished, 1 stopped, 1 running, 1 failed; best trial 4: accuracy 95.0 %" in text
    running = next(line for line in text.splitlines() if " running " in f" {line} " and "1.6" in line)
    assert "777" in running and "60.0 %" in running
    console.news("finished", console.record.trials[0])
    assert sink.getvalue().splitlines()[-1] == "trial 0 finished after 2 epochs: accuracy 90.0 %"


def test_a_terminal_gets_a_live_table() -> None:
    sink = io.StringIO()
    with SearchConsole(some_trials(), Console(file=sink, width=160, force_terminal=True)) as console:
        console.open()
        console.refresh()
        console.say("a line above it")
    assert "samples/s" in sink.getvalue() and "a line above it" in sink.getvalue()


def test_news_in_words() -> None:
    found = some_trials()
    lines = {what: news_line(what, found.trials[3], found) for what in ("failed", "again", "started", "other")}
    assert lines["failed"] == "trial 3 failed: out of memory <b>"
    assert lines["again"].endswith("restarts from its checkpoint")
    assert lines["started"].startswith("trial 3 starts") and lines["other"] == ""
    assert "trial 2's weights of step 10" in news_line("exchanged", found.trials[4], found)


def test_the_report_is_one_page_with_every_section(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["space"]["model.latents"] = {"kind": "choice", "values": [4, 8]}
    tree["overrides"] = {"tracking": {"uri": "https://me:hush@host"}}
    search = load(tmp_path, tree)
    found = some_trials()
    for one in found.trials:
        one.values = {"model.latents": 4, **one.values}
    page = search_page(
        "hunt-001",
        found,
        search,
        eval_samples=40,
        facts={"cost": "91 worker-seconds", "data": "s3://me:hush@bucket"},
        commands={"train it": "perceiver train runs/hunt-001/best.yaml"},
        best_recipe="name: hunt-best\n",
    )
    assert "95.0 %" in page and "best accuracy, trial 4" in page and "Best trial 4" in page
    assert page.count("<svg") == 4, "curves, best so far, importance, parallel coordinates"
    assert "out of memory &lt;b&gt;" in page and "continued from" in page and "91 worker-seconds" in page
    assert "The importance of the keys is not computed" not in page
    assert "hush" not in page and "<script" not in page and "http://www.w3.org" in page
    assert Page(page).fetched() == []


def test_a_report_of_two_metrics_has_the_front(tmp_path: Path, tree: dict[str, Any]) -> None:
    found = record(
        trial(0, "finished", 0.9, parameters=100),
        trial(1, "finished", 0.8, parameters=50),
        accuracy="max",
        parameters="min",
    )
    page = search_page("hunt-001", found, load(tmp_path, tree))
    assert "accuracy against parameters" in page
    assert "2 comparable trials, wanted 4" in page


def test_the_best_recipe_is_the_base_with_the_values(tmp_path: Path, tree: dict[str, Any]) -> None:
    search = load(tmp_path, tree, "train.epochs=3")
    found = record(trial(0, "finished", 0.9), trial(1, "finished", 0.95, values={"optim.lr": 0.0123}))
    text = best_recipe(search, found.trials[1], found, "runs/hunt-001")
    recipe = build_recipe(yaml.safe_load(text))
    assert recipe.name == "hunt-best" and recipe.optim.lr == 0.0123 and recipe.train.epochs == 3
    assert recipe.model_copy(update={"name": "small", "optim": search.recipe.optim}) == search.recipe
    assert "accuracy 95.0 %" in text.splitlines()[1]


def test_an_estimate_names_its_basis_or_is_unknown(tmp_path: Path, tree: dict[str, Any]) -> None:
    search = load(tmp_path, tree)
    slots = divide(search.recipe, None, 4, 2)
    assert estimate(search, slots, 1000, 4) is None
    assert "unknown" in say_estimate(None)
    run = RunFolder(search.recipe.output, "small-001")
    run.write("checkpoints/step-00000010/manifest.json", "{}")
    run.write("checkpoints/step-00000010/history.jsonl", json.dumps({"step": 10, "train/samples_per_s": 200.0}) + "\n")
    found = estimate(search, slots, 1000, 4)
    assert found is not None and found.longest == 2 * (1000 / 100 + 5)
    assert "200 samples/s of" in say_estimate(found) and "shared by 2 trials" in say_estimate(found)
    save_record(record(trial(0, "finished", 0.9, samples_per_s=50.0)), RunFolder(search.recipe.output, "hunt-001"))
    found = estimate(search, slots, 1000, 4)
    assert found is not None and found.longest == 2 * (1000 / 50 + 5)


def test_a_dry_run_prints_the_plan_and_starts_nothing(
    tmp_path: Path, tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tree |= {"scheduler": {"kind": "asha", "grace": 1, "reduction": 2}, "overrides": {"train.epochs": 5}}
    before = set(tmp_path.rglob("*"))
    assert launch_search(write_search(tmp_path, tree), ["trials=3"], dry_run=True) == 0
    text = capsys.readouterr().out
    assert "hunt: 3 trials of small, search random, scheduler asha" in text and "25 steps of 16 samples" in text
    assert "rungs at epoch 1, 2, 4: 1 in 2 continues" in text and "expected time: unknown" in text
    assert "trial 0  optim.lr=0.01  (the base recipe)" in text and "trial 2  " in text and "trial 3" not in text
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "hunt.yaml"}


def test_a_table_resumes_with_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "reads-small-001")
    check_same_rows(folder, ["one", "two"], ["one", "two"])
    for now in (["two", "one"], ["one", "two", "three"], ["one"]):
        with pytest.raises(UserError, match="rows one, two, now"):
            check_same_rows(folder, ["one", "two"], now)


def test_a_copy_that_fails_leaves_the_taker_its_own(tmp_path: Path) -> None:
    from tests.perceiver.train.checkpoint.test_store import snapshot

    giver, taker = (RunFolder(str(tmp_path), name) for name in ("trial-000", "trial-001"))
    for folder, step in ((giver, 20), (taker, 30)):
        folder.checkpoints.save(toy_engine(), snapshot(step))
    with pytest.raises(UserError, match="step-00000021"):
        copy_checkpoint(giver.checkpoints, taker.checkpoints, 21)
    assert taker.checkpoints.steps() == [30] and not taker.checkpoints.problems(30)


def test_the_share_that_halving_leaves(tmp_path: Path, tree: dict[str, Any]) -> None:
    search = load(tmp_path, tree, "train.epochs=9", "scheduler={kind: asha, grace: 1, reduction: 3}", "trials=9")
    assert isinstance(search.config.scheduler, Asha)
    assert kept_share(search, 9) == (9 * 1 + 3 * 2 + 1 * 6) / 81
    assert kept_share(load(tmp_path, tree), 4) == 1


def test_weights_move_with_a_pointer_and_only_once(tmp_path: Path) -> None:
    """The target store then has exactly the donor's checkpoint, byte for byte."""
    from tests.perceiver.train.checkpoint.test_store import snapshot

    giver, taker = (RunFolder(str(tmp_path), name) for name in ("trial-000", "trial-001"))
    engines = {name: toy_engine() for name in ("giver", "taker")}
    giver.checkpoints.save(engines["giver"], snapshot(20))
    taker.checkpoints.save(engines["taker"], snapshot(30))
    pointer = pointer_of(giver, 0, {"optim.lr": 1}, {"step": 20, "at": 1.0})
    pointer.write(str(tmp_path))
    pointer = type(pointer).read(str(tmp_path))
    assert take_over(taker, pointer) == 20
    assert taker.checkpoints.steps() == [20] and not taker.checkpoints.problems(20)
    store: CheckpointStore = taker.checkpoints
    for name in store.manifest(20).files:
        assert Path(store.folder(20), name).read_bytes() == Path(giver.checkpoints.folder(20), name).read_bytes()
    assert take_over(taker, pointer) is None, "a trial that failed after it continues from its own checkpoints"

    giver.checkpoints.save(engines["giver"], snapshot(40))
    giver.checkpoints.prune([40])
    late = pointer_of(giver, 0, {}, {"step": 20, "at": 2.0})
    assert take_over(taker, late) == 40, "the step it names is no longer kept"


def test_keys_and_times_in_words() -> None:
    assert short_keys(["optim.lr", "model.a.lr", "seed"]) == ["optim.lr", "a.lr", "seed"]
    assert short_keys(["optim.lr", "model.latents"]) == ["lr", "latents"]
    assert [duration(s) for s in (5, 65, 3700)] == ["0:05", "1:05", "1:01:40"]


def test_the_report_has_every_spelling_of_a_list(tmp_path: Path, tree: dict[str, Any]) -> None:
    """The page once failed on a base value of [16.0, 16.0] next to a choice of [16, 16]."""
    key = "model.inputs.positions.max_resolution"
    tree["overrides"] = {key: [16, 16]}
    tree["space"] = {key: {"kind": "choice", "values": [[16, 16], [8, 8]]}}
    search = load(tmp_path, tree)
    values = ([16.0, 16.0], [8.0, 8.0], [16, 16])
    found = record(*(trial(n, "finished", 0.5 + n / 10, values={key: value}) for n, value in enumerate(values)))
    assert "[8.0, 8.0]" in Page(search_page("hunt-001", found, search)).text


def test_a_lost_report_is_in_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    launch: Any = SimpleNamespace(
        record=some_trials(), start=SimpleNamespace(as_json=False), console=SimpleNamespace(shell=True)
    )
    for name, result in {
        "settle": "finished",
        "_write_best": "best.yaml",
        "finish_run": None,
        "_say_results": None,
    }.items():
        monkeypatch.setattr(conclude, name, lambda *_, result=result: result)
    for code, report, wanted in ((0, "report.html", 0), (0, None, 1), (130, None, 130)):
        monkeypatch.setattr(conclude, "_report", lambda *_, report=report: report)
        monkeypatch.setattr(conclude, "say_ending", lambda *_, code=code: code)
        assert conclude.conclude(launch, {"status": "finished"}) == wanted
