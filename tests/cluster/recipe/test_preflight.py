"""What is refused before any worker starts, each in one line that names the fix."""

import os
from pathlib import Path
from typing import Any

import pytest

from cluster.recipe.config import build_recipe
from cluster.recipe.preflight import check
from cluster.recipe.resources import ClusterConfig, machine_cpus, worker_cpus
from cluster.record.run_folder import RunFolder, find_run, named_run, new_run
from perceiver.config import UserError
from perceiver.factory import build_model
from perceiver.train.checkpoint.store import Snapshot
from tests.perceiver.train.toy import toy_engine


def refused(tree: dict[str, Any], run: str = "small-001", resume: bool = False) -> str:
    recipe = build_recipe(tree)
    with pytest.raises(UserError) as caught:
        check(recipe, RunFolder(recipe.output, run), resume)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_recipe_passes_with_its_figures(tree: dict[str, Any]) -> None:
    recipe = build_recipe(tree)
    found = check(recipe, RunFolder(recipe.output, "small-001"), resume=False)
    assert found.epoch_steps == 5
    assert found.total_steps == 10
    assert found.parameters == sum(p.numel() for p in build_model(recipe.model, classes=2).parameters())


def test_data_that_is_not_there(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"]["url"] = str(tmp_path / "nowhere")
    assert "does not exist: make it with `perceiver prepare" in refused(tree)
    (tmp_path / "empty").mkdir()
    tree["data"]["url"] = str(tmp_path / "empty")
    assert "has no manifest.json" in refused(tree)


def test_a_split_that_is_not_there(tree: dict[str, Any]) -> None:
    tree["data"]["eval_split"] = "validation"
    assert "no split 'validation': it has" in refused(tree)


def test_a_size_that_is_not_the_models(tree: dict[str, Any]) -> None:
    tree["model"]["inputs"]["size"] = [28, 28]
    message = refused(tree)
    assert "model.inputs.size = [28, 28]" in message and "12 x 12" in message and "data.image_size" in message


def test_channels_that_are_not_the_models(tree: dict[str, Any]) -> None:
    tree["model"]["inputs"] |= {"channels": 3, "mean": [0, 0, 0], "std": [1, 1, 1]}
    assert "model.inputs.channels = 3, but the images" in refused(tree)


def test_deepspeed_settings_that_contradict_the_recipe(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["deepspeed"] = {"config": {"train_batch_size": 99}}
    message = refused(tree)
    assert "99" in message and "train.global_batch" in message
    tree["deepspeed"] = {"config": str(tmp_path / "missing.json")}
    assert "missing.json: no such file" in refused(tree)


def test_a_task_that_the_labels_do_not_fit(tree: dict[str, Any]) -> None:
    tree["task"] = {"kind": "tagging"}
    assert "has the kind 'label': set task.kind=classification" in refused(tree)


def test_a_figure_to_judge_checkpoints_by_that_no_evaluation_gives(tree: dict[str, Any]) -> None:
    tree["train"]["keep_best"] = {"metric": "eval/acuracy"}
    message = refused(tree)
    assert "train.keep_best.metric = 'eval/acuracy'" in message and "give eval/accuracy, eval/loss;" in message
    for number, known in enumerate(("eval/loss", "train/loss")):
        tree["train"]["keep_best"] = {"metric": known, "mode": "min"}
        check(build_recipe(tree), RunFolder(tree["output"], f"kept-{number}"), resume=False)


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", ""])
def test_a_run_name_stays_in_the_output_folder(name: str) -> None:
    with pytest.raises(UserError, match="is no plain name"):
        named_run("runs", name)


def test_heads_that_do_not_divide_the_width(tree: dict[str, Any]) -> None:
    tree["model"]["heads"] = 5
    assert "heads" in refused(tree)


def test_more_workers_than_cpus(tree: dict[str, Any]) -> None:
    tree["cluster"] = {"workers": 64}
    tree["train"]["global_batch"] = 64
    assert f"cluster.workers = 64, but there are {machine_cpus()} CPUs" in refused(tree)


def test_workers_that_leave_too_little_for_the_data_tasks() -> None:
    with pytest.raises(UserError, match=r"cpus_per_worker = 1 for 2 workers leaves less of 2 CPUs .* 0.25"):
        worker_cpus(ClusterConfig(workers=2, cpus_per_worker=1), cpus=2, data_cpus=1.5)
    with pytest.raises(UserError, match=r"leaves too little for cluster.workers = 2: lower data.tasks"):
        worker_cpus(ClusterConfig(workers=2), cpus=2, data_cpus=2)
    assert worker_cpus(ClusterConfig(workers=2), cpus=2, data_cpus=1.4) == pytest.approx(0.3)
    assert worker_cpus(ClusterConfig(workers=1), cpus=2, data_cpus=0.75) == pytest.approx(1.25)


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs a place that cannot be written")
def test_an_output_that_cannot_be_written(tree: dict[str, Any]) -> None:
    tree["output"] = "/proc/runs"  # refuses new folders to every user, root included
    assert "cannot write /proc/runs/small-001/run.json" in refused(tree)


def test_an_output_that_is_a_file(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tree["output"] = str(tmp_path / "file")
    assert "set output= to a folder" in refused(tree)


def test_a_run_that_exists_is_not_overwritten(tree: dict[str, Any]) -> None:
    recipe = build_recipe(tree)
    check(recipe, RunFolder(recipe.output, "small-001"), resume=False)
    assert "run 'small-001' exists" in refused(tree)
    assert new_run(recipe.output, "small").name == "small-002"


def test_resuming_what_is_not_there(tree: dict[str, Any]) -> None:
    recipe = build_recipe(tree)
    with pytest.raises(UserError, match="no run of 'small' below"):
        find_run(recipe.output, recipe.name)
    check(recipe, RunFolder(recipe.output, "small-001"), resume=False)
    assert find_run(recipe.output, recipe.name).name == "small-001"
    with pytest.raises(UserError, match="no run 'small-01' below .*; did you mean small-001"):
        find_run(recipe.output, recipe.name, "small-01")


def save_checkpoint(tree: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    recipe = build_recipe(tree)
    snapshot = Snapshot(5, 80, {}, shapes, recipe.model_dump(mode="json"), {}, "")
    folder = RunFolder(recipe.output, "small-001")
    folder.note()
    folder.checkpoints.save(toy_engine(), snapshot)


def test_resuming_from_another_models_checkpoint(tree: dict[str, Any]) -> None:
    save_checkpoint(tree, {"latents": [4, 8]})
    message = refused(tree, resume=True)
    assert "is from another model: " in message and "start a new run without --resume" in message


def test_resuming_with_another_batch_or_seed(tree: dict[str, Any]) -> None:
    model = build_model(build_recipe(tree).model, classes=2)
    save_checkpoint(tree, {name: list(p.shape) for name, p in model.named_parameters()})
    recipe = build_recipe(tree)
    assert check(recipe, RunFolder(recipe.output, "small-001"), resume=True).checkpoint is not None
    tree["seed"] = 7
    assert "was trained with seed = 0, the recipe says 7" in refused(tree, resume=True)
