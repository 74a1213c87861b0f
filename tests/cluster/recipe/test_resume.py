"""A resume is the same run: the recipe but for some keys, the data, and the learning rate."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.recipe.config import build_recipe
from cluster.recipe.preflight import Preflight, check, data_facts
from cluster.recipe.resume import MAY_CHANGE, data_difference, longer
from cluster.record.run_folder import RunFolder
from perceiver.config import UserError
from perceiver.export.facts import DataFacts
from perceiver.factory import build_model
from perceiver.train.checkpoint.store import Snapshot
from pipelines.prepare import prepare
from pipelines.shards.manifest import load_manifest
from tests.cluster.recipes import write_images
from tests.perceiver.train.toy import toy_engine

STEP, SAMPLES = 10, 80


def with_key(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


@pytest.fixture
def run(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a run with a checkpoint of its last step, and its folder's facts."""
    tree["optim"] = {"lr": 0.01, "schedule": {"kind": "cosine", "warmup_steps": 2}}
    start(tree, STEP)
    return tree


def start(tree: dict[str, Any], step: int) -> None:
    recipe = build_recipe(tree)
    shapes = {name: list(p.shape) for name, p in build_model(recipe.model, classes=2).named_parameters()}
    folder = RunFolder(recipe.output, "small-001")
    folder.note(data=vars(data_facts(recipe.data, load_manifest(recipe.data.url))))
    snapshot = Snapshot(step, 16 * step, {}, shapes, recipe.model_dump(mode="json"), {}, "")
    folder.checkpoints.save(toy_engine(), snapshot)


def resumed(tree: dict[str, Any]) -> Preflight:
    recipe = build_recipe(tree)
    return check(recipe, RunFolder(recipe.output, "small-001"), resume=True)


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        resumed(tree)
    assert "\n" not in str(caught.value) and "--resume" in str(caught.value)
    return str(caught.value)


def test_an_unchanged_recipe_continues(run: dict[str, Any]) -> None:
    found = resumed(run)
    assert found.changes == () and found.checkpoint is not None and found.checkpoint.step == STEP


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 7),
        ("train.global_batch", 8),
        ("train.init_from", "elsewhere"),
        ("train.freeze", ["latents"]),
        ("data.train_split", "test"),
        ("data.augment", {"shift": 2}),
        ("data.window", 8),
        ("model.latents", 5),
        ("model.inputs.mean", [0.4]),
        ("model.latent_init_std", 0.5),
        ("task.label_smoothing", 0.1),
        ("optim.kind", "lamb"),
        ("optim.betas", [0.9, 0.99]),
        ("optim.amsgrad", True),
    ],
)
def test_keys_of_another_run_are_refused_by_name(run: dict[str, Any], key: str, value: Any) -> None:
    with_key(run, key, value)
    message = refused(run)
    first = "data.augment.shift" if key == "data.augment" else key
    assert f"{first} = " in message and "the run has" in message and f"set {first}=" in message.replace("set '", "set ")
    assert "init_from" in message


def test_inputs_of_another_size_are_refused_before_they_are_compared_with_the_data(run: dict[str, Any]) -> None:
    run["model"]["inputs"]["size"] = [6, 6]
    message = refused(run)
    assert "model.inputs.size = [6, 6], the run has [12, 12]" in message
    assert "set 'model.inputs.size=[12, 12]'" in message, "it can be pasted into a shell"


def test_keys_that_may_change_are_listed(run: dict[str, Any]) -> None:
    run["cluster"] = {"workers": 1}
    run["deepspeed"] = {"zero_stage": 0}
    run["tracking"] = {"experiment": "other"}
    run["train"] |= {"eval_every": 2, "checkpoint_every": 3, "keep_checkpoints": 5, "micro_batch": 4}
    run["data"] |= {"tasks": 1, "storage_options": {"anon": "true"}}
    run["optim"]["lr"] = 0.001
    changes = resumed(run).changes
    assert "cluster.workers: 2 -> 1" in changes and "optim.lr: 0.01 -> 0.001" in changes
    assert "data.storage_options.anon: null -> true" in changes and "train.checkpoint_every: auto -> 3.0" in changes
    assert len(changes) == 10


def test_every_pattern_is_a_key_of_a_recipe(run: dict[str, Any]) -> None:
    tree = build_recipe(run).model_dump(mode="json")
    for pattern in MAY_CHANGE:
        node: Any = tree
        for part in pattern.replace(".mixture.*", "").split("."):
            if "*" not in part:
                assert part in node, pattern
                node = node[part]
            elif part != "*":
                assert any(name.startswith(part[:-1]) for name in node), pattern


