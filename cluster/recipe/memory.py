"""The memory that checkpoints in memory take (`train.checkpoint_memory_every`)."""

from collections.abc import Collection

from cluster.recipe.config import Recipe
from cluster.recipe.placement import Node
from perceiver.config import UserError

COPIES = 2
"""Nodes that have each part of a checkpoint, if there are so many."""
KEPT = 2
"""A node keeps the last complete checkpoint and the one that arrives."""


def state_bytes(recipe: Recipe, trained: int, frozen: int) -> int:
    """Return the bytes of a training state: weights, two moments and the moving average, if there is one, in float32.

    Args:
        recipe: the recipe.
        trained: number of trained parameters.
        frozen: number of the others, of which only the weights are stored.
    """
    return 4 * ((4 if recipe.train.ema else 3) * trained + frozen)


def held_bytes(state: int, nodes: int) -> int:
    """Return the memory of one of `nodes` nodes for checkpoints in memory of a state of so many bytes."""
    return KEPT * min(COPIES, nodes) * state // nodes


def check_room(state: int, nodes: Collection[Node]) -> None:
    """Refuse checkpoints in memory that the nodes cannot contain.

    Raises:
        UserError: a node has too little memory.
    """
    need = held_bytes(state, len(nodes))
    for node in nodes:
        room = node.resources.get("memory", 0)
        if need > room:
            raise UserError(
                f"train.checkpoint_memory_every: checkpoints in memory take {need / 1e9:,.1f} GB of each node, "
                f"{node.name} has {room / 1e9:,.1f} GB: remove the key, or add nodes"
            )
