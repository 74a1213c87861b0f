"""The plan: its arithmetic against figures calculated by hand, its errors, and the calibration of this machine."""

import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from cluster.capacity.calibrate import Calibration, Timing, calibrate, calibration_file, load_calibration
from cluster.capacity.describe import describe
from cluster.capacity.estimate import (
    Machines,
    check_starving,
    communication,
    estimate,
    memory,
    pass_seconds,
    reliability,
    step_time,
)
from cluster.capacity.failures import failure_rate
from cluster.capacity.workload import DataVolume, Workload, build_workload
from cluster.recipe.config import build_recipe
from cluster.runtime.hardware import BUILT_IN, Device, load_hardware
from perceiver.accounting import Account, account
from perceiver.cli.plan import command
from perceiver.config import UserError
from perceiver.factory import build_model, model_config
from perceiver.step_trace import StepTrace, trace_step
from pipelines.prepare import PrepareConfig, prepare
from tests.cluster.recipes import write_images, write_recipe
from tests.faults.job import PACE
from tests.homes import share_kernels

H100 = load_hardware(None).device("h100")


def place(devices: int = 8, nodes: int = 1, device: Device = H100, cpus: float = 100.0) -> Machines:
    return Machines(device, "h100", devices, nodes, cpus)


@pytest.fixture
def workload(tree: dict[str, Any]) -> Workload:
    """Return a fictitious model of 10^9 parameters with the small recipe, 64 samples per step."""
    tree["train"] = {"steps": 1000, "global_batch": 64, "precision": "bf16"}
    account = Account(10**9, 2 * 10**12, 2 * 10**12, 10**9)
    trace = StepTrace(6 * 10**12, 10**9, 10**9, 0, 1000)
    return Workload(build_recipe(tree), account, trace, DataVolume(10_000, 1e5, 10, 8e6, 3e-3))


def staged(workload: Workload, stage: int) -> Workload:
    recipe = workload.recipe
    section = recipe.deepspeed.model_copy(update={"zero_stage": stage})
    return replace(workload, recipe=recipe.model_copy(update={"deepspeed": section}))


def test_memory_of_each_zero_stage_by_hand(workload: Workload) -> None:
    """16 bytes per parameter unsharded; ZeRO 1, 2, 3 divide 8, 12 and 16 of them by 8 devices, as in its paper."""
    gigabytes = {}
    for stage in range(4):
        used = memory(workload, place(), 0, stage, None)
        gigabytes[stage] = (used.weights + used.gradients + used.optimizer) / 1e9
    assert gigabytes[0] == pytest.approx(16)
    assert gigabytes[1] == pytest.approx(4 + 4 + 8 / 8 + 4 / 8)
    assert gigabytes[2] == pytest.approx(4 + 4 / 8 + 8 / 8 + 4 / 8)
    assert gigabytes[3] == pytest.approx(16 / 8)


def test_frozen_parameters_take_only_their_weights(workload: Workload) -> None:
    """Nine of ten frozen: 4 bytes of each, 12 more of the trained ones, whose gradients alone are sent."""
    mostly = replace(workload, account=replace(workload.account, frozen=9 * 10**8))
    used = memory(staged(mostly, 0), place(), 0, 0, None)
    assert (used.weights + used.gradients + used.optimizer) / 1e9 == pytest.approx(4 + 12 / 10)
    assert communication(mostly, place(), None)[0] == pytest.approx(communication(workload, place(), None)[0] / 10)
    gathered = communication(staged(mostly, 3), place(), None)[0]
    assert gathered == pytest.approx(7 / 8 * 4e9 * (2 + 1 / 10))
    assert reliability(mostly, place(), 60.0, None).checkpoint_bytes == pytest.approx(4e9 + 8e8)
    assert "1,000,000,000 parameters (900,000,000 frozen)" in "\n".join(describe(estimate(mostly, place()), mostly))


def test_a_plan_counts_no_gradients_of_frozen_layers(tree: dict[str, Any]) -> None:
    """Only the head is trained: no backward pass through what is frozen, which keeps nothing for it."""
    config, frozen = model_config(tree["model"]), ("latents", "cross_attends.*", "blocks.*")
    whole, head = trace_step(config, classes=2), trace_step(config, classes=2, frozen=frozen)
    full, part = account(config, classes=2), account(config, classes=2, frozen=frozen)
    assert 0 < head.flops < whole.flops / 2  # forward is a third, and by the kernel less
    assert 0 < part.trained < full.trained == full.parameters == part.parameters
    assert part.activation_bytes < full.activation_bytes / 2


