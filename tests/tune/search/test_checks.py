"""A bad search is refused before anything starts, in one line that names the fix."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.placement import Node
from perceiver.config import UserError
from tests.tune.searches import load
from tune.config import SearchConfig
from tune.search.checks import baseline, check_metrics, check_search, check_trials
from tune.search.resources import Slots, divide
from tune.search_file import RECIPE_KEYS
from tune.space.samplers import known_trials

LR = {"kind": "loguniform", "low": 1e-3, "high": 1e-1}


def refusal(tmp_path: Path, tree: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        search = load(tmp_path, tree, *overrides)
        check_trials(check_search(search), known_trials(search, baseline(search)) or [])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_search_passes(tmp_path: Path, tree: dict[str, Any]) -> None:
    search = load(tmp_path, tree, "train.epochs=3", "trials=2", "overrides.optim.clip=0.5")
    checker = check_search(search)
    assert checker.total_steps({}) == (15, 5.0)
    assert search.config.trials == 2 and search.recipe.optim.clip == 0.5


@pytest.mark.parametrize(
    ("key", "dimension", "wanted"),
    [
        ("optim.lrr", LR, "space.optim.lrr = 0.001: unknown key optim.lrr"),
        ("optim.lr", {"kind": "uniform", "low": -1, "high": 1}, "space.optim.lr = -1"),
        ("model.heads", {"kind": "choice", "values": [2, 3]}, "space.model.heads = 3"),
        ("model.latents", {"kind": "uniform", "low": 1.5, "high": 8}, "space.model.latents = 1.5"),
        ("model.inputs.size", {"kind": "choice", "values": [[12, 12], [14, 14]]}, "come as 12 x 12"),
        ("data.url", {"kind": "choice", "values": ["nowhere"]}, "does not exist"),
        ("cluster.workers", {"kind": "choice", "values": [1, 2]}, "space.cluster.workers"),
        ("optim.lr", {"kind": "uniform", "low": 2, "high": 1}, "low < high"),
        ("optim.lr", {"kind": "unform", "low": 1, "high": 2}, "kind = 'unform'"),
        ("optim.lr", {"kind": "choice", "values": [1], "wen": {}}, "unknown key space.optim.lr"),
        ("optim.lr", {**LR, "when": {"optim.lr": 1}}, "optim.lr"),
        ("optim.lr", {"kind": "grid", "values": [1]}, "space.optim.lr"),
        (
            "optim.lr",
            {**LR, "when": {"optim.kind": "lamp"}},
            "space.optim.lr.when: optim.kind = lamp",
        ),
        ("optim.lr", {**LR, "when": {"optim.knid": "lamb"}}, "space.optim.lr.when: optim.knid = lamb"),
        ("train.init_from", {"kind": "choice", "values": ["no/weights"]}, "space.train.init_from = no/weights: "),
    ],
)
def test_a_bad_dimension(
    tmp_path: Path, tree: dict[str, Any], key: str, dimension: dict[str, Any], wanted: str
) -> None:
    tree["space"] = {key: dimension}
    assert wanted in refusal(tmp_path, tree)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"metrik": "loss"}, "unknown key metrik"),
        ({"scheduler": {"kind": "asha", "grase": 2}}, "unknown key scheduler.grase"),
        ({"metric": ["accuracy", "loss"], "mode": ["max", "min"]}, "search.kind = optuna"),
        ({"scheduler": {"kind": "pbt"}, "baseline": True}, "baseline = true"),
        ({"scheduler": {"kind": "pbt"}, "search": {"kind": "optuna"}}, "search.kind = optuna"),
        ({"search": {"kind": "grid"}}, "space.optim.lr"),
        ({"recipe": "nothing.yaml"}, "nothing.yaml"),
        ({"metric": "parameters"}, "metric = parameters"),
        ({"metric": "acuracy"}, "metric = 'acuracy': "),
        ({"scheduler": {"kind": "asha", "grace": 0.5}}, "scheduler.grace = 0.5"),
        ({"scheduler": {"kind": "median", "grace": 2}}, "scheduler.grace = 2"),
        ({"overrides": {"train.checkpoint_memory_every": 5}}, "train.checkpoint_memory_every is set"),
    ],
)
def test_a_bad_search(tmp_path: Path, tree: dict[str, Any], changes: dict[str, Any], wanted: str) -> None:
    assert wanted in refusal(tmp_path, {**tree, **changes})


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ({"kind": "tagging"}, {"loss", "mean_average_precision"}),
        ({"kind": "classification"}, {"f1", "matthews"}),
        ({"kind": "multitask", "tasks": {"hue": 1.0}}, {"accuracy_hue", "f1_hue"}),
        ({"kind": "autoencoding"}, {"psnr_audio"}),
        ({"kind": "flow"}, {"loss"}),
        ({"kind": "masked_language"}, {"perplexity"}),
    ],
)
def test_each_task_s_metrics_are_known(
    tmp_path: Path, tree: dict[str, Any], task: dict[str, Any], wanted: set[str]
) -> None:
    for name in wanted:
        search = load(tmp_path, {**tree, "overrides": {"task": task}, "metric": name})
        check_metrics(search, search.recipe, 3)


def test_shards_that_are_missing_are_refused(tmp_path: Path, tree: dict[str, Any], images: str) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(images, copied)
    next(copied.rglob("*.arrow")).unlink()
    tree["overrides"] = {"data.url": str(copied)}
    assert ".arrow" in refusal(tmp_path, tree)


def test_values_that_do_not_go_together_are_refused_as_a_trial(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree |= {"search": {"kind": "grid"}, "baseline": False}
    tree["space"] = {
        "model.latent_channels": {"kind": "grid", "values": [16, 18]},
        "model.heads": {"kind": "grid", "values": [2, 4]},
    }
    assert "trial 3 (model.heads=4, model.latent_channels=18): " in refusal(tmp_path, tree)


def test_exchanged_weights_must_fit(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["scheduler"] = {"kind": "pbt"}
    tree["space"] = {"model.latents": {"kind": "choice", "values": [4, 8]}}
    assert "space.model.latents = 8" in refusal(tmp_path, tree)
    tree["space"] = {"train.global_batch": {"kind": "choice", "values": [8, 16]}}
    assert "space.train.global_batch" in refusal(tmp_path, tree)


def test_overrides_of_the_recipe_are_recognized_by_their_first_key() -> None:
    assert set(RECIPE_KEYS) == set(Recipe.model_fields) - set(SearchConfig.model_fields)


def slots(
    tmp_path: Path,
    tree: dict[str, Any],
    cpus: float,
    gpus: float = 0,
    wanted: int | None = None,
    nodes: Sequence[Node] = (),
    **cluster: Any,
) -> Slots:
    search = load(tmp_path, tree)
    base = {**search.base, "cluster": cluster}
    return divide(build_recipe(base), wanted, 8, cpus, gpus, nodes)


def test_trials_at_a_time_follow_from_the_resources(tmp_path: Path, tree: dict[str, Any]) -> None:
    two = slots(tmp_path, tree, 2, workers=1)
    assert (two.concurrency, two.here, two.share.cpus, two.share.runs) == (2, True, 1.0, 2)
    group = slots(tmp_path, tree, 2, workers=2)
    assert (group.concurrency, group.here, group.reserved) == (1, False, {"CPU": 0.01})
    assert slots(tmp_path, tree, 64, workers=4).concurrency == 8, "no more than there are trials"
    assert slots(tmp_path, tree, 64, gpus=4, workers=2, gpus_per_worker=1).concurrency == 2
    assert slots(tmp_path, tree, 64, gpus=4, workers=1, gpus_per_worker=1).reserved["GPU"] == 1


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("cpus", [2, 3, 4, 8, 17])
def test_all_that_run_at_a_time_fit_together(tmp_path: Path, tree: dict[str, Any], workers: int, cpus: int) -> None:
    """Tune, the workers and their data tasks never reserve more than the cluster has."""
    tree["overrides"] = {"train.global_batch": 24, "data.tasks": 1}
    if workers > cpus:
        return
    found = slots(tmp_path, tree, cpus, workers=workers)
    from cluster.recipe.preflight import data_cpus
    from cluster.recipe.resources import worker_cpus

    recipe = build_recipe({**load(tmp_path, tree).base, "cluster": {"workers": workers}})
    others = data_cpus(recipe) + found.share.taken
    one = workers * worker_cpus(recipe.cluster, found.share.cpus, others) + data_cpus(recipe)
    one += 0 if found.here else found.reserved["CPU"]
    assert found.concurrency * one <= cpus + 1e-9


def test_data_tasks_lower_how_many_run_at_a_time(tmp_path: Path, tree: dict[str, Any]) -> None:
    assert slots(tmp_path, tree, 2, workers=1, cpus_per_worker=1).concurrency == 1
    with pytest.raises(UserError, match=r"concurrency = 2 .*cluster\.cpus_per_worker = 1"):
        slots(tmp_path, tree, 2, wanted=2, workers=1, cpus_per_worker=1)


def test_a_worker_is_placed_on_one_node_with_its_labels_and_resources(tmp_path: Path, tree: dict[str, Any]) -> None:
    nodes = [Node(f"n{n}", {"CPU": 3.0, "slot": 1.0}, {"role": "train"} if n else {}) for n in range(3)]
    whole = slots(tmp_path, tree, 9, nodes=nodes, workers=1)
    assert whole.concurrency == 8 and slots(tmp_path, tree, 9, wanted=2, nodes=nodes, workers=1).portion == 1
    found = slots(
        tmp_path, tree, 9, nodes=nodes, workers=1, worker_labels={"role": "train"}, worker_resources={"slot": 1}
    )
    assert (found.concurrency, found.labels, found.reserved["slot"]) == (2, {"role": "train"}, 1)
    assert slots(tmp_path, tree, 9, nodes=nodes, workers=1, cpus_per_worker=2).concurrency == 3, (
        "a node has room for one"
    )
    with pytest.raises(UserError, match="no node is; labels there"):
        slots(tmp_path, tree, 9, nodes=nodes, workers=1, worker_labels={"role": "data"})


def test_nodes_that_are_still_to_come_are_not_missed(tmp_path: Path, tree: dict[str, Any]) -> None:
    found = slots(tmp_path, tree, 1, wanted=4, workers=2, gpus_per_worker=1, autoscaling=True)
    assert found.concurrency == 4 and found.portion == 1


def test_resources_that_are_not_there(tmp_path: Path, tree: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="concurrency = 16 "):
        slots(tmp_path, tree, 2, wanted=16, workers=1)
    with pytest.raises(UserError, match="2 GPUs.* 1: "):
        slots(tmp_path, tree, 8, gpus=1, workers=2, gpus_per_worker=1)
