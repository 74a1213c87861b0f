"""The checks before any worker starts; each error is one line that names the fix."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.recipe import resources
from cluster.recipe.config import build_recipe
from cluster.recipe.preflight import check, tracked_data
from cluster.recipe.resources import ClusterConfig, cpu_quota, machine_cpus, worker_cpus
from cluster.record.run_folder import RunFolder, find_run, named_run, new_run
from perceiver.config import UserError
from perceiver.factory import build_model
from perceiver.train.checkpoint.store import Snapshot
from pipelines.prepare import prepare
from pipelines.shards.manifest import load_manifest
from tests.perceiver.train.toy import toy_engine


def refused(tree: dict[str, Any], run: str = "small-001", resume: bool = False) -> str:
    recipe = build_recipe(tree)
    with pytest.raises(UserError) as caught:
        check(recipe, RunFolder(recipe.output, run), resume)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_valid_recipe_passes(tree: dict[str, Any]) -> None:
    recipe = build_recipe(tree)
    found = check(recipe, RunFolder(recipe.output, "small-001"), resume=False)
    assert found.epoch_steps == 5
    assert found.total_steps == 10
    assert found.parameters == sum(p.numel() for p in build_model(recipe.model, classes=2).parameters())


def test_missing_data(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"]["url"] = str(tmp_path / "nowhere")
    message = refused(tree)
    assert "nowhere" in message and "perceiver prepare" in message
    (tmp_path / "empty").mkdir()
    tree["data"]["url"] = str(tmp_path / "empty")
    assert "manifest.json" in refused(tree)


@pytest.mark.parametrize(
    ("patterns", "parts"),
    [
        (["head.*", "encoder.*"], ("'encoder.*' matches no parameter", "latents", "head")),
        (["*"], ("'*' freezes all parameters",)),
        ([""], ("'' matches no parameter",)),
        (["HEAD.*"], ("'HEAD.*' matches no parameter",)),
    ],
)
def test_frozen_parameters_that_do_not_fit_the_model(
    tree: dict[str, Any], patterns: list[str], parts: tuple[str, ...]
) -> None:
    tree["train"]["freeze"] = patterns
    message = refused(tree)
    assert message.startswith("train.freeze: ") and all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("optim", "parts"),
    [
        ({"groups": [{"match": "encoder.*"}]}, ("'encoder.*' matches no parameter", "latents", "head")),
        ({"groups": [{"match": "latents"}]}, ("'latents' matches only parameters that train.freeze excludes",)),
        ({"groups": [{"match": "head.*"}, {"match": "*.weight"}]}, ("'*.weight'", "'head.*' both match head.weight")),
        ({"groups": [{"match": "*.bias", "weight_decay": 0.1}]}, ("only biases and norms",)),
    ],
)
def test_groups_of_parameters_that_do_not_fit_the_model(
    tree: dict[str, Any], optim: dict[str, Any], parts: tuple[str, ...]
) -> None:
    tree["train"]["freeze"] = ["latents"]
    tree["optim"] |= optim
    message = refused(tree)
    assert message.startswith("optim.groups: match = ") and all(part in message for part in parts), message


def test_frozen_parameters_are_counted(tree: dict[str, Any]) -> None:
    tree["train"]["freeze"] = ["latents"]
    recipe = build_recipe(tree)
    found = check(recipe, RunFolder(recipe.output, "small-001"), resume=False)
    assert found.frozen == build_model(recipe.model, classes=2).get_parameter("latents").numel()
    assert f"({found.frozen:,} frozen)" in found.size


def test_a_profile_beyond_the_end_of_the_run(tree: dict[str, Any]) -> None:
    tree["train"]["profile"] = {"steps": [9, 11]}
    assert refused(tree).startswith("train.profile.steps = [9, 11]: the run has 10 steps")


def test_tensorboard_needs_its_package_and_a_folder_on_a_disk(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["tracking"] = {"enabled": False, "tensorboard": True}
    recipe = build_recipe(tree)
    check(recipe, RunFolder(recipe.output, "small-001"), resume=False)
    assert "got output = memory://runs, wanted a folder" in refused({**tree, "output": "memory://runs"})
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert refused(tree).endswith("tensorboardX, which is not installed: pip install 'perceiver-train[train]'")


def test_wandb_needs_its_package_and_online_a_key(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("cluster.recipe.preflight.importlib.util.find_spec", lambda name: object())
    tree["tracking"] = {"enabled": False, "wandb": {}}
    assert "WANDB_API_KEY is not set" in refused(tree)
    monkeypatch.setattr("cluster.recipe.preflight.importlib.util.find_spec", lambda name: None)
    assert refused(tree).endswith("wandb, which is not installed: pip install 'perceiver-train[wandb]'")


def test_a_missing_split(tree: dict[str, Any]) -> None:
    tree["data"]["eval_split"] = "validation"
    assert "'validation'" in refused(tree)


def test_data_of_one_class(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"]["url"] = str(shutil.copytree(tree["data"]["url"], tmp_path / "data"))
    manifest = tmp_path / "data" / "manifest.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "classes": ["cat"]}))
    assert "one class (cat)" in refused(tree)


def test_images_of_another_size(tree: dict[str, Any]) -> None:
    tree["model"]["inputs"]["size"] = [28, 28]
    message = refused(tree)
    assert "model.inputs.size = [28, 28]" in message and "12 x 12" in message and "data.image_size" in message


def test_images_with_other_channels(tree: dict[str, Any]) -> None:
    tree["model"]["inputs"] |= {"channels": 3, "mean": [0, 0, 0], "std": [1, 1, 1]}
    assert "model.inputs.channels = 3" in refused(tree)


def test_deepspeed_settings_that_contradict_the_recipe(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["deepspeed"] = {"config": {"train_batch_size": 99}}
    message = refused(tree)
    assert "99" in message and "train.global_batch" in message
    tree["deepspeed"] = {"config": str(tmp_path / "missing.json")}
    assert "missing.json" in refused(tree)


def test_compiled_layers_with_sharded_weights(tree: dict[str, Any]) -> None:
    tree["deepspeed"] = {"zero_stage": 3}
    tree["train"]["compile"] = True
    message = refused(tree)
    assert "train.compile = true with deepspeed.zero_stage = 3" in message and "train.compile=auto" in message


def test_a_task_that_does_not_fit_the_labels(tree: dict[str, Any]) -> None:
    tree["task"] = {"kind": "tagging"}
    message = refused(tree)
    assert "task.kind = 'tagging'" in message and "task.kind=classification" in message


@pytest.mark.parametrize(
    ("task", "model", "wanted"),
    [
        ({"kind": "multitask", "tasks": {"hue": 1.0}}, {}, "needs 'label_hue'"),
        ({"kind": "autoencoding", "weights": {"video": 1.0}}, {}, "needs 'video'"),
        ({"kind": "autoencoding", "weights": {"label": 1.0}}, {}, "model.kind = 'perceiver' is a classifier"),
        ({"kind": "classification"}, {"preset": "perceiver_io_flow"}, "model.decoder.kind = 'flow'"),
    ],
)
def test_a_task_without_its_targets_or_its_decoder(
    task: dict[str, Any], model: dict[str, Any], wanted: str, tree: dict[str, Any]
) -> None:
    """A multitask run once started and failed at its first batch."""
    tree["task"], tree["model"] = task, model or tree["model"]
    assert wanted in refused(tree)


def test_an_unknown_metric_of_the_best_checkpoint(tree: dict[str, Any]) -> None:
    tree["train"]["keep_best"] = {"metric": "eval/acuracy"}
    message = refused(tree)
    assert "train.keep_best.metric = 'eval/acuracy'" in message and "eval/accuracy, eval/f1, eval/loss" in message
    tree["train"] |= {"keep_best": None, "early_stop": {"metric": "train/loss"}}
    message = refused(tree)
    assert "train.early_stop.metric = 'train/loss'" in message and "eval/accuracy, eval/f1, eval/loss" in message
    tree["train"]["early_stop"] = None
    for number, known in enumerate(("eval/loss", "train/loss")):
        tree["train"]["keep_best"] = {"metric": known, "mode": "min"}
        check(build_recipe(tree), RunFolder(tree["output"], f"kept-{number}"), resume=False)


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", ""])
def test_a_run_name_stays_in_the_output_folder(name: str) -> None:
    with pytest.raises(UserError, match=f"--run '{name}'"):
        named_run("runs", name)


def test_heads_that_do_not_divide_the_width(tree: dict[str, Any]) -> None:
    tree["model"]["heads"] = 5
    assert "heads" in refused(tree)


def test_more_workers_than_cpus(tree: dict[str, Any]) -> None:
    tree["cluster"] = {"workers": 64}
    tree["train"]["global_batch"] = 64
    message = refused(tree)
    assert "cluster.workers = 64" in message and f"{machine_cpus()} CPUs" in message


def test_the_quota_of_a_container_limits_cpus_and_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Kubernetes limit does not hide the node's other CPUs: threads for all of them would wait for each other."""
    monkeypatch.setattr(resources, "visible_cpus", lambda: 64)
    monkeypatch.setattr(resources, "cpu_quota", lambda: cpu_quota(tmp_path))
    for text, cpus, threads in (("850000 100000", 8, 4), ("max 100000", 64, 32), ("50000 100000", 1, 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert machine_cpus() == cpus and resources.worker_threads(2, 0) == threads
        assert resources.worker_threads(2, 4) == min(threads, 2) and resources.worker_threads(2, 4, wanted=3) == 3


def test_workers_that_leave_too_little_for_the_data_tasks() -> None:
    with pytest.raises(UserError, match=r"cluster\.cpus_per_worker = 1 .* 2 CPUs.* 0\.25"):
        worker_cpus(ClusterConfig(workers=2, cpus_per_worker=1), cpus=2, data_cpus=1.5)
    with pytest.raises(UserError, match=r"cluster\.workers = 2.*data\.tasks"):
        worker_cpus(ClusterConfig(workers=2), cpus=2, data_cpus=2)
    assert worker_cpus(ClusterConfig(workers=2), cpus=2, data_cpus=1.4) == pytest.approx(0.3)
    assert worker_cpus(ClusterConfig(workers=1), cpus=2, data_cpus=0.75) == pytest.approx(1.25)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs a folder that cannot be written")
def test_an_output_that_cannot_be_written(tree: dict[str, Any]) -> None:
    tree["output"] = "/proc/runs"  # refuses new folders to every user, root included
    assert "/proc/runs/small-001/run.json" in refused(tree)


def test_an_output_that_is_a_file(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tree["output"] = str(tmp_path / "file")
    assert "output=" in refused(tree)


def test_an_existing_run_is_not_overwritten(tree: dict[str, Any]) -> None:
    recipe = build_recipe(tree)
    check(recipe, RunFolder(recipe.output, "small-001"), resume=False)
    assert "'small-001'" in refused(tree)
    assert new_run(recipe.output, "small").name == "small-002"


def test_resuming_a_missing_run(tree: dict[str, Any]) -> None:
    recipe = build_recipe(tree)
    with pytest.raises(UserError, match="'small'"):
        find_run(recipe.output, recipe.name)
    check(recipe, RunFolder(recipe.output, "small-001"), resume=False)
    assert find_run(recipe.output, recipe.name).name == "small-001"
    with pytest.raises(UserError, match="'small-01' .*small-001"):
        find_run(recipe.output, recipe.name, "small-01")


def save_checkpoint(tree: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    recipe = build_recipe(tree)
    snapshot = Snapshot(5, 80, {}, shapes, recipe.model_dump(mode="json"), {}, "")
    folder = RunFolder(recipe.output, "small-001")
    folder.note()
    folder.checkpoints.save(toy_engine(), snapshot)


def test_resuming_from_another_models_checkpoint(tree: dict[str, Any]) -> None:
    save_checkpoint(tree, {"latents": [4, 8]})
    assert "latents" in refused(tree, resume=True)


def test_resuming_with_another_batch_or_seed(tree: dict[str, Any]) -> None:
    model = build_model(build_recipe(tree).model, classes=2)
    save_checkpoint(tree, {name: list(p.shape) for name, p in model.named_parameters()})
    recipe = build_recipe(tree)
    assert check(recipe, RunFolder(recipe.output, "small-001"), resume=True).checkpoint is not None
    tree["seed"] = 7
    message = refused(tree, resume=True)
    assert "seed = 7" in message and "seed=0" in message


def test_samples_that_are_not_shown_whole_are_noted(tree: dict[str, Any], tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "train.txt"
    raw.parent.mkdir()
    raw.write_text("\n\n".join(["short", "a text of thirty letters or more"] * 10))
    (raw.parent / "test.txt").write_text("short")
    prepare("text", str(raw.parent), str(tmp_path / "text"))
    tree["data"] = {"url": str(tmp_path / "text"), "text_length": 20}
    tree["model"], tree["task"] = {"preset": "perceiver_io_mlm_bytes"}, {"kind": "masked_language"}
    found = check(build_recipe(tree), RunFolder(tree["output"], "small-001"), resume=False)
    assert len(found.notes) == 1 and "50%" in found.notes[0] and "data.text_length = 20" in found.notes[0]


def test_the_data_as_inputs_of_a_run(tree: dict[str, Any], tmp_path: Path) -> None:
    """One entry for each split; the same digest in another place, another one for other content; no secret."""
    recipe = build_recipe(tree)
    manifest = load_manifest(recipe.data.url)
    held_out, trained = tracked_data(recipe.data, manifest)
    assert (held_out["context"], trained["context"]) == ("evaluation", "training")
    assert held_out["digest"] != trained["digest"] and len(trained["digest"]) == 36
    elsewhere = recipe.data.model_copy(update={"url": "s3://id:hunter2@bucket/x"})
    copied = tracked_data(elsewhere, manifest.model_copy(update={"name": "copy", "licence": "other"}))
    assert [each["digest"] for each in copied] == [held_out["digest"], trained["digest"]]
    assert "hunter2" not in str(copied)
    other = manifest.model_copy(update={"classes": ("light", "dark")})
    assert tracked_data(recipe.data, other)[1]["digest"] != trained["digest"]
    same = recipe.data.model_copy(update={"eval_split": "train"})
    assert [each["context"] for each in tracked_data(same, manifest)] == ["training"]


def test_a_default_that_depends_on_a_wrong_key_is_no_second_mistake(tree: dict[str, Any]) -> None:
    tree["data"]["augment"] = 3
    with pytest.raises(UserError, match=r"data\.augment = 3") as caught:
        build_recipe(tree)
    assert "more" not in str(caught.value)
