"""The papers' tables: their files, what is refused, the statistics, and the outputs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.recipe.config import build_recipe
from cluster.recipe.preflight import check_worker_range
from perceiver.accounting import account, count_input_positions
from perceiver.config import UserError
from perceiver.presets import PRESETS
from tests.perceiver.report.pages import Page
from tests.tune.commands import all_gone, left_behind, run
from tests.tune.commands import trials as recorded
from tests.tune.searches import trial
from tune.search.checks import Checker
from tune.search_file import recipe_path
from tune.search_record import TrialRecord
from tune.space.space import with_values
from tune.tables.config import TableConfig, load_table, tables
from tune.tables.launch import TableRun, build_rows, check_rows, read_rows, reproduce
from tune.tables.outputs import HEAD, TableReport, aligned, cells, head, markdown, short, write_json, write_page
from tune.tables.results import Cost, RowResult, judge, results, seed_noise

NAMES = (
    "imagenet",
    "permuted-imagenet",
    "audioset",
    "audioset-io",
    "modelnet40",
    "ablation-latents",
    "ablation-cross-attends",
    "ablation-sharing",
    "positions",
)
AUDIOSET = {"small": 10, "full": 527}
CLASSES = {"audioset": AUDIOSET, "audioset-io": AUDIOSET, "modelnet40": {"small": 10, "full": 40}}


@pytest.fixture
def paper(tmp_path: Path, tree: dict[str, Any], images: str) -> dict[str, Any]:
    """Return a table's tree: two rows on small images, one that is not run; its base recipe is in the same folder."""
    scale = {"recipe": "small.yaml", "data": "images", "prepare": "perceiver prepare image_folder photos data/photos"}
    rows = [
        {"name": "one", "label": "one | read", "paper": 76.7, "small": {}, "full": {}},
        {"name": "two", "label": "two reads", "paper": 78.0, "small": {"model.cross_attends": 2}, "note": "a note"},
        {"name": "three", "label": "three reads", "paper": 70.0},
    ]
    claims = [{"text": "two are better", "better": "two", "than": "one"}]
    return {
        "name": "reads",
        "title": "Reads",
        "source": "a paper, Table 1",
        "figure": "top-1, %",
        "claims": claims,
        "small": {**scale, "seeds": 2, "overrides": {"train.epochs": 1}},
        "full": scale,
        "rows": rows,
    }


def write(folder: Path, tree: dict[str, Any]) -> str:
    path = folder / "reads.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def rows_of(path: str, *overrides: str) -> tuple[TableRun, dict[str, Cost]]:
    rows, search_keys, base, where = read_rows(load_table(path), "small", None, overrides)
    return rows, check_rows(Checker(build_rows(rows, search_keys, base, where)), rows)


def finished(number: int, seed: int, score: float, **facts: Any) -> TrialRecord:
    return trial(number, "finished", score, values={"seed": seed}, seconds=60.0, **facts)


def test_every_table_of_the_papers_exists_and_lists_open_settings() -> None:
    assert set(NAMES) <= set(tables())
    assert all(load_table(name).config.open for name in NAMES)


@pytest.mark.parametrize("scale", ["small", "full"])
@pytest.mark.parametrize("name", sorted(tables()))
def test_each_row_is_a_recipe_that_builds(name: str, scale: Any) -> None:
    """Without data: keys, types, and a model for the classes of the paper's data or of the small one's.

    Each part that gets weights and each parameter that is frozen is one of the row's own model.
    """
    import torch

    from perceiver.factory import build_model
    from perceiver.optim.freezing import freeze

    table = load_table(name)
    rows, _, base, where = read_rows(table, scale, None, [])
    assert where == recipe_path(table.config.scale(scale).recipe, table.path) and rows.run
    parameters = {}
    for row in rows.run:
        recipe = build_recipe(with_values(base, rows.values(row)), source=row.name)
        with torch.device("meta"):
            model = build_model(recipe.model, classes=CLASSES.get(name, {"small": 10, "full": 1000})[scale])
        parameters[row.name] = sum(p.numel() for p in model.parameters())
        freeze(model, recipe.train.freeze)
        start = recipe.train.init_from if isinstance(recipe.train.init_from, dict) else {}
        assert {*start, *row.start} <= dict(model.named_modules()).keys()
        if (name, scale, row.name) in [("positions", "full", "few-bands"), ("positions", "full", "low-resolution")]:
            assert recipe.train.global_batch == 256, "as in Fig. 6"
            check_worker_range(recipe)
    if (name, scale) == ("ablation-sharing", "full"):
        assert parameters["none"] == 326_241_856 and parameters["paper"] == 44_912_254, "as published"
    if scale == "small":
        assert max(parameters.values()) < 1_000_000