def test_the_largest_micro_batch_of_each_stage(workload: Workload) -> None:
    """It fits into 92 % of 80 GB and one more sample does not; totals are shown for 1, half, the recipe's and it."""
    train = workload.recipe.train.model_copy(update={"micro_batch": 4})
    heavy = replace(
        workload,
        account=replace(workload.account, activation_bytes=15 * 10**9),
        recipe=workload.recipe.model_copy(update={"train": train}),
    )
    plan = estimate(heavy, place())
    found = {stage: entry.largest for stage, entry in plan.memory_by_stage.items()}
    for stage, largest in found.items():
        fits, more = (memory(heavy, place(), micro, stage, None).total for micro in (largest, largest + 1))
        assert fits <= 0.92 * 80e9 < more
    assert found[3] > found[0], "memory freed by a stage is available to activations"
    totals = plan.memory_by_stage[1].totals
    assert list(totals) == [1, 2, 4, plan.largest_micro_batch] and totals[4] == plan.memory.total


def test_step_by_hand(workload: Workload) -> None:
    """8 samples of 6 TFLOP at 61 % of 989 TFLOP/s; compiled, 0.625 GB of other traffic at 80 % of 3.35 TB/s."""
    plan = estimate(workload, place())
    assert plan.step.compute == pytest.approx(8 * (6e12 / (0.61 * 989e12) + 0.625e9 / (0.8 * 3350e9)))
    assert plan.steps == 1000
    assert plan.hours == pytest.approx(1000 * plan.step.total / plan.reliability.goodput / 3600)
    assert plan.cost[0] == pytest.approx(8 * plan.hours * H100.price_hour)


def test_float32_attention_weights_and_the_host_by_hand(workload: Workload) -> None:
    """TF32 products at 16 % of 494 TFLOP/s, their scores whole, weights once per pass."""
    trace = replace(workload.trace, float32_flops=10**12, float32_other_bytes=10**9, pass_bytes=10**9, scores=10**6)
    tight = replace(workload, trace=trace)
    found = pass_seconds(tight, H100, 8)
    assert found["products"] == pytest.approx(8 * 5e12 / (0.61 * 989e12))
    assert found["float32_products"] == pytest.approx(8 * 1e12 / (0.16 * 494e12))
    assert found["other"] == pytest.approx((0.625 * 9e9 + 8e9) / (0.8 * 3350e9))
    assert memory(tight, place(), 8, 1, None).total - memory(workload, place(), 8, 1, None).total == 3 * 4 * 8 * 10**6
    assert found["launch"] == pytest.approx(0.01)
    changed = workload.recipe.train.model_copy(update={"compile": False})
    other = pass_seconds(replace(workload, recipe=workload.recipe.model_copy(update={"train": changed})), H100, 8)
    assert other["other"] == pytest.approx(10e9 / (0.8 * 3350e9))


def test_a_ring_sends_twice_the_gradients_less_a_share(workload: Workload) -> None:
    sent, seconds = communication(workload, place(8), None)
    assert sent == pytest.approx(2 * 7 / 8 * 4e9)
    assert communication(staged(workload, 3), place(8), None)[0] == pytest.approx(3 * 7 / 8 * 4e9)
    assert communication(workload, place(16, nodes=2), None)[1] > 5 * seconds, "the network is slower than the links"
    assert communication(workload, place(1), None) == (0, 0)


def test_the_checkpoint_interval_is_young_and_dalys(workload: Workload) -> None:
    found = reliability(workload, place(8), 3600.0, None, failure_rate("50,700"))
    between = 50_700 * 3600 / 8
    assert found.checkpoint_bytes == pytest.approx(12e9)
    assert found.interval_seconds == pytest.approx(math.sqrt(2 * found.save_seconds * between))
    assert reliability(workload, place(1024), 3600.0, None).goodput < found.goodput


def test_checkpoints_in_memory_take_four_states_of_all_nodes_and_of_one_node_two(workload: Workload) -> None:
    assert reliability(workload, place(8), 60.0, None).held_bytes == 0
    training = workload.recipe.train.model_copy(update={"checkpoint_memory_every": 5})
    held = replace(workload, recipe=workload.recipe.model_copy(update={"train": training}))
    for nodes, states in ((1, 2), (2, 2), (4, 1)):
        found = reliability(held, place(8 * nodes, nodes=nodes), 60.0, None)
        assert found.held_bytes == pytest.approx(states * found.checkpoint_bytes)


