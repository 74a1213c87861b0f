"""`mean: data` of a recipe: resolved before anything starts, recorded as numbers, refused with the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from safetensors.torch import save_file

from cluster.recipe.config import Recipe, build_recipe, for_workers
from cluster.recipe.preflight import check, check_recipe, describe_start
from cluster.recipe.statistics import with_statistics
from cluster.record.run_folder import choose_run
from cluster.run.worker import first_model
from perceiver.config import UserError
from perceiver.factory import build_model
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import load_manifest
from tests.cluster.recipes import prepare_images, small_tree


def from_data(folder: Path, url: str, **inputs: Any) -> Recipe:
    tree = small_tree(folder, url)
    tree["model"]["inputs"] |= {"mean": "data", "std": "data", **inputs}
    tree["tracking"] = {"enabled": False}
    return build_recipe(tree)


def test_the_numbers_of_the_manifest_are_recorded_and_survive_a_resume(tmp_path: Path) -> None:
    url = prepare_images(tmp_path, 20)
    recipe = from_data(tmp_path, url)
    assert recipe.model.model_dump()["inputs"]["mean"] == "data"
    folder = choose_run(recipe.output, recipe.name, False, None)
    found = check(recipe, folder, False).recipe
    wanted = load_manifest(url).statistics["image"]
    inputs = found.model.model_dump()["inputs"]
    assert (inputs["mean"], inputs["std"]) == (wanted.mean, wanted.std)
    folder.write("recipe.yaml", json.dumps(for_workers(found)))
    assert check(recipe, folder, True).changes == ()
    with pytest.raises(UserError, match=r"model\.inputs\.mean = \[0\.5\]"):
        check(from_data(tmp_path, url, mean=[0.5]), folder, True)
    assert check_recipe(recipe).recipe == found


def test_weights_of_other_data_are_fine_tuned_with_the_statistics_of_the_new_data(tmp_path: Path) -> None:
    url = prepare_images(tmp_path, 20)
    before = build_recipe(small_tree(tmp_path, url))
    (weights := tmp_path / "weights").mkdir()
    save_file(build_model(before.model, classes=2).state_dict(), weights / "model.safetensors")
    (weights / "recipe.yaml").write_text(json.dumps(for_workers(before)))
    recipe = from_data(tmp_path, url)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"init_from": str(weights)})})
    found = check(recipe, choose_run(recipe.output, recipe.name, False, None), False)
    new = load_manifest(url).statistics["image"]
    assert first_model(found.recipe, 2).get_submodule("inputs").mean == new.mean
    now = f"with mean [{round(*new.mean, 4)}], std [{round(*new.std, 4)}]"
    assert f"{now}, in the model of the weights with mean [0.5], std [0.3]" in found.start
    same = before.model_copy(update={"train": recipe.train})
    assert "normalised" not in describe_start(same, load_manifest(url))


def test_data_without_statistics_are_refused_with_the_command(tmp_path: Path) -> None:
    url = prepare_images(tmp_path, 20)
    manifest = load_manifest(url).model_copy(update={"statistics": {}})
    recipe = from_data(tmp_path, url, std=[0.3])
    with pytest.raises(UserError, match=r"inputs\.mean = data.*no statistics of 'image': give .*`perceiver prepare"):
        with_statistics(recipe, manifest)
    with pytest.raises(UserError, match="channels = 3, but the images"):
        check_recipe(from_data(tmp_path, url, channels=3))
    with pytest.raises(UserError, match="inputs.mean = data: wanted numbers"):
        build_model(recipe.model, classes=2)
    build_model(with_statistics(recipe, None).model, classes=2)  # sizes alone, as `plan` needs them


@pytest.mark.parametrize("wrong", ["dta", ["a"], [1e9], True])
def test_other_words_are_refused_by_key(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(UserError, match=r"model\.inputs\.mean|mean = true") as found:
        from_data(tmp_path, "data", mean=wrong)
    assert "[constrained" not in str(found.value)


def test_spectrograms_and_sounds_of_a_multimodal_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        place = tmp_path / "raw" / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / f"{number}.wav", rng.normal(0, 0.1, 4000), 8000)
    url, options = str(tmp_path / "data"), PrepareConfig(options={"held_out": "none"})
    manifest = prepare("audio_folder", str(tmp_path / "raw"), url, options)
    tree = small_tree(tmp_path, url)
    mel = {"kind": "mel", "samples": 4000, "rate": 8000, "high": 4000, "mean": "data", "std": "data"}
    audio = {"kind": "audio", "samples": 4000, "patch": 100, "mean": "data", "std": "data"}
    tree["model"]["inputs"] = {"kind": "multimodal", "modalities": {"mel": mel, "wave": audio}}
    tree["data"] |= {"audio": {"rate": 8000, "samples": 4000}}
    found = with_statistics(build_recipe(tree), manifest).model.model_dump()["inputs"]["modalities"]
    assert (found["mel"]["mean"], found["mel"]["std"]) == (
        *manifest.spectrograms[0].mean,
        *manifest.spectrograms[0].std,
    )
    assert (found["wave"]["mean"],) == manifest.statistics["audio"].mean
    mel["bins"] = 40
    with pytest.raises(UserError, match=r"--spectrogram rate=8000,window=2048,hop=1024,bins=40,low=80,high=4000"):
        with_statistics(build_recipe(tree), manifest)
    mel["spectrum"] = "power"
    with pytest.raises(UserError, match=r"spectrum = power, but .* measured with magnitude: set .*mel\.mean and"):
        with_statistics(build_recipe(tree), manifest)
