"""Evaluation and prediction with a trained model, in this process; one slow test uses Ray and actors."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml
from click.testing import CliRunner

from cluster.predict import inference
from cluster.predict.actors import default_workers
from cluster.predict.inference import predict
from cluster.predict.scoring import open_scoring, ray_for
from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.file import known_keys
from cluster.recipe.placement import Node
from cluster.recipe.resources import ClusterConfig
from perceiver.cli import cli
from perceiver.cli import evaluate as evaluate_verb
from perceiver.cli import predict as predict_verb
from perceiver.config import UserError
from perceiver.factory import build_model
from perceiver.storage import open_folder
from pipelines.features import AudioFeature, LabelsFeature
from pipelines.prepare import prepare
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, Split, arrow_schema, save_manifest
from tests.cluster.recipes import write_images
from tests.pipelines import toys
from tests.pipelines.recordings import sound_file


@pytest.fixture
def run(tree: dict[str, Any], tmp_path: Path) -> Path:
    """Return the folder of a run with random weights and its recipe; data is read in the process."""
    tree["data"]["executor"] = "inline"
    tree["train"]["global_batch"] = 16
    return write_run(tmp_path / "runs" / "small-001", tree, 2)


def write_run(folder: Path, tree: dict[str, Any], classes: int) -> Path:
    """Write the folder of a run with a recipe and random weights, the head's too, so that scores differ."""
    recipe = build_recipe(tree)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    torch.manual_seed(0)
    model = build_model(recipe.model, classes=classes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def call(verb: str, *arguments: Any) -> str:
    """Return the output of a command."""
    return CliRunner().invoke(cli, [verb, *map(str, arguments)], catch_exceptions=False).stdout


def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder).to_pylist()


def test_predictions_agree_with_evaluate(run: Path, tmp_path: Path) -> None:
    """The accuracy of the 40 predictions equals the evaluation's, and keys name the images."""
    scoring = open_scoring(str(run))
    figures = scoring.metrics()
    assert predict(scoring, str(tmp_path / "out")) == 40
    found = rows(tmp_path / "out")
    assert [row["sample_id"] for row in found] == list(range(40))
    right = sum(row["prediction"] == row["label"] for row in found)
    assert figures["accuracy"] == pytest.approx(right / 40)
    assert all(Path(row["key"]).parent.name == ("dark", "light")[row["label"]] for row in found)
    assert {row["class"] for row in found} <= {"dark", "light"}


def test_interrupted_predictions_are_continued(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "ROWS_PER_PART", 16)
    scoring = open_scoring(str(run))
    assert predict(scoring, str(tmp_path / "whole")) == 40
    parts = sorted((tmp_path / "whole").glob("part-*"))
    assert len(parts) == 3, "8 samples per forward pass, two passes per file"

    def stop(done: int, total: int) -> None:
        if done >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(scoring, str(tmp_path / "broken"), stop)
    assert predict(scoring, str(tmp_path / "broken")) == 8, "only the last part was missing"
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert predict(scoring, str(tmp_path / "broken")) == 0


def test_predictions_of_other_weights_are_not_mixed(run: Path, tmp_path: Path) -> None:
    predict(open_scoring(str(run)), str(tmp_path / "out"))
    weights = safetensors.torch.load_file(run / "model.safetensors")
    safetensors.torch.save_file({name: value + 1 for name, value in weights.items()}, run / "model.safetensors")
    with pytest.raises(UserError, match="weights = .*--to"):
        predict(open_scoring(str(run)), str(tmp_path / "out"))