def test_without_a_checkpoint_the_recipe_of_the_folder_decides(tree: dict[str, Any]) -> None:
    import yaml

    recipe = build_recipe(tree)
    folder = RunFolder(recipe.output, "small-001")
    folder.note(name="small-001")
    folder.write("recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json")))
    tree["task"]["label_smoothing"] = 0.1
    assert "task.label_smoothing = 0.1, the run has 0.0" in refused(tree)


def test_a_copy_of_the_data_is_the_same_data(run: dict[str, Any], tmp_path: Path) -> None:
    old = run["data"]["url"]
    run["data"]["url"] = str(shutil.copytree(old, tmp_path / "moved"))
    assert resumed(run).changes == (f"data.url: {old} -> {run['data']['url']}",)


@pytest.mark.parametrize("what", ["pixels", "samples", "classes"])
def test_other_data_are_refused(run: dict[str, Any], tmp_path: Path, what: str) -> None:
    raw = write_images(tmp_path / "other", 20 if what == "samples" else 40, seed=1)
    if what == "classes":
        for split in ("train", "test"):
            (raw / split / "dark").rename(raw / split / "night")
    prepare("image_folder", str(raw), str(tmp_path / "prepared"))
    run["data"]["url"] = str(tmp_path / "prepared")
    message = refused(run)
    words = {"pixels": "contents", "samples": "train 40, test 20", "classes": "light, night"}
    assert str(tmp_path / "prepared") in message and words[what] in message, message


def test_indexed_files_that_changed_in_place_are_other_data() -> None:
    """Files of an index have no checksum, so that their versions are compared as long as their places are the same."""
    facts = {files: DataFacts("name", "", "", digest="same", files=files) for files in ("", "a:1", "a:2", "b:3")}
    assert "indexed files have changed" in data_difference(facts["a:1"], facts["a:2"])
    for then, now in (("a:1", "a:1"), ("a:1", "b:3"), ("", "a:1"), ("", "")):
        assert data_difference(facts[then], facts[now]) == "", "a copy, or a run of an earlier version"


def test_data_that_an_earlier_version_recorded_are_compared_by_class(run: dict[str, Any]) -> None:
    folder = RunFolder(run["output"], "small-001")
    data = {"name": "raw", "licence": "a", "source": "b", "classes": ["dark", "light"]}
    folder.note(data=data)
    resumed(run)
    folder.note(data={**data, "classes": ["light", "dark"]})
    assert "dark, light" in refused(run)


def test_more_epochs_do_not_raise_the_learning_rate_silently(run: dict[str, Any]) -> None:
    run["train"]["epochs"] = 4
    message = refused(run)
    assert "train.epochs = 4, the run has 2" in message and "optim.schedule.start=10 optim.lr=0.001" in message
    proposed = longer(build_recipe({**run, "train": {**run["train"], "epochs": 2}}), STEP, SAMPLES)
    assert proposed == "train.epochs=4 optim.schedule.start=10 optim.lr=0.001"
    run["optim"]["lr"] = 0.001
    run["optim"]["schedule"]["start"] = 20
    with pytest.raises(UserError, match=r"optim\.schedule\.start = 20"):
        resumed(run)
    run["optim"]["schedule"]["start"] = STEP
    assert resumed(run).total_steps == 20
    assert longer(build_recipe(run), 20, SAMPLES) == "train.epochs=8 optim.schedule.start=20"


def test_another_key_of_the_optimizer_does_not_allow_a_jump_of_the_rate(run: dict[str, Any]) -> None:
    run["train"]["epochs"] = 4
    run["optim"]["weight_decay"] = 0.2
    assert "optim.schedule.start=10" in refused(run)


def test_more_epochs_of_a_constant_rate_need_nothing_else(tree: dict[str, Any]) -> None:
    start(tree, STEP)
    tree["train"]["epochs"] = 4
    assert resumed(tree).changes == ("train.epochs: 2.0 -> 4.0",)
    assert longer(build_recipe(tree), 20, SAMPLES) == "train.epochs=8"
    assert longer(build_recipe(tree), 40, SAMPLES) == "train.epochs=16", "the run is longer than the recipe says"


def test_a_new_run_is_not_started_on_the_checkpoints_of_another(run: dict[str, Any]) -> None:
    folder = RunFolder(run["output"], "small-001")
    Path(folder.url, "run.json").unlink()
    recipe = build_recipe(run)
    with pytest.raises(UserError, match="'small-001' exists"):
        check(recipe, folder, resume=False)