@pytest.mark.parametrize(("scale", "expected"), [("small", [49, 16, 100, 196]), ("full", [49, 256, 4_096, 50_176])])
def test_input_rf_is_that_of_the_paper(scale: Any, expected: list[int]) -> None:
    """Perceiver, Table 2, whose values do not depend on a permutation."""
    table = load_table("permuted-imagenet")
    rows, _, base, _ = read_rows(table, scale, None, [])
    fields = {}
    for row in rows.run:
        recipe = build_recipe(with_values(base, rows.values(row)), source=row.name)
        fields[row.name] = count_input_positions(recipe.model, classes=10)
    pairs = zip(("resnet", "vit", "transformer", "perceiver", "learned"), [*expected, expected[-1]], strict=True)
    assert table.config.input_rf
    assert fields == {name + end: field for name, field in pairs for end in ("", "-permuted")}


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_figures_are_those_of_the_presets(name: str) -> None:
    """If a preset's note has results, the table has one of them, unless it names another source."""
    for row in load_table(name).config.rows:
        if row.source:
            continue
        preset = (row.full or {}).get("model", {}).get("preset")
        figures = re.findall(r"\b\d\d\.\d\b", PRESETS[preset].note) if preset else []
        assert row.paper is None or not figures or f"{row.paper:.1f}" in figures, (row.name, figures)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"rowz": []}, "unknown key rowz; did you mean rows?"),
        ({"rows": []}, "rows"),
        ({"claims": [{"text": "x", "better": "one"}]}, "wanted either better with than or above, or same"),
        ({"claims": [{"text": "x", "same": ["one", "tow"]}]}, "no row 'tow'; did you mean two?"),
        ({"rows": [{"name": "one", "label": "a"}, {"name": "one", "label": "b"}]}, "'one'"),
        ({"claims": [], "rows": [{"name": "one", "label": "a", "start": {"x": "one"}}]}, "wanted a row above it"),
    ],
)
def test_a_mistake_in_a_table_is_one_line(
    tmp_path: Path, paper: dict[str, Any], change: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(UserError, match="reads.yaml") as caught:
        load_table(write(tmp_path, {**paper, **change}))
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["data.url=nowhere"], "nowhere does not exist: make it with `perceiver prepare image_folder"),
        (["train.epoch=3"], "unknown key train.epoch; did you mean train.epochs?"),
        (["metric=loss"], "unknown key metric; wanted a key of the recipes"),
        (["seed=3"], "set --seeds"),
        (["concurrency=none"], "concurrency"),
        (["optim.lr"], "key=value"),
    ],
)
def test_a_wrong_key_or_missing_data_is_one_line(
    tmp_path: Path, paper: dict[str, Any], overrides: list[str], wanted: str
) -> None:
    with pytest.raises(UserError) as caught:
        rows_of(write(tmp_path, paper), *overrides)
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_row_is_named(tmp_path: Path, paper: dict[str, Any]) -> None:
    paper["rows"][1]["small"] = {"model.cross_atends": 2}
    with pytest.raises(UserError, match=r"row two: .*model\.cross_atends"):
        rows_of(write(tmp_path, paper))
    paper["rows"][1]["small"] = {"cluster.workers": 2}
    with pytest.raises(UserError, match="row two .*cluster"):
        rows_of(write(tmp_path, paper))


def test_a_row_starts_from_rows_of_the_same_seed(tmp_path: Path, paper: dict[str, Any]) -> None:
    paper["rows"][1]["start"] = {"latents": "one"}
    rows, _ = rows_of(write(tmp_path, paper))
    assert rows.origins() == {1: {"latents": 0}, 3: {"latents": 2}}
    with pytest.raises(UserError, match="override train.init_from: row two starts from the rows one: remove it"):
        rows_of(write(tmp_path, paper), f"train.init_from={tmp_path}")
    paper["rows"][0]["small"] = None
    with pytest.raises(UserError, match="row two: start.latents is row one, which is not run at this scale"):
        rows_of(write(tmp_path, paper))


def test_an_unknown_table_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"permuted-imagenett.* permuted-imagenet\?"):
        load_table("permuted-imagenett")


def test_the_user_s_keys_win_over_a_row_s(tmp_path: Path, paper: dict[str, Any]) -> None:
    rows, costs = rows_of(write(tmp_path, paper), "model.cross_attends=3", "concurrency=1")
    assert [rows.values(row, 1) for row in rows.run] == [{"seed": 1}, {"seed": 1}]
    assert costs["one"] == costs["two"]


