"""A process that returns to a saved state between steps.

`python -m tests.perceiver.train.engine.roll_back_worker FOLDER` with RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT set. Prints one JSON line.
"""

import json
import sys
from pathlib import Path

from perceiver.train.engine.deepspeed_engine import init_distributed
from tests.perceiver.train.engine.zero_worker import ENGINES, build, mine, poisoned, run, save


def roll_back(engine: str, folder: Path) -> dict[str, bool]:
    """Restore a saved state after a bad step; return whether it was skipped, and then the same as a new engine."""
    lived = build(engine, "adamw")
    run(lived, range(3))
    save(lived, folder)
    run(lived, range(3, 5))
    skipped = lived.step(mine(poisoned(5)), 5).skipped
    lived.load(folder)
    fresh = build(engine, "adamw", seed=1)
    fresh.load(folder)
    return {"skipped": skipped, "same": run(lived, range(6, 9)) == run(fresh, range(6, 9))}


if __name__ == "__main__":
    init_distributed()
    print(json.dumps({engine: roll_back(engine, Path(sys.argv[1], engine)) for engine in ENGINES}))
