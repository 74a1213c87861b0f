"""The DeepSpeed engine's step beside the bare one on a GPU: what ZeRO, clipping and metrics add, the host's waits.

    python benchmarks/gpu_engine.py            # JSON lines; one rank
    python benchmarks/gpu_engine.py --tiny     # a small model on the CPU, to try the script

The ImageNet Perceiver, LAMB with clipping, one batch that stays on the GPU. `ms` is wall time over several steps,
`busy_ms` the GPU's time in kernels in one of them, `waits` how often the host waited for the GPU in one (of those that
torch reports) and `places` where.
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_step import Setting, emit, free
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from perceiver.kernels.compiled import CompiledLayers  # noqa: E402
from perceiver.optim.config import OptimConfig  # noqa: E402
from perceiver.optim.lamb import Lamb  # noqa: E402
from perceiver.tasks.classification import ClassificationConfig  # noqa: E402
from perceiver.train.engine.deepspeed_config import BatchPlan, DeepSpeedConfig  # noqa: E402
from perceiver.train.engine.deepspeed_engine import DeepSpeedEngine  # noqa: E402

CLIP = 10.0
STEPS = 8


def bare(setting: Setting, model: nn.Module) -> Callable[[int], Any]:
    """Return a step of torch alone: backward, clipping, LAMB; the host never waits for the loss."""
    images, labels = setting.data(setting.batch)
    optimizer = Lamb(model.parameters(), lr=1e-3)

    def step(number: int) -> None:
        optimizer.zero_grad()
        setting.loss(model, images, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


def engine(setting: Setting, stage: int, **how: Any) -> Callable[[int], Any]:
    """Return the step of the DeepSpeed engine."""
    images, labels = setting.data(setting.batch)
    built = DeepSpeedEngine(
        setting.model(),
        ClassificationConfig().build(classes=setting.classes),
        OptimConfig(kind="lamb", lr=1e-3, clip=CLIP),
        lambda step: 1.0,
        DeepSpeedConfig(zero_stage=stage),
        BatchPlan(setting.batch, 1, 1),
        device=torch.device(setting.device, 0) if setting.device == "cuda" else torch.device("cpu"),
        precision="bf16",
        **{"compile": not setting.tiny, **how},
    )
    batch = {"image": images, "label": labels, "valid": torch.ones_like(labels, dtype=torch.bool)}
    return lambda number: built.step([batch], number)


def measure(setting: Setting, name: str, step: Callable[[int], Any]) -> None:
    """Print the wall time of steps, the GPU's share of it, and the host's waits."""
    for number in range(3):
        step(number)
    setting.synchronize()
    steps = 1 if setting.tiny else STEPS
    began = time.perf_counter()
    for number in range(3, 3 + steps):
        step(number)
    setting.synchronize()
    ms = 1e3 * (time.perf_counter() - began) / steps
    facts: dict[str, Any] = {}
    if setting.device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            step(100)
            setting.synchronize()
        facts["busy_ms"] = sum(event.self_device_time_total for event in found.key_averages()) / 1e3
        facts |= waits(step)
    emit("engine", variant=name, batch=setting.batch, ms=ms, samples_per_s=1e3 * setting.batch / ms, **facts)


def waits(step: Callable[[int], Any]) -> dict[str, Any]:
    """Return how often the host waits for the GPU in a step, and the lines of Python that do."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(101)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "synchronizing" in str(w.message)
    )
    return {"waits": sum(places.values()), "places": json.dumps(dict(places.most_common(12)))}


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    setting = Setting(arguments.tiny)
    measure(setting, "bare", bare(setting, setting.model(None if setting.tiny else CompiledLayers())))
    variants: dict[str, tuple[int, dict[str, Any]]] = {
        "ZeRO 1": (1, {}),
        "ZeRO 1, bf16 residual": (1, {"half_residual": True}),
        "ZeRO 1, uncompiled": (1, {"compile": False}),
        "ZeRO 0": (0, {}),
        "ZeRO 2": (2, {}),
    }
    for name, (stage, how) in variants.items():
        try:
            measure(setting, name, engine(setting, stage, **how))
        except Exception as error:  # noqa: BLE001  the next measurement may work
            emit("engine", variant=name, error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        free(setting)


if __name__ == "__main__":
    main()
