"""A run's ledger compared with its sample plan."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO

import fsspec
import pyarrow.parquet as pq

from perceiver.train.checkpoint.fence import Claims


@dataclass
class Audit:
    """The difference between a ledger and the plan.

    Attributes:
        steps: number of recorded steps.
        lost: (step, id) of samples that are in the plan but not in the ledger.
        doubled: (step, id) of samples that a step trained on more often than the plan has them.
        voided: steps that were rolled back.
    """

    steps: int = 0
    lost: list[tuple[int, int]] = field(default_factory=list)
    doubled: list[tuple[int, int]] = field(default_factory=list)
    voided: set[int] = field(default_factory=set)

    @property
    def exact(self) -> bool:
        """Whether each step trained on the planned samples, each once."""
        return not self.lost and not self.doubled


def audit(url: str, last_step: int, planned: Callable[[int], Sequence[int]]) -> Audit:
    """Compare the ledger at a URL with the plan.

    Args:
        url: folder of the ledger.
        last_step: number of steps that the run has done.
        planned: return the ids of the global batch of a step, counted from 1.
    """
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    claims = Claims(url.rpartition("/")[0])
    owner = claims.readable(claims.newest())
    found: dict[int, Counter[int]] = {}
    for path in fs.glob(f"{root}/steps-*/*.parquet"):
        name = re.fullmatch(r".*/rank-\d+(?:-(\d+))?\.parquet", path)
        last = owner.last_step(int((name and name[1]) or 0)) if owner else math.inf
        rows = pq.read_table(BytesIO(fs.cat_file(path))).to_pydict()
        for step, sample in zip(rows["step"], rows["sample_id"], strict=True):
            if step <= last:  # later ones were written by a driver that had been taken over
                found.setdefault(step, Counter())[sample] += 1
    result = Audit(steps=len(found))
    for step in range(1, last_step + 1):
        wanted, there = Counter(planned(step)), found.get(step, Counter())
        result.lost += [(step, sample) for sample in (wanted - there).elements()]
        result.doubled += [(step, sample) for sample in (there - wanted).elements()]
    for path in fs.glob(f"{root}/void-*.json"):
        steps = json.loads(fs.cat_file(path))
        result.voided |= set(range(steps["first"], steps["last"] + 1))
    return result