@pytest.mark.parametrize(
    ("source", "devices", "hours"),
    [
        ("llama3", 16_384, 54 * 24 / 419),
        ("rsc1", 16_384, 1.8),
        ("rsc1024", 1024, 7.9),
        ("rsc2", 8, 10_256),
        ("8e3", 8, 1000),
    ],
)
def test_the_published_rates_of_failures(source: str, devices: int, hours: float, workload: Workload) -> None:
    """The hours between failures that the papers give: 419 in 54 days, 1.8 h projected for RSC-1, 7.9 h measured."""
    found = reliability(workload, place(devices), 3600.0, None, failure_rate(source))
    assert 1 / found.failures == pytest.approx(hours, rel=0.005)


@pytest.mark.parametrize("wanted", ["rsc3", "", "nan", "0", "1e99", "-5"])
def test_other_rates_of_failures_are_refused(wanted: str) -> None:
    with pytest.raises(UserError, match=r"--failures .*llama3, rsc1, rsc2, rsc1024"):
        failure_rate(wanted)


def test_too_little_memory_names_the_key(workload: Workload) -> None:
    large = replace(workload, account=replace(workload.account, activation_bytes=20 * 10**9))
    with pytest.raises(UserError, match=r"micro-batch of 8 .*set train\.micro_batch=4"):
        estimate(large, place())
    huge = replace(workload, account=replace(workload.account, parameters=6 * 10**9))
    with pytest.raises(UserError, match="set deepspeed.zero_stage=1"):
        estimate(staged(huge, 0), place())


def test_a_batch_that_does_not_divide_is_padded(workload: Workload) -> None:
    """64 samples on 24 devices are 3 each: the step takes as long as with 72."""
    plan = estimate(workload, place(24, nodes=3))
    assert (plan.micro_batch, plan.accumulation) == (3, 1)
    assert "8 of 72 rows are padding" in "\n".join(describe(plan, workload))


def test_a_plan_that_waits_for_data_is_refused(workload: Workload) -> None:
    plan = estimate(workload, place(cpus=0.5))
    with pytest.raises(UserError, match="--data-cpus"):
        check_starving(plan, workload)
    slow = replace(workload, data=replace(workload.data, cpu_seconds=0.05))
    with pytest.raises(UserError, match=r"data.tasks = 2 .*set data.tasks=\d+"):
        check_starving(estimate(slow, place(cpus=500)), slow)


def test_asynchronous_evaluation_costs_a_device_and_an_elastic_run_shows_its_slowest_step(workload: Workload) -> None:
    def asked(**sections: Any) -> Workload:
        parts = {name: getattr(workload.recipe, name).model_copy(update=keys) for name, keys in sections.items()}
        return replace(workload, recipe=workload.recipe.model_copy(update=parts))

    usual = estimate(workload, place())
    evaluated = estimate(asked(train={"eval_async": True}), place())
    assert evaluated.device_hours == pytest.approx(usual.hours * 9) and evaluated.cost[0] > usual.cost[0]
    elastic = estimate(asked(cluster={"workers": 8, "min_workers": 4}), place())
    assert usual.fewest is None and elastic.fewest is not None
    count, seconds = elastic.fewest
    assert count == 4 and seconds > 1.9 * elastic.step.compute
    with pytest.raises(UserError, match=r"cluster\.min_workers = 1: .*64 samples"):
        large = replace(workload.account, activation_bytes=3 * 10**9)
        estimate(replace(asked(cluster={"workers": 8, "min_workers": 1}), account=large), place())


def test_the_traced_flops_are_three_forward_passes() -> None:
    """The backward pass of linear layers over learned inputs costs two forward passes."""
    config = model_config(
        {
            "kind": "perceiver",
            "latents": 8,
            "latent_channels": 32,
            "heads": 2,
            "cross_attends": 2,
            "self_attends_per_block": 2,
            "attention": "plain",
            "inputs": {"kind": "image", "channels": 1, "size": [8, 8], "mean": [0.5], "std": [0.5]},
        }
    )
    with torch.device("meta"):
        model = build_model(config, classes=3)
    trace = trace_step(config, classes=3)
    from perceiver.accounting import count_flops

    forward = count_flops(model, batch=2) / 2
    assert 2.2 * forward < trace.flops < 3.1 * forward
    assert trace.operations > 100 and trace.other_bytes > 0


