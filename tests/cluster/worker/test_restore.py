"""A checkpoint that a worker restores has at most as many updates as steps."""

from pathlib import Path

import pytest

from cluster.worker.restore import restore
from perceiver.config import UserError
from perceiver.train.checkpoint.store import CheckpointStore


class Restored:
    """An engine whose state contains three updates."""

    def load(self, folder: Path) -> int:
        return 3


def test_a_state_of_a_later_step_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    for step in (3, 4):  # a step whose loss was bad makes no update
        restore(Restored(), store, step)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="step-00000002: its shards are of step 3"):
        restore(Restored(), store, 2)  # type: ignore[arg-type]
