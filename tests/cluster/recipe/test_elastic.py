"""Elastic runs (`cluster.min_workers`)."""

from pathlib import Path
from typing import Any

import pytest

from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.placement import Node
from cluster.recipe.preflight import check_worker_range, place_some
from perceiver.config import UserError
from tests.cluster.recipes import small_tree


def recipe(**cluster: Any) -> Recipe:
    tree = small_tree(Path("nowhere"), "nowhere")
    tree["cluster"] = cluster
    return build_recipe(tree)


def test_min_workers_above_workers_is_refused() -> None:
    with pytest.raises(UserError, match="cluster.min_workers = 3 .*cluster.workers = 2"):
        check_worker_range(recipe(workers=2, min_workers=3))


def test_a_run_starts_where_only_some_of_its_workers_fit() -> None:
    nodes = [Node("a", {"CPU": 4.0, "slot": 1.0})]
    slots: dict[str, Any] = {"workers": 2, "worker_resources": {"slot": 1}}
    with pytest.raises(UserError, match="2 slot"):
        place_some(recipe(**slots), nodes)
    assert place_some(recipe(**slots, min_workers=1), nodes) == 1.0
