"""The sample plan at scale, on one machine: 1,024 ranks and 10**9 samples, without reading any.

    python benchmarks/plan.py                     # a table of figures
    python benchmarks/plan.py --json              # one line

Measured: CPU time of a rank per step (early and late in the run) and of a whole global batch; memory of the plan; that
no sample stands twice in an epoch (by a bit set: all positions of the epoch with --all, else those of windows at its
beginning, middle and end); that the ranks' shares put together are the global batch; and how well a data set sorted by
label is mixed: the mean length of runs of equal labels in a batch, and the chi-square of each batch's labels against
drawing at random, per degree of freedom (1 is random).
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines.order.mixture import MixturePlan  # noqa: E402
from pipelines.order.plan import RowGroups, SamplePlan  # noqa: E402

RANKS = 1024
SHARDS = 20_000
GROUP_ROWS = 128
GLOBAL_BATCH = 16_384
CLASSES = 1000
BLOCK_STEPS = 64


def rss_mb() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_ms(plan: SamplePlan | MixturePlan, steps: int, world: int) -> float:
    """Return the CPU milliseconds of one rank's step when planned `steps` at a time, as a data task does."""
    began = time.process_time()
    for start in (0, 10**6, 10**9):
        plan.share(start, start + steps, world // 3, world)
    return (time.process_time() - began) / (3 * steps) * 1e3


def shares_are_the_batch(plan: SamplePlan | MixturePlan, step: int) -> bool:
    """Return whether the 1,024 ranks' samples, one after the other, are the global batch."""
    whole = plan.share(step, step + 1).ids[0]
    return bool(
        (np.concatenate([plan.share(step, step + 1, rank, RANKS).ids[0] for rank in range(RANKS)]) == whole).all()
    )


def each_once(plan: SamplePlan, epoch: int, whole: bool) -> dict[str, int | bool]:
    """Count the distinct samples of an epoch by a bit set, over all its positions or those of some windows."""
    begin, end = epoch * plan.samples, (epoch + 1) * plan.samples
    if not whole:
        spans = [(first * plan.global_batch, last * plan.global_batch) for first, last in _windows(plan, epoch)]
    else:
        spans = [(begin, end)]
    bits = np.zeros(-(-plan.samples // 8), np.uint8)
    seen = 0
    for first, last in spans:
        for start in range(first, last, BLOCK_STEPS * plan.global_batch):
            ids = plan.at(np.arange(start, min(last, start + BLOCK_STEPS * plan.global_batch))).ids
            np.bitwise_or.at(bits, ids >> 3, np.left_shift(1, ids & 7).astype(np.uint8))
            seen += ids.size
    distinct = (
        int(np.unpackbits(bits).sum(dtype=np.int64))
        if plan.samples < 1 << 28
        else sum(int(np.unpackbits(bits[i : i + (1 << 24)]).sum(dtype=np.int64)) for i in range(0, bits.size, 1 << 24))
    )
    return {"positions": seen, "distinct_samples": distinct, "all_distinct": distinct == seen}


def _windows(plan: SamplePlan, epoch: int) -> Iterator[tuple[int, int]]:
    """Return steps of windows at the beginning, middle and end of an epoch, not at its ragged ends."""
    steps = plan.samples // plan.global_batch
    for place in (1, steps // 2, steps - 2 * plan.window // plan.draw - 2):
        first = epoch * steps + epoch + place
        yield next(iter(plan.runs(first, first + 10**6, 10**6)))


def mixing(samples: int, batch: int) -> dict[str, float]:
    """Measure how well a data set stored class by class is mixed."""
    plan = SamplePlan.build(
        RowGroups([50_000] * (samples // 50_000), [GROUP_ROWS] * (samples // 50_000)), seed=0, global_batch=batch
    )
    step = plan.samples // plan.global_batch // 2
    labels = plan.share(step, step + 200).ids * CLASSES // plan.samples
    changes = (labels[:, 1:] != labels[:, :-1]).sum()
    rng = np.random.default_rng(0)
    return {
        "samples": samples,
        "batch": batch,
        "run_length_stored": plan.samples / CLASSES,
        "run_length": float(labels.size / (changes + len(labels))),
        "run_length_random": float(1 / (1 - 1 / CLASSES)),
        "chi_square": _chi_square(labels),
        "chi_square_random": _chi_square(rng.integers(0, CLASSES, labels.shape)),
    }


def _chi_square(labels: np.ndarray) -> float:
    """Return the mean over the batches, per degree of freedom."""
    expected = labels.shape[1] / CLASSES
    counts = np.stack([np.bincount(batch, minlength=CLASSES) for batch in labels])
    return float((((counts - expected) ** 2 / expected).sum(axis=1) / (CLASSES - 1)).mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="check every sample of an epoch with a bit set")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    base = rss_mb()
    groups = RowGroups(np.full(SHARDS, 50_003), np.full(SHARDS, GROUP_ROWS))
    plan = SamplePlan.build(groups, seed=0, global_batch=GLOBAL_BATCH)
    mixture = MixturePlan.build([groups, groups], [0.7, 0.3], [None, None], seed=0, global_batch=GLOBAL_BATCH)
    figures: dict[str, object] = {
        "samples": plan.samples,
        "ranks": RANKS,
        "global_batch": GLOBAL_BATCH,
        "lanes": plan.lanes,
        "cpu_ms_a_rank_step_one_at_a_time": cpu_ms(plan, 1, RANKS),
        "cpu_ms_a_rank_step_128_at_a_time": cpu_ms(plan, 128, RANKS),
        "cpu_ms_a_global_batch": cpu_ms(plan, 4, 1),
        "cpu_ms_a_rank_step_of_a_mixture": cpu_ms(mixture, 128, RANKS),
        "memory_mb": rss_mb() - base,
    }
    figures["shares_are_the_batch"] = all(shares_are_the_batch(p, step) for p in (plan, mixture) for step in (0, 10**7))
    began = time.process_time()
    figures |= each_once(plan, 1, options.all)
    figures["cpu_s_of_the_count"] = time.process_time() - began
    for name, (samples, batch) in {"large": (10**9, GLOBAL_BATCH), "imagenet": (1_300_000, 1024)}.items():
        figures |= {f"{name}_{key}": value for key, value in mixing(samples, batch).items()}
    if options.json:
        print(json.dumps(figures))
        return
    for key, value in figures.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value
        print(f"| {key.replace('_', ' ')} | {shown} |")


if __name__ == "__main__":
    main()