def test_predictions_of_data_that_were_prepared_again_are_not_mixed(run: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "again", str(tmp_path / "out")
    for side in (12, 13):
        shutil.rmtree(data, ignore_errors=True)
        toys.write_images(data, {"test": [4]}, side=side)
        scoring = open_scoring(str(run), str(data), overrides=["data.image_size=[12, 12]"])
        if side == 12:
            assert predict(scoring, out) == 4
    with pytest.raises(UserError, match="content = .*--to"):
        predict(scoring, out)


@pytest.mark.parametrize("what", ["model", "task", "version"])
def test_predictions_of_another_model_task_or_version_are_not_mixed(
    what: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights and the data are the same."""
    predict(open_scoring(str(run)), str(tmp_path / "out"))
    overrides = ["task.label_smoothing=0.1"] if what == "task" else []
    if what == "model":
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        recipe["model"]["heads"] = 1
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if what == "version":
        monkeypatch.setattr(inference, "installed_version", lambda name: "another")
    with pytest.raises(UserError, match=f"{what} = .*--to"):
        predict(open_scoring(str(run), overrides=overrides), str(tmp_path / "out"))


def test_unprepared_data_that_were_replaced_are_not_mixed(run: Path, tmp_path: Path) -> None:
    """As many files under the same names."""
    raw = write_images(tmp_path / "raw", 4)
    call("predict", run, raw, "--to", tmp_path / "out")
    assert " 0 samples written" in call("predict", run, raw, "--to", tmp_path / "out")
    shutil.rmtree(raw)
    write_images(raw, 4, seed=1)
    done = CliRunner().invoke(cli, ["predict", str(run), str(raw), "--to", str(tmp_path / "out")])
    assert isinstance(done.exception, UserError) and "content = " in str(done.exception)


def test_other_files_are_not_mixed_with_predictions(run: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "part-00000.parquet").write_bytes(b"what training left")
    with pytest.raises(UserError, match=r"part-00000.parquet.*--to"):
        predict(open_scoring(str(run)), str(tmp_path / "theirs"))


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1, "a": 2}', None])
def test_damaged_facts_are_refused_before_the_model_is_loaded(content: str | None, tmp_path: Path) -> None:
    facts = tmp_path / "out" / inference.FACTS
    facts.parent.mkdir()
    facts.write_text(content) if content else os.mkfifo(facts)
    done = CliRunner().invoke(cli, ["predict", "no-run", "no-data", "--to", str(tmp_path / "out")])
    assert isinstance(done.exception, UserError) and inference.FACTS in str(done.exception)


def test_a_file_of_predictions_that_is_a_fifo_is_refused(run: Path, tmp_path: Path) -> None:
    scoring = open_scoring(str(run))
    predict(scoring, str(tmp_path / "out"))
    part = next((tmp_path / "out").glob("part-*"))
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(UserError, match=f"{part.name} is not a regular file.*--to"):
        predict(scoring, str(tmp_path / "out"))


@pytest.mark.parametrize("target", ["", os.devnull, "http://127.0.0.1:1/x", "reference://x", "foo://x"])
@pytest.mark.parametrize("verb", ["predict", "export"])
def test_a_target_that_cannot_be_used_is_refused_before_the_model_is_loaded(verb: str, target: str) -> None:
    more = ["no-data"] if verb == "predict" else ["--format", "onnx"]
    done = CliRunner().invoke(cli, [verb, "no-run", *more, "--to", target])
    assert isinstance(done.exception, UserError) and repr(target)[1:-1] in str(done.exception)
    assert "no-run" not in str(done.exception)


def test_a_batch_has_no_more_samples_than_the_split(run: Path) -> None:
    assert open_scoring(str(run), batch=65_536).batch == 40


def test_data_that_does_not_fit_is_refused(run: Path, tmp_path: Path) -> None:
    raw = write_images(tmp_path / "raw", per_class=4)
    shutil.copytree(raw / "train" / "dark", raw / "train" / "dim")
    prepare("image_folder", str(raw), str(tmp_path / "other"))
    runner = CliRunner()
    with pytest.raises(UserError, match=r"other has \d classes.* 2"):
        runner.invoke(evaluate_verb.command, [str(run), str(tmp_path / "other")], catch_exceptions=False)
    with pytest.raises(UserError, match="recipe"):
        (run / "recipe.yaml").unlink()
        open_scoring(str(run / "model.safetensors"))


def test_the_commands(run: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(evaluate_verb.command, [str(run), "data.eval_crop=1.0", "--json"], catch_exceptions=False)
    assert json.loads(shown.output)["samples"] == 40
    url = yaml.safe_load((run / "recipe.yaml").read_text())["data"]["url"]
    shown = runner.invoke(
        predict_verb.command, [str(run), url, "--split", "train", "--to", str(tmp_path / "out")], catch_exceptions=False
    )
    assert "80 samples written" in shown.output


@pytest.mark.parametrize("verb", ["evaluate", "predict", "train", "doctor", "plan", "reproduce"])
def test_examples_in_the_help_name_keys_of_a_recipe(verb: str) -> None:
    """An example once used `data.video.eval_clips=16`, which every recipe refuses."""
    shown = cli.get_command(click.Context(cli), verb)
    assert shown is not None and shown.epilog
    keys = re.findall(r"(?<!--option)\s'?([a-z_]+(?:\.[a-z_]+)*)=", shown.epilog)
    assert not set(keys) - set(known_keys(Recipe))
    assert verb != "evaluate" or "data.clip.eval_clips" in keys


def test_the_batch_is_that_of_evaluations_in_training(tree: dict[str, Any], tmp_path: Path) -> None:
    """16 per step, in micro-batches of 4 on each of 2 workers; with two clips per sample 2."""
    tree["data"].update(executor="inline")
    tree["train"].update(global_batch=16, micro_batch=4)
    run = str(write_run(tmp_path / "run", tree, 2))
    assert open_scoring(run).batch == 4
    assert open_scoring(run, overrides=["data.clip.eval_clips=2"]).batch == 2
    assert open_scoring(run, overrides=["data.clip.eval_clips=100"]).batch == 1


def other_names(folder: Path) -> str:
    """Prepare data with the classes noon and dusk; return the folder."""
    raw = write_images(folder / "raw-other", per_class=4)
    for split in ("train", "test"):
        for old, new in (("dark", "dusk"), ("light", "noon")):
            (raw / split / old).rename(raw / split / new)
    prepare("image_folder", str(raw), str(folder / "other"))
    return str(folder / "other")


@pytest.mark.parametrize("recorded", [True, False])
def test_predictions_have_the_class_names_of_the_run(recorded: bool, run: Path, tmp_path: Path) -> None:
    """The names are those recorded with the run, or of its training data; never those of the predicted data."""
    names = ["black", "white"] if recorded else ["dark", "light"]
    if recorded:
        facts = {"name": "small", "licence": "none", "source": "made up", "classes": names}
        (run / "run.json").write_text(json.dumps({"data": facts}))
    scoring = open_scoring(str(run), other_names(tmp_path))
    predict(scoring, str(tmp_path / "out"))
    assert all(row["class"] == names[row["prediction"]] for row in rows(tmp_path / "out"))
    assert "dusk, noon" in scoring.note() and ", ".join(names) in scoring.note()
    assert bool(open_scoring(str(run)).note()) == recorded


def test_unknown_class_names_are_left_out_with_a_note(run: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["url"] = str(tmp_path / "gone")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shown = CliRunner().invoke(cli, ["predict", str(run), other_names(tmp_path), "--to", str(tmp_path / "out")])
    assert "no names of classes" in shown.stderr
    assert "class" not in rows(tmp_path / "out")[0]


def test_classes_in_another_order_are_refused(run: Path) -> None:
    facts = {"name": "small", "licence": "none", "source": "made up", "classes": ["light", "dark"]}
    (run / "run.json").write_text(json.dumps({"data": facts}))
    with pytest.raises(UserError, match="0 is dark .* light"):
        call("evaluate", run)


def test_bad_samples_stay_listed_after_an_interruption(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images 3, 25 and 39 of 40 are damaged, in files of 16; those of a file are listed once it exists."""
    monkeypatch.setattr(inference, "ROWS_PER_PART", 16)
    toys.write_images(tmp_path / "data", {"test": [40]}, bad=(3, 25, 39), side=12)
    out, arguments = tmp_path / "out", (str(run), str(tmp_path / "data"))
    scoring = open_scoring(*arguments, overrides=["data.max_bad_fraction=0.06"])

    def listed() -> list[int]:
        return [
            row["sample_id"]
            for path in sorted((out / "_quarantine").iterdir())
            for row in pq.read_table(path).to_pylist()
        ]

    def stop(done: int, total: int) -> None:
        if done >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(scoring, str(out), stop)
    assert listed() == [3, 25]
    assert predict(scoring, str(out)) == 7, "a budget of ceil(40 x 0.06) = 3 allows all three"
    assert listed() == [3, 25, 39] and [row["sample_id"] for row in rows(out)] == sorted({*range(40)} - {3, 25, 39})
    (out / "part-000002.parquet").unlink()
    lower = open_scoring(*arguments, overrides=["data.max_bad_fraction=0.05"])
    for place in (tmp_path / "new", out):  # the first writes the facts that the second continues with
        with pytest.raises(UserError, match="3 bad samples .*data.max_bad_fraction"):
            predict(lower, str(place))
        shutil.copy(tmp_path / "new" / "_predictions.json", out)


def test_an_export_gives_the_same_results_as_the_run(run: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["tracking"]["uri"] = "https://me:hidden@example.org"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "exported"
    call("export", run, "--format", "safetensors", "--to", out)
    assert "hidden" not in (out / "recipe.yaml").read_text()
    figures = [json.loads(call("evaluate", place, "--json")) for place in (run, out, out / "model.safetensors")]
    assert all({**each, "run": ""} == {**figures[0], "run": ""} for each in figures) and "accuracy" in figures[0]
    for place, target in ((run, "a"), (out, "b")):
        call("predict", place, recipe["data"]["url"], "--to", tmp_path / target)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    call("export", out, "--format", "safetensors", "--to", tmp_path / "again")
    again = json.loads(call("evaluate", tmp_path / "again", "--json"))
    assert {**again, "run": ""} == {**figures[0], "run": ""}


def write_sounds(folder: Path, samples: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Prepare noise of 400 samples at 1 kHz with any number of labels; return both as arrays."""
    rng = np.random.default_rng(3)
    sounds = rng.integers(-30_000, 30_000, (samples, 400)).astype(np.int16)
    labels = rng.random((samples, classes)) < 0.4
    features = {"audio": AudioFeature(), "label": LabelsFeature()}
    target = open_folder(str(folder))
    with ShardWriter(target, "test-0.arrow", arrow_schema(features), 8) as writer:
        for number, (sound, label) in enumerate(zip(sounds, labels, strict=True)):
            found = np.flatnonzero(label).tolist()
            writer.write([{"key": f"{number}", "audio": sound_file(sound, 1000), "label": found}])
        shard = writer.close()
    assert shard is not None
    save_manifest(
        Manifest(
            name="noise",
            features=features,
            classes=tuple("abcde"[:classes]),
            licence="none",
            splits={"test": Split(shards=(shard,))},
            source="made up",
        ),
        target,
    )
    return sounds, labels


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean, over the positives, of the share of positives among the samples with at least that score."""
    return float(np.mean([truth[scores >= scores[positive]].mean() for positive in np.flatnonzero(truth)]))


def test_clips_and_average_precision_agree_with_numpy(tree: dict[str, Any], tmp_path: Path) -> None:
    """24 sounds with several labels, three clips each; predicted clip by clip here, all at once by the command."""
    sounds, labels = write_sounds(tmp_path / "noise", 24, 5)
    tree["data"] = {"url": str(tmp_path / "noise"), "executor": "inline", "audio": {"rate": 1000, "samples": 64}}
    tree["model"]["inputs"] = {"kind": "audio", "samples": 64, "patch": 8, "positions": {"kind": "fourier", "bands": 2}}
    tree["task"] = {"kind": "tagging"}
    run = write_run(tmp_path / "run", tree, 5)
    model = open_scoring(str(run)).saved.build()
    with torch.no_grad():
        clips = [
            model(torch.from_numpy(sounds[:, start : start + 64].copy())).double().sigmoid().numpy()
            for start in (0, 168, 336)
        ]
    scores = np.mean(clips, 0)
    exact = np.mean([average_precision(scores[:, k], labels[:, k]) for k in range(5)])
    found = json.loads(call("evaluate", run, "data.clip.eval_clips=3", "--json"))
    assert found["mean_average_precision"] == pytest.approx(exact, abs=found["mean_average_precision_error"] + 1e-9)
    assert found["mean_average_precision_error"] < 0.05 and found["samples"] == 24
    middle = json.loads(call("evaluate", run, "--json"))
    assert middle["mean_average_precision"] != pytest.approx(exact, abs=0.01), "one clip has another result"
    call("predict", run, tmp_path / "noise", "data.clip.eval_clips=3", "--to", tmp_path / "out")
    np.testing.assert_allclose([row["probability"] for row in rows(tmp_path / "out")], scores, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "cluster", "joined", "wanted"),
    [
        ([{"CPU": 2}], {}, False, 0),
        ([{"CPU": 16, "GPU": 1}], {}, False, 0),
        ([{"CPU": 16, "GPU": 4}], {}, False, 4),
        ([{"CPU": 8}, {"CPU": 8, "GPU": 1}], {}, True, 1),
        ([{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}], {"gpus_per_worker": 2}, True, 4),
        ([{"CPU": 8}, {"CPU": 8}, {"CPU": 8}], {}, True, 3),
        ([{"CPU": 8}, {"CPU": 8}, {"CPU": 8}], {"worker_labels": {"number": "1"}}, True, 1),
    ],
)
def test_the_default_number_of_actors_follows_the_nodes(
    nodes: list[dict[str, float]], cluster: dict[str, Any], joined: bool, wanted: int
) -> None:
    there = [Node(f"10.0.0.{number}", resources, {"number": str(number)}) for number, resources in enumerate(nodes)]
    assert default_workers(ClusterConfig(**cluster), there, joined) == wanted


def test_actors_are_refused_if_the_data_is_read_without_ray(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--workers 2 .*data.executor=ray"):
        predict(open_scoring(str(run)), str(tmp_path / "out"), workers=2)


@pytest.mark.slow
def test_two_actors_write_the_same_files_as_one_process_also_after_a_stop(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some images are damaged; a part of the actors' files is written by the process, which continues their work."""
    monkeypatch.setattr(inference, "ROWS_PER_PART", 16)
    toys.write_images(tmp_path / "data", {"test": [40]}, bad=(3, 25), side=12)
    scoring = open_scoring(str(run), str(tmp_path / "data"), overrides=["data.executor=ray", "data.max_bad_fraction=1"])
    assert scoring.batch == 8
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with ray_for(scoring):
        with pytest.raises(KeyboardInterrupt):
            predict(scoring, str(out), stop, workers=2)
        assert [path.name for path in sorted(out.glob("part-*"))] == ["part-000000.parquet"]
        first = (out / "part-000000.parquet").stat()
        assert predict(scoring, str(out), workers=2) == 23
        monkeypatch.setattr("cluster.predict.actors.cluster_cpus", lambda: 1.0)
        with pytest.raises(UserError, match="--workers 3.* cluster.workers .* 1 CPUs"):
            predict(scoring, str(tmp_path / "many"), workers=3)
    assert (out / "part-000000.parquet").stat() == first, "not written again"
    here = open_scoring(str(run), str(tmp_path / "data"), overrides=["data.max_bad_fraction=1"])
    assert predict(here, str(tmp_path / "here")) == 38
    for name in ("", "_quarantine"):
        for path in (tmp_path / "here" / name).glob("part-*"):
            ours, theirs = pq.read_table(path), pq.read_table(out / name / path.name)
            assert theirs.drop_columns("probability" if not name else []).equals(
                ours.drop_columns("probability" if not name else [])
            )
            if not name:
                np.testing.assert_allclose(*(table["probability"].to_pylist() for table in (ours, theirs)), rtol=1e-5)
