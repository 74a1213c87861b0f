"""Our input pipeline for a consumer as fast as a GPU: samples per second, and the share of time that it waits.

    python benchmarks/gpu_ingest.py                             # JPEGs, then videos; one JSON line per pace
    python benchmarks/gpu_ingest.py --kind image --step-ms 160 --step-ms 80
    python benchmarks/gpu_ingest.py --tiny

Ray Data feeds one consumer as `perceiver train` does, with 8 data tasks: JPEGs of 500 x 375 as ImageNet's recipe shows
them (random crop, flip, RandAugment, 224 x 224), batches of 64; two-second videos of 320 x 240 as 32 frames of
224 x 224, batches of 16. For each batch the consumer waits `--step-ms` where a training step would compute; the first
pace is 0, the speed of the pipeline. The tensors are put on the GPU if there is one. For each pace the first `--skip`
batches are left out, so that what had been decoded in advance does not count; `waiting` is the consumer's share of time
in `next`, `cpu_ms` the CPU milliseconds per sample over all processes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_data  # noqa: E402
from benchmarks.ingest import end_below, tree_cpu  # noqa: E402
from cluster.recipe.resources import ClusterConfig  # noqa: E402
from cluster.runtime.local import set_quiet_environment, start_ray  # noqa: E402
from pipelines.feed.ingest import DataConfig, TrainShare, load_data, train_batches  # noqa: E402

ENDLESS = 10**6
"""Steps that the pipeline is asked for, so that a measurement ends with as much on the way as it began with."""
RECIPE_VIEW: dict[str, Any] = {
    "image_size": (224, 224),
    "augment": {"crop": {}, "flip": True, "rand_augment": {"layers": 4, "magnitude": 5}},
}
CLIP_VIEW: dict[str, Any] = {"video": {"frames": 32, "fps": 25, "size": (224, 224), "augment": {"crop": {}}}}


class Kind:
    """A kind of data: how it is made, prepared and shown."""

    def __init__(
        self,
        make: Callable[[int], bytes],
        suffix: str,
        source: str,
        view: dict[str, Any],
        *,
        count: int,
        batch: int,
        batches: int,
    ) -> None:
        self.make, self.suffix, self.source, self.view = make, suffix, source, view
        self.count, self.batch, self.batches = count, batch, batches

    def shrink(self) -> None:
        """Take a size for a test."""
        self.count, self.batch, self.batches = 40, 4, 4


KINDS = {
    "image": Kind(gpu_data.jpeg, ".jpg", "image_folder", RECIPE_VIEW, count=1500, batch=64, batches=40),
    "video": Kind(gpu_data.video, ".mkv", "video_folder", CLIP_VIEW, count=320, batch=16, batches=20),
}


def pace(batches: Iterator[Any], samples: int, count: int, skip: int, step_s: float) -> dict[str, float]:
    """Consume batches at a pace; return rate, share of time waiting, and CPU time per sample.

    Args:
        batches: endless.
        samples: in a batch.
        count: of batches that are measured.
        skip: of batches before them.
        step_s: seconds between a batch and the request for the next one.
    """
    for _ in range(skip):
        next(batches)
        time.sleep(step_s)
    waited, began, cpu = 0.0, time.perf_counter(), tree_cpu()
    for _ in range(count):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(step_s)
    seconds = time.perf_counter() - began
    return {
        "samples_per_s": round(count * samples / seconds, 1),
        "waiting": round(waited / seconds, 4),
        "cpu_ms": round((tree_cpu() - cpu) / (count * samples) * 1e3, 2),
    }


def measure(kind: Kind, prepared: Path, tasks: int, paces: list[float], skip: int, device: Any) -> Iterator[dict]:
    """Yield the figures of each pace, from the fastest to the slowest, over one pipeline."""
    data = DataConfig.model_validate({**kind.view, "url": str(prepared), "tasks": tasks, "cpus_per_task": 1})
    share = TrainShare(0, kind.batch, kind.batch, 0, ENDLESS)
    began = time.perf_counter()
    batches = train_batches(data, load_data(data), share, device)
    next(batches)
    first = {"first_s": round(time.perf_counter() - began, 2)}
    for step_ms in sorted(paces):
        found = pace(batches, kind.batch, kind.batches, skip, step_ms / 1e3)
        yield {"step_ms": step_ms, "batch": kind.batch, "tasks": tasks, **found, **first}


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="40 samples, few batches")
    parser.add_argument("--kind", choices=KINDS, action="append", help="all by default")
    parser.add_argument("--step-ms", type=float, action="append", help="of a batch, besides 0; default 200")
    parser.add_argument("--tasks", type=int, default=8, help="data tasks at a time")
    parser.add_argument("--skip", type=int, default=24, help="batches of each pace that are left out")
    parser.add_argument("--count", type=int, help="samples to make; default 1500 JPEGs, 320 videos")
    given = parser.parse_args()
    set_quiet_environment()
    from perceiver.train.engine.protocol import default_device

    device = default_device()
    paces, skip, tasks = [0.0, *(given.step_ms or [200.0])], given.skip, given.tasks
    if given.tiny:
        paces, skip, tasks = [0.0, 20.0], 2, 1
    start_ray(ClusterConfig())
    failed = False
    with tempfile.TemporaryDirectory(prefix="gpu-ingest-") as place:
        for name in given.kind or KINDS:
            kind, folder, line = KINDS[name], Path(place) / name, {"table": "ingest", "kind": name}
            if given.tiny:
                kind.shrink()
            try:
                count = given.count or kind.count
                size = gpu_data.write_files(kind.make, folder / "raw", count, kind.suffix)
                gpu_data.prepare(kind.source, folder / "raw", folder / "prepared", count)
                for found in measure(kind, folder / "prepared", tasks, paces, skip, device):
                    print(json.dumps({**line, "mean_bytes": round(size), **found}), flush=True)
            except Exception as error:  # noqa: BLE001  the other kind is measured all the same
                print(json.dumps({**line, "error": str(error)[-500:]}), flush=True)
                failed = True
    end_below(psutil.Process())  # a pipeline stopped in the middle keeps an interpreter from ending
    os._exit(int(failed))


if __name__ == "__main__":
    main()