def test_costs_are_those_of_the_accounting(tmp_path: Path, paper: dict[str, Any]) -> None:
    rows, costs = rows_of(write(tmp_path, paper))
    _, _, base, _ = read_rows(rows.table, "small", None, [])
    found = account(build_recipe(with_values(base, {"model.cross_attends": 2})).model, classes=2)
    assert costs["two"] == Cost(found.parameters, found.forward_flops) and costs["one"].flops < costs["two"].flops


def test_a_dry_run_prints_rows_and_resources_and_leaves_nothing(
    tmp_path: Path, paper: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.rglob("*"))
    assert reproduce(write(tmp_path, paper), seeds=3, dry_run=True) == 0
    text = capsys.readouterr().out
    assert "6 trials: 2 rows with 3 seeds each" in text and "at a time" in text
    three = next(line for line in text.splitlines() if line.startswith("three reads"))
    assert "70.0" in three and "not run at this scale" in three
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "reads.yaml"}


def test_rows_are_means_over_the_seeds_that_finished(tmp_path: Path, paper: dict[str, Any]) -> None:
    table = load_table(write(tmp_path, paper)).config
    trials = [
        finished(0, 0, 0.90),
        finished(1, 0, 0.80),
        finished(2, 1, 0.94),
        trial(3, "failed", reason="out of memory", values={"seed": 1}),
    ]
    one, two, three = results(table, "small", trials, {"one": Cost(1_000, 2_000_000), "two": Cost(1, 1)})
    assert one.mean == pytest.approx(92.0) and one.deviation == pytest.approx(2 * 2**0.5)
    assert two.scores == {0: pytest.approx(80.0)} and two.deviation is None and two.failed == {1: "out of memory"}
    assert three.cost is None and three.mean is None
    assert cells(one, table) == ["one | read", "76.7", "92.0 ± 2.8", "2", "1k", "2M", "1:00"]
    assert cells(three, table) == ["three reads", "70.0", "–", "–", "–", "–", "–"]
    assert seed_noise([one, two, three]) == one.deviation
    wide = table.model_copy(update={"input_rf": True})
    found = [RowResult(one.row, Cost(1, 1, count), {}) for count in (4096, None)] + [three]
    assert [cells(result, wide)[-2:] for result in found] == [["4,096", "–"], ["–", "–"], ["–", "–"]]
    assert head(wide)[-2:] == ["input RF", "wall time"] and len(cells(three, wide)) == len(head(wide))


@pytest.mark.parametrize(
    ("first", "second", "keys", "verdict"),
    [
        ((80.0, 82.0), (60.0, 62.0), {"by": 10}, "holds"),
        ((80.0, 82.0), (75.0, 77.0), {"by": 10}, "does not hold"),
        ((80.0, 82.0), (72.0, 74.0), {"by": 10}, "open"),
        ((80.0, 82.0), (79.0, 81.0), {}, "open"),
        ((80.0, 82.0), (90.0, 92.0), {}, "does not hold"),
        ((80.0,), (60.0,), {}, "open"),
        ((60.0,), (80.0,), {}, "does not hold"),
        ((80.0, 82.0), (81.0, 82.0), {"same": True}, "holds"),
        ((80.0, 82.0), (60.0, 62.0), {"same": True}, "does not hold"),
        ((80.0,), (80.0,), {"same": True}, "open"),
        ((), (80.0,), {}, "open"),
    ],
)
def test_claims_are_compared_with_the_noise_of_seeds(
    paper: dict[str, Any], first: tuple[float, ...], second: tuple[float, ...], keys: dict[str, Any], verdict: str
) -> None:
    rows: dict[str, Any] = {"same": ["one", "two"]} if keys.get("same") else {"better": "one", "than": "two", **keys}
    table = TableConfig.model_validate({**paper, "claims": [{"text": "x", **rows}]})
    found = [
        RowResult(row, Cost(1, 1), dict(enumerate(scores))) for row, scores in zip(table.rows, (first, second, ()))
    ]
    judged = judge(table, found)[0]
    assert judged.verdict == verdict
    assert ("at least 10 apart wanted" in judged.reason) == ("by" in keys and bool(first))


def test_less_may_be_better(paper: dict[str, Any]) -> None:
    table = TableConfig.model_validate({**paper, "claims": [{"text": "x", "better": "one", "than": "two"}]})
    found = [RowResult(row, Cost(1, 1), {0: s, 1: s + 0.1}) for row, s in zip(table.rows, (1.0, 2.0, 3.0))]
    assert judge(table, found, "min")[0].verdict == "holds"
    assert judge(table, found, "max")[0].verdict == "does not hold"


