"""Correctness of training on a GPU, as one JSON line per check; without a GPU the same checks run on the CPU.

    python benchmarks/gpu_checks.py               # on the GPU
    python benchmarks/gpu_checks.py --tiny        # fewer steps, for a CPU
    python benchmarks/gpu_checks.py --check zero --check resume

A line is {"table": "checks", "check", "result", "wanted", "passed"}; a check that raises has its error as result, and
the next one runs. The exit code is 1 if a check did not pass. The data are the 1,797 digits of scikit-learn, the model
is a small Perceiver on their 64 pixels, in one process with a process group of one rank (NCCL on the GPU).

- tests: `pytest tests/perceiver/kernels/test_gpu.py`: the Triton kernels against float64, loss and gradients of small
  models against the CPU. Only on a GPU.
- bf16: the mean loss of the last 20 of 200 steps in a plain loop of torch, under bf16 autocast and in float32, over
  three seeds.
- zero: the losses of 20 steps through DeepSpeed at ZeRO 0 to 3, AdamW and LAMB; deterministic algorithms.
- resume: saved in the middle, loaded into a new engine with other weights: the same bits of losses and weights, with
  `torch.use_deterministic_algorithms(True)`. One of the parameters is frozen.
- resume bf16: the same under DeepSpeed's autocast, ZeRO 1 and 3. Last: DeepSpeed keeps autocast on in the process.
"""

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from perceiver.factory import build_model, model_config  # noqa: E402
from perceiver.optim.config import OptimConfig, build_optimizer  # noqa: E402
from perceiver.tasks import Batch, build_task  # noqa: E402
from perceiver.tasks.classification import ClassificationConfig  # noqa: E402
from perceiver.train.engine.deepspeed_config import BatchPlan, DeepSpeedConfig  # noqa: E402
from perceiver.train.engine.deepspeed_engine import DeepSpeedEngine  # noqa: E402
from perceiver.train.engine.protocol import Precision, default_device  # noqa: E402

CLASSES = 10
MODEL: dict[str, Any] = {
    "kind": "perceiver",
    "inputs": {
        "kind": "image",
        "channels": 1,
        "size": [8, 8],
        "mean": [0.31],
        "std": [0.38],
        "positions": {"kind": "fourier", "bands": 4},
    },
    "latents": 16,
    "latent_channels": 64,
    "latent_init_std": 0.5,
    "cross_attends": 2,
    "self_attends_per_block": 2,
    "heads": 4,
}
BATCH, TINY_BATCH, MICRO_BATCHES = 128, 32, 2
FROZEN = "latents"
STAGES = (0, 1, 2, 3)
OPTIMIZERS = ("adamw", "lamb")
LAST = 20
CLOSE = 0.05
"""The mean losses under bf16 and in float32 may differ by this part of the first loss. From one seed they are not much
closer, in either direction: a curve that falls quickly falls a little earlier or later with other rounding."""
EARLY, EARLY_ROUNDING, ROUNDING = 5, 1e-5, 2e-2
"""Relative differences of the losses of two ZeRO stages in the first steps and in all: their sums have another order,
and each update enlarges that, since AdamW divides gradients that are all rounding by their own size."""

Verdict = tuple[str, Any, Any, bool]
"""Check, result, wanted, passed."""
Curve = list[float]


def digits(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all digits, (1797, 1, 8, 8) uint8, and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images.reshape(-1, 1, 8, 8) * 255 / 16).to(torch.uint8)
    return pixels.to(device), torch.from_numpy(labels).to(device)


