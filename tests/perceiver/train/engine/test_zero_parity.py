"""ZeRO stages 0-3, 1 and 2 real processes, every optimizer: the same run as the torch engine's in one process."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from perceiver.config import UserError
from perceiver.train.checkpoint.shards import read_weights
from tests.perceiver.train.engine.engine_toys import ToyModel
from tests.perceiver.train.engine.zero_models import MODELS
from tests.perceiver.train.engine.zero_worker import EMA, ENGINES, FROZEN, KINDS, PUBLIC, SAVED, STEPS

REPOSITORY = Path(__file__).parents[4]
WORLDS = (1, 2)
TIGHT = 2e-6  # relative: float32 sums in another order

Seen = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def runs(base: Path) -> tuple[Seen, str]:
    return run_phase("train", base)


@pytest.fixture(scope="module")
def restored(base: Path, runs: tuple[Seen, str]) -> Seen:
    return run_phase("restore", base)[0]


def run_phase(phase: str, base: Path) -> tuple[Seen, str]:
    """Run a phase of the scenarios; return what each rank saw at each world size, and what the processes printed."""
    for world in WORLDS:
        (base / str(world)).mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.perceiver.train.engine.zero_worker", phase, base, *map(str, WORLDS)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = {
        world: [json.loads((base / str(world) / f"{phase}-{rank}.json").read_text()) for rank in range(world)]
        for world in WORLDS
    }
    return seen, done.stdout + done.stderr


@pytest.fixture(scope="module")
def seen(runs: tuple[Seen, str]) -> Seen:
    return runs[0]


every_run = pytest.mark.parametrize(
    ("world", "engine", "kind"), [(world, engine, kind) for world in WORLDS for engine in ENGINES for kind in KINDS]
)


@every_run
def test_same_losses_norms_and_weights_as_torch_alone(seen: Seen, world: int, engine: str, kind: str) -> None:
    """Over six steps of three micro-batches with clipping, decay and a schedule."""
    reference, ours = seen[1][0][f"torch {kind}"], seen[world][0][f"{engine} {kind}"]
    for part in ("first", "second"):
        assert ours[part]["loss"] == pytest.approx(reference[part]["loss"], rel=TIGHT)
        assert ours[part]["norm"] == pytest.approx(reference[part]["norm"], rel=5 * TIGHT)
        assert ours[part]["accuracy"] == reference[part]["accuracy"]
        assert ours[part]["lr"] == reference[part]["lr"]
        assert not any(ours[part]["skipped"])
    assert ours["weights"].keys() == reference["weights"].keys()
    for name, values in reference["weights"].items():
        assert ours["weights"][name] == pytest.approx(values, rel=1e-4, abs=2e-6), name


@every_run
def test_loaded_run_repeats_the_steps_exactly(seen: Seen, world: int, engine: str, kind: str) -> None:
    ours = seen[world][0][f"{engine} {kind}"]
    assert ours["resumed"] == ours["second"]
    assert len(ours["resumed"]["loss"]) == STEPS - 3


@every_run
def test_the_average_of_the_weights_is_that_of_torch_alone_and_exact_over_resume(
    seen: Seen, base: Path, world: int, engine: str, kind: str
) -> None:
    """Evaluations use it (see the next test), frozen weights are their own average, checkpoints contain it."""
    reference, ours = seen[1][0][f"torch {kind}"], seen[world][0][f"{engine} {kind}"]
    assert ours["resumed average"] == ours["average"]
    assert (ours["average"] != ours["weights"]) == (kind in EMA)
    assert ours["average"].keys() == reference["average"].keys()
    for name, values in reference["average"].items():
        assert ours["average"][name] == pytest.approx(values, rel=1e-4, abs=2e-6), name
    folder = base / str(world) / f"{engine}-{kind}"
    if kind in EMA:
        states = [read_weights(folder, which) for which in (None, "ema", "last")]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not torch.equal(states[1]["enter.weight"], states[2]["enter.weight"])
        assert torch.equal(states[1]["frozen"], states[2]["frozen"])
    else:
        with pytest.raises(UserError, match="train.ema"):
            read_weights(folder, "ema")


@every_run
def test_ragged_ranks_give_the_exact_mean(seen: Seen, world: int, engine: str, kind: str) -> None:
    """Rank 0 has three valid rows, rank 1 twelve; training and evaluation."""
    reference, ours = seen[1][0][f"torch {kind}"], seen[world][0][f"{engine} {kind}"]
    assert ours["ragged"] == pytest.approx(reference["ragged"], rel=TIGHT)
    assert ours["evaluation"]["loss"] == pytest.approx(reference["evaluation"]["loss"], rel=TIGHT)
    assert ours["evaluation"]["accuracy"] == reference["evaluation"]["accuracy"]


@pytest.mark.parametrize("world", WORLDS)
def test_a_state_is_restored_at_any_stage_and_world_size(seen: Seen, restored: Seen, world: int) -> None:
    """Saved by one engine and number of processes, loaded by another: the run continues alike."""
    ours = restored[world][0]
    assert len(ours) == len(ENGINES) * sum(len(sources) for sources in SAVED.values())
    for route, losses in ours.items():
        kind = route.split(" > ")[0].rsplit("-", 1)[1]
        assert losses == pytest.approx(seen[1][0][f"torch {kind}"]["second"]["loss"][:2], rel=TIGHT), route


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_stay_and_have_no_state(seen: Seen, base: Path, world: int, engine: str) -> None:
    """And a run with them is the same at every stage, and exact over resume."""
    reference, ours = seen[1][0]["freeze"]["torch"], seen[world][0]["freeze"][engine]
    for part in ("first", "second"):
        assert ours[part]["loss"] == pytest.approx(reference[part]["loss"], rel=TIGHT)
        assert ours[part]["norm"] == pytest.approx(reference[part]["norm"], rel=5 * TIGHT)
    assert ours["resumed"] == ours["second"]
    start = ToyModel().state_dict()
    frozen = {name for name in start if any(fnmatchcase(name, pattern) for pattern in FROZEN)}
    assert len(frozen) == 3
    for name, values in ours["weights"].items():
        assert (values == start[name].flatten().tolist()) == (name in frozen | {"frozen", "scale"}), name
    saved: set[str] = set()
    for path in (base / str(world) / f"freeze-{engine}").glob("shard-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved |= {piece[0] for entry in json.loads(file.metadata()["index"]) for piece in entry["pieces"]}
    assert saved == {"norm.weight", "norm.bias", "leave.weight", "leave.bias", "shift"}


def test_training_moves_and_optimizers_differ(seen: Seen) -> None:
    """Guards the comparisons above against runs in which nothing happens."""
    losses = [seen[1][0][f"torch {kind}"]["first"]["loss"] for kind in KINDS]
    assert losses[0][0] == losses[1][0]
    assert abs(losses[0][2] - losses[1][2]) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_agree_and_only_rank_0_has_the_weights(seen: Seen, engine: str) -> None:
    left, right = (rank[f"{engine} lamb"] for rank in seen[2])
    for key in ("first", "second", "resumed", "evaluation", "sum"):
        assert left[key] == right[key]
    assert left["sum"] == [2.0, 1.0]
    assert left["dtypes"] == ["torch.float32"]
    assert right["weights"] is None


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_is_not_finite_is_skipped_and_said(seen: Seen, world: int, engine: str) -> None:
    ours, reference = seen[world][0]["skip"][engine], seen[1][0]["skip"]["torch"]
    assert ours["skipped"] and ours["same"]
    assert not any(ours["next"]["skipped"])
    assert ours["next"]["loss"] == pytest.approx(reference["next"]["loss"], rel=TIGHT)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", MODELS)
def test_perceivers_under_zero_3_train_as_on_torch_alone(seen: Seen, world: int, model: str) -> None:
    """Weights read outside their layer's forward pass: absorbed attention, joined projections, tied embedding."""
    reference, ours = (seen[world][0]["models"][model][engine] for engine in ("torch", "zero3"))
    assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert ours["norm"] == pytest.approx(reference["norm"], rel=1e-4)
    assert ours["moves"] == pytest.approx(reference["moves"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_stays_near_fp32(seen: Seen, world: int, engine: str) -> None:
    ours = seen[world][0]["bf16"][engine]
    reference = seen[1][0]["torch lamb"]
    wanted = reference["first"]["loss"] + reference["second"]["loss"]
    assert ours["loss"] == pytest.approx(wanted, rel=1e-2)
    assert ours["loss"] != pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_the_bf16_of_a_deepspeed_json_stays_near_fp32(seen: Seen, world: int, engine: str) -> None:
    """bf16 weights over float32 masters, with LAMB's trust ratios from the masters."""
    ours = seen[world][0]["native bf16"][engine]
    reference = seen[1][0]["torch lamb"]
    assert ours["loss"] == pytest.approx(reference["first"]["loss"] + reference["second"]["loss"], rel=1e-2)


@pytest.mark.parametrize("world", WORLDS)
def test_the_settings_of_gpus_give_the_same(seen: Seen, world: int) -> None:
    """On CPUs the plan switches some of DeepSpeed's buffering off; with it the result is the same."""
    reference = seen[1][0]["torch lamb"]
    wanted = reference["first"]["loss"] + reference["second"]["loss"]
    assert seen[world][0]["as on GPUs"]["loss"] == pytest.approx(wanted, rel=TIGHT)


def test_foreign_states_are_refused_in_one_line(seen: Seen) -> None:
    said = seen[1][0]["refused"]
    assert all(part in said["optim"] for part in ("optim.kind", "'adamw'", "'lamb'"))
    assert "engine.json" in said["nothing"]
    assert "shard-00000.safetensors is missing" in said["torn"]
    assert len(said) == 3
    assert not any("\n" in message for message in said.values())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("run", [f"{engine} {kind}" for engine in ENGINES[2:] for kind in PUBLIC])
def test_without_private_names_the_run_and_its_states_are_the_same(seen: Seen, world: int, run: str) -> None:
    usual, public = seen[world][0][run], seen[world][0]["public"]
    for part in ("first", "second", "resumed", "evaluation", "average", "resumed average"):
        assert public[run][part] == usual[part]
    assert public["read"][run] == pytest.approx(usual["second"]["loss"][:2], rel=TIGHT)


def test_nothing_is_compiled_and_nothing_printed(runs: tuple[Seen, str]) -> None:
    assert runs[1].strip() == ""