def test_the_outputs_contain_every_row_claim_and_fact(tmp_path: Path, paper: dict[str, Any]) -> None:
    table = load_table(write(tmp_path, paper)).config
    trials = [finished(0, 0, 0.9), finished(1, 0, 0.8), trial(2, "failed", reason="<b>", values={"seed": 1})]
    found = results(table, "small", trials, {"one": Cost(44_912_254, 707_000_000_000), "two": Cost(1, 1)})
    command = "perceiver reproduce reads data.storage_options.secret=hush"
    table.open.append("the batch is not given; here 1,024 | 2")
    page = TableReport(table, "small", found, judge(table, found), command, "2 CPUs", 130.0, date="2026-11-22")
    text, html, tree = markdown(page), write_page(page), json.loads(write_json(page))
    assert "| one \\| read | 76.7 | 90.0 | 1 | 44.9M | 707G | 1:00 |" in text
    assert "| two are better | does not hold | 80.0 against 90.0; one seed |" in text
    assert "three reads: not run at this scale" in text and "two reads: a note" in text and r"seed 1: \<b\>" in text
    for row in ("one | read", "two reads", "three reads"):
        assert row in html
    assert Page(html).fetched() == []
    assert "<svg" in html and "&lt;b&gt;" in html and "<script" not in html and "does not hold" in html
    assert "2 CPUs" in html and "2026-11-22" in text and "hush" not in text + html + write_json(page)
    assert r"here 1,024 \| 2" in text and "here 1,024 | 2" in html and tree["open"] == table.open
    one = tree["rows"][0]
    assert one["scores"] == {"0": pytest.approx(90.0)} and one["failed"] == {"1": "<b>"} and one["run"]
    assert tree["claims"][0]["verdict"] == "does not hold" and not tree["rows"][2]["run"]


def test_nothing_measured_still_makes_a_page(tmp_path: Path, paper: dict[str, Any]) -> None:
    table = load_table(write(tmp_path, paper)).config
    found = results(table, "small", [], {"one": Cost(1, 1), "two": Cost(1, 1)})
    page = TableReport(table, "small", found, judge(table, found), "x", "y", 1.0, "stopped")
    assert "stopped: not all trials" in write_page(page) and "<svg" not in write_page(page)


def test_counts_are_short_and_columns_aligned() -> None:
    assert [short(n) for n in (7, 1_530, 44_912_254, 707e9)] == ["7", "1.53k", "44.9M", "707G"]
    lines = aligned(HEAD[:2], [("a", "1"), ("bcdef", "100.0")])
    assert lines == ["row    paper", "a          1", "bcdef  100.0"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_table_is_run_and_gets_another_seed(
    tmp_path: Path, paper: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real Ray, real trials, real MLflow: a row with one seed, then the same with two, of which one is done."""
    del paper["rows"][1]["small"]
    path, folder = write(tmp_path, paper), tmp_path / "runs" / "reads-small-001"
    code, output = run(tmp_path, "reproduce", path, "--seeds", "1", "train.epochs=2", "--json")
    assert code == 0 and "Traceback" not in output, output
    assert json.loads(output.splitlines()[-1])["table"] == str(folder / "table.json")
    before = recorded(folder)
    assert [t["label"] for t in before] == ["one, seed 0"]

    code, output = run(tmp_path, "reproduce", path, "--seeds", "2", "train.epochs=2", "--resume")
    assert code == 0 and "Traceback" not in output, output
    assert recorded(folder)[:1] == before and [t["values"]["seed"] for t in recorded(folder)] == [0, 1]
    tree = json.loads((folder / "table.json").read_text())
    one, two, three = tree["rows"]
    assert len(one["scores"]) == 2 and not two["run"] and not three["run"] and tree["noise"] is not None
    last = before[0]["evaluations"][-1]
    assert last["epoch"] == 2 and one["scores"]["0"] == pytest.approx(100 * last["metrics"]["accuracy"])
    assert one["seconds"] > 0 and one["parameters"] == before[0]["parameters"]
    assert "<svg" in (folder / "table.html").read_text() and "| two reads | 78.0 |" in (folder / "table.md").read_text()

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(r.data.tags["perceiver.row"] for r in children) == ["one, seed 0", "one, seed 1"]
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {"table.html", "table.md", "table.json"}

    paper["rows"][0]["small"] = {"model.cross_attends": 3}
    monkeypatch.chdir(tmp_path)  # as the commands, which have recorded the base recipe by its relative path
    with pytest.raises(UserError, match="another row one"):
        reproduce(write(tmp_path, paper), ["train.epochs=2"], resume=True)
    assert all_gone(tmp_path), left_behind(tmp_path)
