"""Loading a checkpoint into a worker's engine."""

from perceiver.config import UserError
from perceiver.train.checkpoint.store import CheckpointStore
from perceiver.train.engine.protocol import Engine


def restore(engine: Engine, store: CheckpointStore, step: int) -> None:
    """Load the checkpoint of a step; every rank calls this.

    Raises:
        UserError: its state contains more updates than steps. It may have fewer, as bad losses make none.
    """
    with store.fetch(step) as local:
        updates = engine.load(local)
    if updates > step:
        raise UserError(f"{store.location(step)}: its shards are of step {updates}; take another checkpoint")