def test_the_separable_kernel_is_counted_by_its_operations_and_moves_nothing() -> None:
    """N x M scores of F = 3 features take 20 operations each forward, 28 backward."""
    inputs = {"kind": "image", "channels": 3, "size": [64, 64], "positions": {"kind": "fourier", "bands": 4}}
    size = {"latents": 8, "latent_channels": 32, "heads": 2, "cross_attends": 1}
    values = {"kind": "perceiver", "inputs": inputs, **size}
    config = model_config(values)
    fused, plain = trace_step(config, classes=3), trace_step(model_config({**values, "attention": "plain"}), classes=3)
    assert fused.kernel_flops == 8 * 64 * 64 * (20 + 28) and plain.kernel_flops == 0
    assert fused.other_bytes < plain.other_bytes / 2


def measured(per_sample: float) -> Calibration:
    """Return the calibration of a machine on which a step takes 1 GB and `per_sample` bytes per sample."""
    timings = tuple(
        Timing(processes=1, micro_batch=micro, seconds=0.5 + micro / 16, bytes=1e9 + micro * per_sample, base_bytes=1e9)
        for micro in (8, 16)
    )
    return Calibration(
        device="cpu",
        cores=2,
        timings=timings,
        sample_cpu_seconds=1e-3,
        exchange_latency=0.0,
        exchange_bytes_s=1e9,
        save_bytes_s=1e9,
    )


def test_a_calibration_is_linear_in_the_samples() -> None:
    found = measured(per_sample=2e6)
    assert found.compute_seconds(32, 1) == pytest.approx(2.5)
    assert found.compute_seconds(16, 2) == pytest.approx(3.0), "two processes share what was measured with one"
    assert found.passing_bytes(32, 1, lambda world: 0.9e9 / world) == pytest.approx(0.1e9 + 32 * 2e6)
    assert found.passing_bytes(1, 1, lambda world: 2e9) == 0.0, "weights alone are more than what was measured"


def test_steps_in_a_run_take_longer_than_isolated_steps(workload: Workload) -> None:
    alone = measured(per_sample=2e6)
    batch = workload.recipe.train.global_batch
    isolated = alone.step_seconds(batch, batch, 1, 1)
    assert isolated == pytest.approx(alone.compute_seconds(batch, 1) + batch * 1e-3 / 2)
    slower = tuple(timing.model_copy(update={"surroundings": 1.3}) for timing in alone.timings)
    slowed = alone.model_copy(update={"timings": slower})
    times = [step_time(workload, place(1), batch, 1, calibration).total for calibration in (alone, slowed)]
    assert times == pytest.approx([isolated, 1.3 * isolated])


def test_a_hardware_table_of_the_user(tmp_path: Path) -> None:
    table = yaml.safe_load(BUILT_IN.read_text())
    table["devices"]["mine"] = {**table["devices"]["h100"], "price_hour": 1.25}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(table))
    assert load_hardware(str(path)).device("mine").price_hour == 1.25
    table["devices"]["mine"]["memory_gb"] = -1
    path.write_text(yaml.safe_dump(table))
    with pytest.raises(UserError, match=r"devices\.mine\.memory_gb = -1"):
        load_hardware(str(path))
    with pytest.raises(UserError, match="--gpu h10: .*h100"):
        load_hardware(None).device("h10")


