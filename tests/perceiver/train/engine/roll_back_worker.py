"""A process that returns to a saved state between steps.

`python -m tests.perceiver.train.engine.roll_back_worker FOLDER` with RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT set. Prints one JSON line.
"""

import json
import math
import sys
from pathlib import Path

import torch

from perceiver.train.engine.deepspeed_engine import init_distributed
from tests.perceiver.train.engine.engine_toys import toy_rows
from tests.perceiver.train.engine.zero_worker import ENGINES, ROWS, build, mine, poisoned, run, save


def roll_back(engine: str, folder: Path) -> dict[str, bool]:
    """Restore a saved state after a bad step; return whether it and a refused one were skipped, and then the same."""
    lived = build(engine, "adamw")
    run(lived, range(3))
    save(lived, folder)
    run(lived, range(3, 5))
    skipped = lived.step(mine(poisoned(5)), 5).skipped
    before = lived.weights()
    lived.refuse = lambda loss: loss > 0
    spike, after = lived.step(mine(toy_rows(5, ROWS)), 5), lived.weights()
    lived.refuse = None
    assert before is not None and after is not None
    same = all(torch.equal(before[name], after[name]) for name in before)
    lived.load(folder)
    fresh = build(engine, "adamw", seed=1)
    fresh.load(folder)
    refused = spike.skipped and math.isfinite(spike.loss) and same
    return {"skipped": skipped, "refused": refused, "same": run(lived, range(6, 9)) == run(fresh, range(6, 9))}


if __name__ == "__main__":
    init_distributed()
    print(json.dumps({engine: roll_back(engine, Path(sys.argv[1], engine)) for engine in ENGINES}))
