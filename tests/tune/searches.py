"""A small search for tests."""

from pathlib import Path
from typing import Any

import yaml

from tests.cluster.recipes import small_tree
from tune.config import Search, build_search
from tune.search_file import read_search
from tune.search_record import Evaluation, SearchRecord, TrialRecord


def search_tree(folder: Path, url: str) -> dict[str, Any]:
    """Write a small base recipe of one worker; return the tree of a search over it."""
    recipe = small_tree(folder, url)
    recipe["cluster"] = {"workers": 1}
    recipe["train"]["eval_every"] = 1
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe))
    return {
        "name": "hunt",
        "recipe": "small.yaml",
        "space": {"optim.lr": {"kind": "loguniform", "low": 1e-3, "high": 1e-1}},
        "trials": 4,
    }


def write_search(folder: Path, tree: dict[str, Any]) -> str:
    """Write a tree as a search file; return its path."""
    path = folder / "hunt.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def load(folder: Path, tree: dict[str, Any], *overrides: str) -> Search:
    """Write a search and read it as the command does."""
    path = write_search(folder, tree)
    return build_search(*read_search(path, overrides), path)


def trial(number: int, status: str, *scores: float, metric: str = "accuracy", **facts: Any) -> TrialRecord:
    """Return a trial that was evaluated after each epoch of 10 steps."""
    evaluations = [
        Evaluation(step=10 * (index + 1), epoch=index + 1, metrics={metric: score}, at=100.0 * number + index)
        for index, score in enumerate(scores)
    ]
    settings = {"values": {"optim.lr": 0.01 * (number + 1)}, **facts}
    return TrialRecord.model_validate({"number": number, "status": status, "evaluations": evaluations, **settings})


def record(*trials: TrialRecord, **metrics: str) -> SearchRecord:
    """Return a record of trials; by default larger accuracy is better."""
    return SearchRecord.model_validate({"metrics": metrics or {"accuracy": "max"}, "workers": 1, "trials": trials})
