"""The ZeRO tests: runs every scenario in several numbers of processes and writes the results as JSON.

`python -m tests.perceiver.train.engine.zero_worker train BASE WORLD...`, then `restore BASE WORLD...`. BASE/WORLD
contains the results of a group of that size; the second call restores the states of all sizes.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from perceiver.config import UserError
from perceiver.optim.averaging import EmaConfig
from perceiver.optim.config import OptimConfig
from perceiver.optim.freezing import freeze
from perceiver.optim.schedules import build_schedule
from perceiver.train.engine.deepspeed_config import BatchPlan, DeepSpeedConfig
from perceiver.train.engine.deepspeed_engine import DeepSpeedEngine, init_distributed
from perceiver.train.engine.protocol import Engine, Precision
from tests.forks import failed, import_what_a_step_imports, start_ranks
from tests.perceiver.train.engine.engine_toys import Batch, ToyModel, ToyTask, share, toy_rows
from tests.perceiver.train.engine.torch_engine import TorchEngine
from tests.perceiver.train.engine.zero_models import MODELS, train_model

KINDS = ("adamw", "lamb", "adam", "sgd")
LEAVE = {"match": "leave.*", "lr_factor": 0.5, "weight_decay": 0.3}
SETTINGS: dict[str, dict[str, Any]] = {
    "lamb": {"groups": [LEAVE]},
    "adam": {"amsgrad": True},
    "sgd": {"momentum": 0.9, "nesterov": True, "groups": [{"match": "norm.*", "lr_factor": 3.0}, LEAVE]},
}
ENGINES = ("torch", "zero0", "zero1", "zero2", "zero3")
ROWS, MICRO_BATCHES, STEPS = 24, 3, 6
SAVED = {
    "adamw": [("2", "zero1"), ("1", "zero3")],
    "lamb": [("1", "torch"), ("2", "zero0"), ("1", "zero1"), ("2", "zero3")],
    "adam": [("2", "zero2")],
    "sgd": [("2", "zero3")],
}
PUBLIC = ("adamw", "sgd")
EMA = {
    "adamw": EmaConfig(decay=0.9, warmup=False),
    "sgd": EmaConfig(decay=0.3, every=2),
    "lamb": EmaConfig(decay=0.5, warmup=False),
}
FROZEN = ("enter.*", "latents")
GPU_DEFAULTS = {"contiguous_gradients": True, "reduce_scatter": True, "overlap_comm": True}


def build(
    engine: str, kind: str, seed: int = 0, precision: Precision = "fp32", frozen: Sequence[str] = (), **config: Any
) -> Engine:
    """Return the named engine over the toy model, with clipping, decay and a schedule."""
    schedule_config = {"kind": "cosine", "warmup_steps": 2}
    settings = {"kind": kind, "lr": 2e-2, "weight_decay": 0.1, "clip": 0.5, "schedule": schedule_config}
    optim = OptimConfig.model_validate(settings | SETTINGS.get(kind, {}))
    schedule = build_schedule(optim.schedule, 2 * STEPS, 5)
    model = ToyModel(seed)
    freeze(model, frozen)
    if engine == "torch":
        return TorchEngine(model, ToyTask(), optim, schedule, precision=precision, ema=EMA.get(kind))
    world = dist.get_world_size()
    batch = BatchPlan(ROWS // world // MICRO_BATCHES, MICRO_BATCHES, world)
    section = DeepSpeedConfig.model_validate({"zero_stage": int(engine[-1]), "config": config or None})
    return DeepSpeedEngine(model, ToyTask(), optim, schedule, section, batch, precision=precision, ema=EMA.get(kind))


def mine(batch: Batch) -> list[Batch]:
    return share(batch, dist.get_rank(), dist.get_world_size(), MICRO_BATCHES)


def ragged(step: int) -> Batch:
    """Return a global batch whose valid rows are all but one in the last two thirds: rank 0 of 2 has few of them."""
    batch = toy_rows(step, ROWS)
    return {**batch, "valid": (torch.arange(ROWS) >= 10) | (torch.arange(ROWS) == 3)}


def poisoned(step: int) -> Batch:
    """Return a global batch with an infinite input in its last row, which the last rank has."""
    batch = toy_rows(step, ROWS)
    batch["inputs"][-1] = torch.inf
    return batch


def run(engine: Engine, steps: range) -> dict[str, list[Any]]:
    results = [engine.step(mine(toy_rows(step, ROWS)), step) for step in steps]
    return {
        "loss": [result.loss for result in results],
        "accuracy": [result.metrics["accuracy"] for result in results],
        "norm": [result.grad_norm for result in results],
        "lr": [result.lr for result in results],
        "skipped": [result.skipped for result in results],
    }


def train_save_resume(engine: str, kind: str, folder: Path, frozen: Sequence[str] = ()) -> dict[str, Any]:
    """Take six steps and save in the middle; a new engine with other weights loads that and repeats the last three."""
    first = build(engine, kind, frozen=frozen)
    seen: dict[str, Any] = {"first": run(first, range(3))}
    save(first, folder)
    seen["second"] = run(first, range(3, STEPS))
    seen["evaluation"] = first.evaluate(mine(ragged(50)))
    weights = first.weights()
    seen["weights"] = listed(weights)
    with first.averaged():
        seen["average"] = listed(first.weights())
    seen["dtypes"] = weights and sorted({str(tensor.dtype) for tensor in weights.values()})
    seen["sum"] = first.sum([1.0, first.rank])
    torch.manual_seed(first.rank)
    again = build(engine, kind, seed=1, frozen=frozen)
    again.load(folder)
    again.evaluate(mine(ragged(50)))  # the weights and their average change places, twice
    seen["resumed"] = run(again, range(3, STEPS))
    with again.averaged():
        seen["resumed average"] = listed(again.weights())
    seen["ragged"] = again.step(mine(ragged(90)), STEPS).loss
    return seen


def listed(weights: dict[str, torch.Tensor] | None) -> dict[str, list[float]] | None:
    return weights and {name: tensor.flatten().tolist() for name, tensor in weights.items()}


def save(engine: Engine, folder: Path) -> None:
    """Save as workers on several machines do: each into a separate folder, merged afterwards."""
    own = folder.with_name(f"{folder.name}-rank{engine.rank}")
    engine.save(own)
    dist.barrier()
    if engine.rank == 0:
        for rank in range(engine.world):
            shutil.copytree(folder.with_name(f"{folder.name}-rank{rank}"), folder, dirs_exist_ok=True)
    dist.barrier()


def skip(engine: str, kind: str) -> dict[str, Any]:
    """Take a step whose gradient is not finite, which must be reported and not change the weights, and a usual one."""
    run_ = build(engine, kind)
    run_.step(mine(toy_rows(0, ROWS)), 0)
    before = run_.weights()
    result = run_.step(mine(poisoned(1)), 1)
    after = run_.weights()
    same = before is None or after is None or all(torch.equal(before[name], after[name]) for name in before)
    return {"skipped": result.skipped, "same": same, "next": run(run_, range(2, 4))}


def refused_loads(folder: Path) -> dict[str, str]:
    """Return the messages when a state saved with AdamW is loaded by another optimizer, or is incomplete."""
    said = {}
    (torn := folder.with_name(f"torn-{dist.get_rank()}")).mkdir()
    shutil.copy(folder / "engine.json", torn)
    for name, (kind, where) in {
        "optim": ("lamb", folder),
        "nothing": ("adamw", folder / "nothing"),
        "torn": ("adamw", torn),
    }.items():
        try:
            build("zero1", kind).load(where)
        except UserError as error:
            said[name] = str(error)
    return said


def restore_all(base: Path) -> dict[str, list[float]]:
    """Load each saved state into each engine of this world size and take two steps: "WORLD/ENGINE-KIND > ENGINE"."""
    return {
        f"{world}/{source}-{kind} > {engine}": restored_losses(engine, kind, base / world / f"{source}-{kind}")
        for kind, sources in SAVED.items()
        for world, source in sources
        for engine in ENGINES
    }


def restored_losses(engine: str, kind: str, folder: Path) -> list[float]:
    again = build(engine, kind, seed=2)
    again.load(folder)
    return run(again, range(3, 5))["loss"]


def with_public_names(folder: Path) -> dict[str, Any]:
    """Repeat the run without private names of DeepSpeed, and read its state with them."""
    os.environ["PERCEIVER_PUBLIC_API"] = "1"
    runs = {f"{name} {kind}": (name, kind) for name in ENGINES[2:] for kind in PUBLIC}
    seen = {run: train_save_resume(*runs[run], folder / f"public-{run}") for run in runs}
    del os.environ["PERCEIVER_PUBLIC_API"]
    read = {run: restored_losses("zero2", kind, folder / f"public-{run}") for run, (_, kind) in runs.items()}
    return {**seen, "read": read}


def train_all(folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for kind in KINDS:
        for engine in ENGINES:
            seen[f"{engine} {kind}"] = train_save_resume(engine, kind, folder / f"{engine}-{kind}")
    seen["freeze"] = {name: train_save_resume(name, "lamb", folder / f"freeze-{name}", FROZEN) for name in ENGINES}
    seen["skip"] = {engine: skip(engine, "lamb") for engine in ENGINES}
    seen["refused"] = refused_loads(folder / "zero1-adamw")
    seen["as on GPUs"] = run(build("zero1", "lamb", zero_optimization=GPU_DEFAULTS), range(STEPS))
    seen["public"] = with_public_names(folder)
    native: dict[str, Any] = {"bf16": {"enabled": True}}
    seen["native bf16"] = {
        engine: run(build(engine, "lamb", precision="auto", **native), range(STEPS)) for engine in ENGINES[2:]
    }
    seen["models"] = {name: {engine: train_model(name, engine) for engine in ("torch", "zero3")} for name in MODELS}
    # DeepSpeed keeps its autocast setting in the process, so bf16 comes last.
    seen["bf16"] = {engine: run(build(engine, "lamb", precision="bf16"), range(STEPS)) for engine in ENGINES}
    return seen


def work(phase: str, base: Path) -> None:
    """Run a phase as the rank that the environment names."""
    torch.set_num_threads(1)
    init_distributed()
    folder = base / str(dist.get_world_size())
    seen = train_all(folder) if phase == "train" else restore_all(base)
    (folder / f"{phase}-{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def main(phase: str, base: Path, worlds: list[int]) -> int:
    """Run a phase in all numbers of processes at once; return how many processes failed."""
    import_what_a_step_imports()
    return failed([process for world in worlds for process in start_ranks(lambda: work(phase, base), world)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), [int(world) for world in sys.argv[3:]]))