def test_missing_data_are_described_by_options(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"]["url"] = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"data\.url = .*nothing.*--samples"):
        build_workload(build_recipe(tree))
    work = build_workload(build_recipe(tree), samples=1000, sample_bytes=5000.0, classes=7)
    assert work.data.samples == 1000 and work.data.classes == 7


def test_the_command(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, tree))
    runner = CliRunner()
    lines = runner.invoke(command, [recipe, "--gpu", "a100", "--gpus", "4"], catch_exceptions=False).output
    assert "4 x NVIDIA A100" in lines and "breaks first" in lines and "llama3: 419 unexpected" in lines, (
        "the default rate"
    )
    assert "forward and backward" in lines.split("FLOPs")[1] and lines.count("ZeRO") == 4
    found = json.loads(
        runner.invoke(command, [recipe, "--gpus", "4", "--failures", "rsc2", "--json"], catch_exceptions=False).output
    )
    assert found["devices"] == 4 and found["memory"]["total"] < 80e9
    assert found["reliability"]["rate"]["name"] == "rsc2"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--gpus", "16", "--nodes", "1"], "devices.h100.devices_per_node .*--nodes 2"),
        (["--gpus", "8", "--nodes", "3"], "--gpus 8 .*--nodes 3: set --nodes 1"),
        (["--gpus", "2", "--nodes", "4"], "--gpus 2 .*--nodes 4"),
        (["--calibrate"], "--calibrate .*cpu.*--gpu h100"),
    ],
)
def test_impossible_options_are_refused(
    tree: dict[str, Any], tmp_path: Path, options: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("cluster.capacity.calibrate.calibrate", lambda recipe: pytest.fail("it was measured"))
    with pytest.raises(UserError, match=line):
        CliRunner().invoke(command, [str(write_recipe(tmp_path, tree)), *options], catch_exceptions=False)


def test_devices_are_distributed_evenly_over_nodes(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["train"]["global_batch"] = 18
    words = [str(write_recipe(tmp_path, tree)), "--gpus", "9", "--json"]
    assert json.loads(CliRunner().invoke(command, words, catch_exceptions=False).output)["nodes"] == 3


def test_a_measured_plan_that_waits_for_data_is_refused(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = measured(per_sample=2e6).model_copy(update={"sample_cpu_seconds": 10.0})
    monkeypatch.setattr("cluster.capacity.calibrate.load_calibration", lambda recipe, device: slow)
    words = [str(write_recipe(tmp_path, tree)), "--gpu", "cpu", "--data-cpus", "0.5"]
    with pytest.raises(UserError, match="wait for data"):
        CliRunner().invoke(command, words, catch_exceptions=False)


def test_another_precision_has_another_calibration(tree: dict[str, Any]) -> None:
    files = {
        calibration_file(build_recipe({**tree, "train": {**tree["train"], **more}}))
        for more in ({}, {"precision": "fp32"}, {"precision": "bf16"}, {"epochs": 9})
    }
    assert len(files) == 3, "the length of a run does not change its speed"


def test_other_data_at_the_same_place_and_other_software_have_another_calibration(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, files = tmp_path / "place", []
    recipe = build_recipe({**tree, "data": {**tree["data"], "url": str(place)}})
    files.append(calibration_file(recipe))
    for seed in (0, 1):
        shutil.rmtree(place, ignore_errors=True)
        raw = write_images(tmp_path / f"raw{seed}", 4, seed=seed)
        prepare("image_folder", str(raw), str(place), PrepareConfig(parallel="off"))
        files.append(calibration_file(recipe))
    monkeypatch.setattr("cluster.capacity.calibrate.installed_version", lambda name: "another")
    files.append(calibration_file(recipe))
    assert len(set(files)) == 4


@pytest.mark.slow
def test_measuring_this_machine(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure with two workers; the earlier measurement with one is kept."""
    monkeypatch.setenv("PERCEIVER_CACHE", str(share_kernels(tmp_path) / ".cache" / "perceiver"))
    for name, value in PACE.items():  # other load could slow the isolated steps more than the real ones
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cluster.capacity.calibrate.machine_cpus", lambda: 2)
    recipe = build_recipe(tree)
    alone = Timing(processes=1, micro_batch=16, seconds=0.5, bytes=1e6, base_bytes=1e8)
    before = measured(1e6).model_copy(update={"timings": (alone, alone)})
    calibration_file(recipe).parent.mkdir(parents=True)
    calibration_file(recipe).write_text(before.model_dump_json())
    found = calibrate(recipe, workers=2, seconds=0.5)
    assert load_calibration(recipe, "cpu") == found
    assert [(t.processes, t.micro_batch) for t in found.timings] == [(1, 16), (1, 16), (2, 4), (2, 8)]
    assert 1e8 < found.base_bytes(2) < 5e9 and found.base_bytes(1) == 1e8
    assert 1 < found.surroundings(2) < 100, "a real run takes longer"
    longer = build_recipe({**tree, "train": {**tree["train"], "epochs": 9}})
    assert load_calibration(longer, "cpu") == found, "the length of a run does not change its speed"


@pytest.mark.parametrize(
    ("output", "stderr", "line"),
    [
        ("/proc/nowhere/runs", "", "/proc/nowhere/runs .*output="),
        ("runs", "noise\nValueError: no such kernel\n", "--calibrate.*ValueError: no such kernel"),
    ],
)
def test_a_failed_calibration_is_one_line(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, stderr: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr("cluster.capacity.calibrate.subprocess.run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=line):
        calibrate(build_recipe({**tree, "output": output}), workers=1)
