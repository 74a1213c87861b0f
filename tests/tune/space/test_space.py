"""The space: valid dimensions, order of the draws, and results of each kind of draw."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver.config import UserError
from tests.tune.searches import load
from tune.search.checks import check_search
from tune.space.samplers import OptunaSampler, RandomDraw, grid, known_trials, recorded
from tune.space.space import base_values, flatten_space, sample, with_values


def drawn(tmp_path: Path, tree: dict[str, Any], count: int = 200) -> list[dict[str, Any]]:
    search = load(tmp_path, tree)
    return [sample(search.config.space, search.resolved, RandomDraw(0, number)) for number in range(count)]


def test_each_kind_stays_in_its_range_and_reaches_its_ends(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["space"] = {
        "optim.lr": {"kind": "loguniform", "low": "1e-4", "high": 1e-1},
        "optim.weight_decay": {"kind": "uniform", "low": 0, "high": 1},
        "model.latent_init_std": {"kind": "quniform", "low": 0.2, "high": 1.0, "step": 0.2},
        "model.latents": {"kind": "int", "low": 2, "high": 8, "step": 3},
        "model.cross_attends": {"kind": "int", "low": 1, "high": 4, "log": True},
        "train.global_batch": {"kind": "choice", "values": [8, 16]},
    }
    rows = drawn(tmp_path, tree)
    columns = {key: np.array([row[key] for row in rows], dtype=float) for key in tree["space"]}
    assert columns["optim.lr"].min() >= 1e-4 and columns["optim.lr"].max() <= 1e-1
    assert 0.4 < np.mean(columns["optim.lr"] < 10**-2.5) < 0.6, "half below the geometric middle"
    assert 0.4 < np.mean(columns["optim.weight_decay"] < 0.5) < 0.6
    assert sorted({round(v, 6) for v in columns["model.latent_init_std"]}) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert set(columns["model.latents"]) == {2, 5, 8} and isinstance(rows[0]["model.latents"], int)
    assert set(columns["model.cross_attends"]) == {1, 2, 3, 4}
    assert set(columns["train.global_batch"]) == {8, 16}


def test_a_condition_is_true_only_with_its_values_in_any_order_of_the_file(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    tree["space"] = {
        "optim.clip": {"kind": "uniform", "low": 0.1, "high": 1, "when": {"optim.kind": "lamb"}},
        "optim.kind": {"kind": "choice", "values": ["adamw", "lamb"]},
        "optim.weight_decay": {"kind": "choice", "values": [0, 1], "when": {"train.global_batch": [8, 16]}},
        "optim.lr": {"kind": "uniform", "low": 0, "high": 1, "when": {"train.global_batch": 8}},
    }
    rows = drawn(tmp_path, tree, 40)
    assert {row["optim.kind"] for row in rows} == {"adamw", "lamb"}
    assert all(("optim.clip" in row) == (row["optim.kind"] == "lamb") for row in rows)
    assert all("optim.weight_decay" in row and "optim.lr" not in row for row in rows), "the base recipe has batch 16"


def test_a_condition_looks_at_defaults_presets_sections_and_numbers_as_yaml_has_them(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    """The base recipe names neither its optimizer nor its betas; YAML takes 1e-2 for a text."""
    one = {"kind": "choice", "values": [1]}
    tree["space"] = {
        "optim.clip": {**one, "when": {"optim.kind": "adamw"}},
        "optim.weight_decay": {**one, "when": {"optim.lr": ["1e-3", "1e-2"]}},
        "model.heads": {**one, "when": {"model.inputs.positions.bands": 2}},
        "model.inputs.positions": {
            "kind": "choice",
            "values": [{"kind": "fourier", "bands": 2}, {"kind": "learned", "channels": 4}],
        },
    }
    rows = drawn(tmp_path, tree, 20)
    assert all("optim.clip" in row and "optim.weight_decay" in row for row in rows)
    heads = {row["model.inputs.positions"]["kind"]: "model.heads" in row for row in rows}
    assert heads == {"fourier": True, "learned": False}
    check_search(load(tmp_path, tree))


def test_a_trial_is_a_function_of_seed_and_number_and_the_baseline_comes_first(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    search = load(tmp_path, tree)
    base = base_values(search.config.space, search.recipe.model_dump(mode="json"))
    assert base == {"optim.lr": 0.01}
    trials = known_trials(search, base)
    assert trials is not None and len(trials) == 4 and trials[0] == base
    assert trials == known_trials(search, base)
    more = known_trials(load(tmp_path, tree, "trials=6"), base)
    assert more is not None and more[:4] == trials, "more trials do not change the first ones"
    assert known_trials(load(tmp_path, tree, "seed=1"), base) != trials


def test_a_grid_is_every_combination_once(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["search"] = {"kind": "grid"}
    tree["space"] = {
        "optim.kind": {"kind": "grid", "values": ["adamw", "lamb"]},
        "optim.lr": {"kind": "grid", "values": [1, 2, 3]},
        "optim.clip": {"kind": "grid", "values": [0.5, 1.0], "when": {"optim.kind": "lamb"}},
    }
    rows = grid(load(tmp_path, tree))
    assert len(rows) == 3 + 3 * 2
    assert all(("optim.clip" in row) == (row["optim.kind"] == "lamb") for row in rows)


def test_a_grid_that_never_ends_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["search"] = {"kind": "grid"}
    many = {"kind": "grid", "values": list(range(1, 61))}
    tree["space"] = {f"model.{key}": many for key in ("latents", "latent_channels", "heads", "cross_heads")}
    with pytest.raises(UserError, match="space: .*combinations"):
        load(tmp_path, tree)


def test_optuna_learns_from_replayed_trials(tmp_path: Path, tree: dict[str, Any]) -> None:
    """After many recorded trials whose best are at lr = 0.05, new ones are drawn there."""
    tree |= {"search": {"kind": "optuna", "startup": 3}}
    tree["space"]["model.latents"] = {"kind": "choice", "values": [2, 4, [1, 2]]}
    search = load(tmp_path, tree)
    source = OptunaSampler(search, search.config.search, search.config.metrics)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for number in range(40):
        lr = float(np.exp(rng.uniform(np.log(1e-3), np.log(1e-1))))
        values = {"optim.lr": lr, "model.latents": [2, 4, [1, 2]][number % 3]}
        ending = "stopped" if number % 5 == 0 else "finished"
        source.tell(number, values, ending, {"accuracy": -abs(np.log(lr / 0.05))}, 10)
    source.tell(40, {"optim.lr": 7.0, "model.latents": 2}, "finished", {"accuracy": 9.0}, 10)  # outside: left out
    source.tell(41, {"optim.lr": 0.01, "model.latents": 2}, "failed", {}, 0)
    assert len(source.study.trials) == 41
    asked = [source.ask(number) for number in range(42, 52)]
    assert np.median([abs(np.log(row["optim.lr"] / 0.05)) for row in asked]) < 0.7
    assert all(row["model.latents"] in (2, 4, [1, 2]) for row in asked)
    source.tell(42, asked[0], "stopped", {"accuracy": 0.1}, 5)
    source.tell(43, asked[1], "failed", {}, 0)
    source.tell(44, asked[2], "finished", {"accuracy": 0.9}, 10)


def test_values_are_set_in_a_copy_and_a_value_is_no_section() -> None:
    base = {"optim": {"lr": 1}, "model": {"inputs": None}}
    changed = with_values(base, {"optim.lr": 2, "model.inputs.kind": "image", "train.steps": 3})
    assert changed == {"optim": {"lr": 2}, "model": {"inputs": {"kind": "image"}}, "train": {"steps": 3}}
    assert base == {"optim": {"lr": 1}, "model": {"inputs": None}}
    with pytest.raises(UserError, match=r"optim\.lr\.x"):
        with_values(base, {"optim.lr.x": 1})


def test_a_space_may_be_written_nested() -> None:
    tree = {"optim": {"lr": {"kind": "grid", "values": [1]}}, "model.latents": {"kind": "int", "low": 1, "high": 2}}
    assert [key for key, _ in flatten_space(tree)] == ["optim.lr", "model.latents"]


def test_choices_are_spelled_as_the_recipe_spells_them(tmp_path: Path, tree: dict[str, Any]) -> None:
    """The base recipe's [16.0, 16.0] is one of [16, 16] and [8, 8]; sections stay as they are written."""
    key = "model.inputs.positions.max_resolution"
    tree["overrides"] = {key: [16, 16]}
    tree["space"] = {
        key: {"kind": "choice", "values": [[16, 16], ["8e0", 8], [16.0, 16]]},
        "optim.betas": {"kind": "choice", "values": [["9e-1", 0.99]], "when": {"optim.kind": "adamw"}},
        "optim": {"kind": "choice", "values": [{"kind": "sgd"}, {"kind": "adamw", "lr": 1}]},
        "train.epochs": {"kind": "choice", "values": [1, 2.5]},
        "data.augment": {"kind": "choice", "values": [None, {"flip": True}]},
    }
    search = load(tmp_path, tree)
    space = {name: dimension.model_dump()["values"] for name, dimension in search.config.space.items()}
    assert space[key] == [[16.0, 16.0], [8.0, 8.0]] and all(isinstance(n, float) for pair in space[key] for n in pair)
    assert space["optim.betas"] == [[0.9, 0.99]]
    assert space["optim"] == [{"kind": "sgd"}, {"kind": "adamw", "lr": 1}]
    assert [type(value) for value in space["train.epochs"]] == [float, float]
    assert space["data.augment"] == [None, {"flip": True}]
    values = base_values(search.config.space, search.resolved)
    assert recorded({**values, "optim": {"kind": "sgd"}, "data.augment": None}, {key: search.config.space[key]}, {})


def test_values_that_no_recipe_takes_are_left_for_the_checks(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["space"] = {"optim.lr": {"kind": "choice", "values": ["fast", 0.1]}}
    search = load(tmp_path, tree)
    assert search.config.space["optim.lr"].extremes() == ["fast", 0.1]
    with pytest.raises(UserError, match=r"space\.optim\.lr = fast"):
        check_search(search)