class Digits:
    """The batches of a step: the same rows at every call, for any device."""

    def __init__(self, device: torch.device, rows: int = BATCH) -> None:
        self.device, self.rows = device, rows
        self.images, self.labels = digits(device)

    def batch(self, step: int) -> Batch:
        """Return the global batch of a step."""
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(self.images), (self.rows,), generator=generator).to(self.device)
        valid = torch.ones(self.rows, dtype=torch.bool, device=self.device)
        return {"image": self.images[rows], "label": self.labels[rows], "valid": valid, "sample_id": rows}

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the batch of a step in equal parts."""
        parts = {name: tensor.chunk(MICRO_BATCHES) for name, tensor in self.batch(step).items()}
        return [{name: pieces[number] for name, pieces in parts.items()} for number in range(MICRO_BATCHES)]


def model(seed: int) -> Any:
    """Return the model with the weights of a seed, on the CPU."""
    torch.manual_seed(seed)
    return build_model(model_config(MODEL), classes=CLASSES)


def optim(kind: str) -> OptimConfig:
    return OptimConfig.model_validate({"kind": kind, "lr": 3e-3, "betas": [0.9, 0.99], "weight_decay": 0.05, "clip": 1})


# bf16 against float32


def loop(data: Digits, seed: int, steps: int, half: bool) -> Curve:
    """Train with torch alone; return the losses."""
    trained = model(seed).to(data.device).train()
    task, config = build_task(ClassificationConfig(), classes=CLASSES), optim("adamw")
    optimizer = build_optimizer(config, trained)
    losses = []
    for step in range(steps):
        with torch.autocast(data.device.type, torch.bfloat16, enabled=half):
            loss = task.loss(trained, data.batch(step)).loss_sum / data.rows
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), config.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def check_bf16(data: Digits, tiny: bool) -> Iterator[Verdict]:
    """Compare the ends of loss curves."""
    count, seeds = (60, 1) if tiny else (200, 3)
    curves = {half: [loop(data, seed, count, half) for seed in range(seeds)] for half in (False, True)}
    ends = {half: [statistics.fmean(curve[-LAST:]) for curve in curves[half]] for half in curves}
    single, half, first = statistics.fmean(ends[False]), statistics.fmean(ends[True]), curves[False][0][0]
    good = abs(half - single) <= CLOSE * first and single < first / 2
    result: dict[str, Any] = {"fp32": round(single, 5), "bf16": round(half, 5), "first_step": round(first, 5)}
    result["seeds"] = [[round(value, 5) for value in ends[kind]] for kind in (False, True)]
    wanted = f"bf16 within {CLOSE:.0%} of the first loss of fp32, fp32 below half of the first loss"
    yield f"mean loss of the last {LAST} of {count} steps", result, wanted, good


# DeepSpeed


def engine(
    rows: int,
    kind: str,
    stage: int,
    seed: int = 0,
    precision: Precision = "fp32",
    frozen: bool = False,
    compiled: bool = False,
) -> DeepSpeedEngine:
    """Return an engine over the model; each of its tensors is cut at stage 3, however small."""
    torch.compiler.reset()  # a process compiles a function for a few models only
    module = model(seed)
    if frozen:
        dict(module.named_parameters())[FROZEN].requires_grad_(False)
    settings = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None
    section = DeepSpeedConfig.model_validate({"zero_stage": stage, "config": settings})
    task, plan = (
        build_task(ClassificationConfig(), classes=CLASSES),
        BatchPlan(rows // MICRO_BATCHES, MICRO_BATCHES, 1),
    )
    return DeepSpeedEngine(
        module, task, optim(kind), lambda step: 1.0, section, plan, precision=precision, compile=compiled
    )


def steps(trained: DeepSpeedEngine, data: Digits, which: range) -> Curve:
    return [trained.step(data.micro_batches(step), step).loss for step in which]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let torch choose deterministic algorithms, and raise where it has none."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_zero(data: Digits, tiny: bool) -> Iterator[Verdict]:
    """Compare the losses of the ZeRO stages, step by step."""
    count = 6 if tiny else 20
    wanted = f"differences within {EARLY_ROUNDING} in the first {EARLY} steps, {ROUNDING} in all; the loss falls"
    with deterministic():
        for kind in OPTIMIZERS:
            curves = {stage: steps(engine(data.rows, kind, stage), data, range(count)) for stage in STAGES}
            pairs = [zip(curve, curves[0], strict=True) for curve in curves.values()]
            differences = [max(abs(a / b - 1) for a, b in at) for at in zip(*pairs, strict=True)]
            early, worst = max(differences[:EARLY]), max(differences)
            result = {f"zero{stage}": curve[-1] for stage, curve in curves.items()}
            good = early <= EARLY_ROUNDING and worst <= ROUNDING and curves[0][-1] < curves[0][0]
            yield f"loss after {count} steps, {kind}", {**result, "early": early, "largest": worst}, wanted, good


def resumed(data: Digits, kind: str, stage: int, count: int, precision: Precision, compiled: bool) -> tuple[Any, bool]:
    """Train, save in the middle, continue in a new engine; return the last losses, and whether all bits are equal."""
    middle = count // 2
    first = engine(data.rows, kind, stage, precision=precision, frozen=True, compiled=compiled)
    before = steps(first, data, range(middle))
    with tempfile.TemporaryDirectory() as place:
        first.save(Path(place))
        wanted, weights = steps(first, data, range(middle, count)), first.weights()
        again = engine(data.rows, kind, stage, seed=1, precision=precision, frozen=True, compiled=compiled)
        loaded = again.load(Path(place))
    found, others = steps(again, data, range(middle, count)), again.weights()
    assert weights is not None and others is not None
    different = [name for name, tensor in weights.items() if not torch.equal(tensor, others[name])]
    result = {"losses": [before[0], wanted[-1], found[-1]], "updates": loaded, "different_weights": different[:5]}
    return result, found == wanted and not different and loaded == middle


def check_resume(data: Digits, tiny: bool, precision: Precision = "fp32", compiled: bool = False) -> Iterator[Verdict]:
    """Compare the bits of interrupted and uninterrupted runs."""
    count = 4 if tiny else 20
    cases = [(kind, stage) for kind in OPTIMIZERS for stage in STAGES]
    if precision == "bf16":
        cases = [("adamw", 1), ("lamb", 1), ("lamb", 3)]
    if compiled:
        cases = [("adamw", 0), ("lamb", 1)]
    with deterministic():
        for kind, stage in cases:
            name = f"resume after {count // 2} of {count} steps, {kind}, ZeRO {stage}, {precision}"
            name += ", compiled" if compiled else ""
            yield from attempt(name, partial(resumed, data, kind, stage, count, precision, compiled))


def check_resume_bf16(data: Digits, tiny: bool) -> Iterator[Verdict]:
    yield from check_resume(data, tiny, "bf16")


def check_resume_compiled(data: Digits, tiny: bool) -> Iterator[Verdict]:
    yield from check_resume(data, tiny, "bf16", compiled=not tiny)  # a CPU compiles for minutes


def attempt(name: str, compute: Callable[[], tuple[Any, bool]]) -> Iterator[Verdict]:
    """Yield the verdict on equal bits, or the error."""
    try:
        result, same = compute()
    except Exception as error:  # noqa: BLE001  the next case runs
        result, same = _one_line(error), False
    yield name, result, "losses and weights equal bit by bit", same


# The tests


def start_tests() -> subprocess.Popen[str]:
    """Start the GPU tests of the kernels and the model."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/perceiver/kernels/test_gpu.py"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def tests_verdict(code: int, output: str) -> Verdict:
    """Return the verdict on what pytest printed: passed, if some tests passed and none failed or was skipped."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    result: Any = counts | ({"tests": failed[:10]} if failed else {})
    if not counts:
        result = output.strip()[-300:] or f"no output, exit code {code}"
    return "tests of kernels and gradients", result, "all passed", code == 0 and set(counts) == {"passed"}


# The command line

CHECKS: dict[str, Callable[[Digits, bool], Iterator[Verdict]]] = {
    "bf16": check_bf16,
    "zero": check_zero,
    "resume": check_resume,
    "resume bf16": check_resume_bf16,
    "resume compiled": check_resume_compiled,
}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def verdicts(names: list[str], data: Digits, tiny: bool) -> Iterator[Verdict]:
    """Run the checks one after the other, the tests next to them in a separate process."""
    tests = start_tests() if "tests" in names else None
    for name, check in CHECKS.items():
        if name not in names:
            continue
        try:
            yield from check(data, tiny)
        except Exception as error:  # noqa: BLE001  a check that raises is a check that failed
            yield name, _one_line(error), "a result", False
    if tests is not None:
        output, _ = tests.communicate()
        yield tests_verdict(tests.returncode, output)


def main() -> int:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="fewer steps")
    parser.add_argument("--check", choices=["tests", *CHECKS], action="append", help="all by default")
    arguments = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: cuBLAS gives the same bits
    device = default_device()
    names = arguments.check or (["tests", *CHECKS] if device.type == "cuda" else [*CHECKS])
    data, passed = Digits(device, TINY_BATCH if arguments.tiny else BATCH), True
    for check, result, wanted, good in verdicts(names, data, arguments.tiny):
        line = {"table": "checks", "check": check, "result": result, "wanted": wanted, "passed": good}
        print(json.dumps(line), flush=True)
        passed &= good
    torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
