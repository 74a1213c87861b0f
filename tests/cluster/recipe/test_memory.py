"""The memory of checkpoints in memory is known before a worker starts."""

from typing import Any

import pytest

from cluster.recipe.config import build_recipe
from cluster.recipe.memory import check_room, held_bytes
from cluster.recipe.placement import Node
from cluster.recipe.preflight import check
from cluster.record.run_folder import RunFolder
from perceiver.config import UserError


@pytest.mark.parametrize(("ema", "each"), [(None, 12), ({"decay": 0.9}, 16)])
def test_the_state_is_weights_moments_and_average(tree: dict[str, Any], ema: Any, each: int) -> None:
    tree["train"] |= {"checkpoint_memory_every": 5, "ema": ema}
    recipe = build_recipe(tree)
    found = check(recipe, RunFolder(recipe.output, "small-001"), resume=False)
    assert found.state == each * found.parameters


def test_each_node_has_its_share_of_two_checkpoints_and_their_copies() -> None:
    assert [held_bytes(100, nodes) for nodes in (1, 2, 4)] == [200, 200, 100]
    nodes = [Node(name, {"memory": room}) for name, room in (("a", 3e9), ("b", 1e9))]
    check_room(1_000_000_000 // 2, nodes)
    with pytest.raises(UserError, match=r"train\.checkpoint_memory_every.*2\.0 GB of each node, b has 1\.0 GB"):
        check_room(1_000_000_000, nodes)
