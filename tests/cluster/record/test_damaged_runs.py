"""A run's folder of which one file is damaged: every verb that reads it ends with one line and an exit code."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import ray
import yaml
from safetensors.torch import save_file

from cluster.recipe.config import load_recipe
from perceiver.cli import cli
from perceiver.config import UserError
from perceiver.factory import build_model, model_config
from perceiver.optim.config import OptimConfig
from perceiver.storage import unusable_file
from perceiver.train.checkpoint.store import CheckpointStore, Snapshot
from tests.cluster.recipes import small_tree, write_recipe
from tests.perceiver.train.engine.torch_engine import TorchEngine
from tests.tune.searches import record, search_tree, trial, write_search

RUN, SEARCH, CHECKPOINT = "runs/small-001", "runs/hunt-001", "runs/small-001/checkpoints/step-00000005"
READERS = {
    f"{RUN}/run.json": ("train", "evaluate", "export", "predict"),
    f"{RUN}/recipe.yaml": ("train", "evaluate", "export"),
    f"{RUN}/model.safetensors": ("evaluate", "export"),
    f"{RUN}/lease/00000001.json": ("train",),
    f"{RUN}/history.jsonl": ("train",),
    f"{RUN}/logs/driver.log": ("train",),
    f"{RUN}/tracking/sent.json": ("train",),
    f"{CHECKPOINT}/manifest.json": ("train", "evaluate"),
    f"{CHECKPOINT}/engine.json": ("train",),
    f"{CHECKPOINT}/history.jsonl": ("train", "dry run"),
    f"{CHECKPOINT}/shard-00000.safetensors": ("train", "evaluate"),
    f"{SEARCH}/trials.json": ("tune", "dry run"),
    f"{SEARCH}/run.json": ("tune",),
    f"{SEARCH}/search.yaml": ("tune",),
    "shards/manifest.json": ("inspect", "train", "evaluate"),
}
"""The verbs that read a file. Those of jobs (`status`, `logs`, `stop`) ask the cluster and read no run."""
TEXTS = ("", "[1]", '{"step": NaN}', '{"step": -' + "9" * 5000 + "}", "[" * 5000)
TEXTS += ('{"step": "x", "format": [], "name": {}, "search": 3, "rows": 3}',)


def irregular(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no text, longest header": lambda path: path.write_bytes(b"\xff\xfe" * 64),
    "missing": lambda path: path.unlink(),
    "folder": irregular(Path.mkdir),
    "fifo": irregular(os.mkfifo),
    "dangling link": irregular(lambda path: path.symlink_to("nowhere")),
    "link to itself": irregular(lambda path: path.symlink_to(path.name)),
    "device": irregular(lambda path: path.symlink_to("/dev/zero")),
}
OF_TEXTS = {f"text {text[:20]!r}": lambda path, text=text: path.write_text(text) for text in TEXTS}


@pytest.fixture(scope="module")
def sound(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, a recipe, a run as if it had trained for five steps, and a search of two trials."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(images, home / "shards")
    tree = small_tree(home, "shards") | {"output": "runs"}
    recipe = load_recipe(str(write_recipe(home, tree)), ())
    values = recipe.model_dump(mode="json")
    run, search = home / RUN, home / SEARCH
    run.mkdir(parents=True)
    model = build_model(model_config(values["model"]), classes=2)
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    (run / "run.json").write_text(json.dumps({"name": "small-001", "step": 5, "status": "stopped"}))
    (run / "lease").mkdir()
    (run / "lease" / "00000001.json").write_text("{}")
    for name in ("history.jsonl", "logs/driver.log", "tracking/sent.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{}\n")
    save_file(model.state_dict(), run / "model.safetensors", {"format": "pt"})
    engine = TorchEngine(model, None, OptimConfig(), lambda step: 1.0)  # type: ignore[arg-type]
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    snapshot = Snapshot(5, 40, {"kind": "torch"}, shapes, values, {}, '{"step": 5}\n', {})
    assert CheckpointStore(str(run / "checkpoints")).save(engine, snapshot)
    search.mkdir()
    write_search(home, search_tree(home, "shards") | {"overrides": {"output": "runs"}})
    write_recipe(home, tree)
    (search / "search.yaml").write_text((home / "hunt.yaml").read_text())
    (search / "run.json").write_text(json.dumps({"name": "hunt-001", "status": "stopped"}))
    (search / "trials.json").write_text(record(trial(0, "finished", 0.5), trial(1, "running")).model_dump_json())
    return home


def end_of(*words: str) -> str:
    """Return how a command ends: its error, or an empty text; any other exception is a fault."""
    try:
        cli(list(words), standalone_mode=False)
    except (UserError, click.ClickException) as error:
        return str(error)
    except OSError as error:
        line = unusable_file(error)
        if line is None:
            raise
        return line
    return ""


@pytest.mark.parametrize("file", READERS)
def test_a_damaged_file_is_one_line_from_every_verb_that_reads_it(
    file: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ray(*_: object, **__: object) -> None:
        raise UserError("Ray would start")

    monkeypatch.setattr(ray, "init", no_ray)
    monkeypatch.setattr("perceiver.cli.tune.leave", lambda code: None)  # which ends the process
    monkeypatch.setenv("RAY_ADDRESS", "")
    verbs = {
        "train": ("train", "small.yaml", "--resume", "tracking.enabled=false"),
        "evaluate": ("evaluate", RUN, "shards", "data.executor=inline", "--batch", "64"),
        "export": ("export", RUN, "--format", "safetensors", "--to", "out"),
        "predict": ("predict", RUN, "shards", "--to", "predictions"),
        "tune": ("tune", "hunt.yaml", "--resume", "tracking.enabled=false"),
        "dry run": ("tune", "hunt.yaml", "--dry-run"),
        "inspect": ("inspect", "shards", "--no-samples"),
    }
    damages = DAMAGES if file.endswith(".safetensors") else {**OF_TEXTS, **DAMAGES}
    for name, damage in damages.items():
        for verb in READERS[file]:
            home = tmp_path / "home"
            shutil.copytree(sound, home)
            monkeypatch.chdir(home)
            damage(home / file)
            if verb == "evaluate" and "checkpoints" in file:
                (home / RUN / "model.safetensors").unlink()  # so that the checkpoint is read
            try:
                line = end_of(*verbs[verb])
            except Exception as error:
                raise AssertionError(f"{verb} with {file}, {name}") from error
            assert not (home / file).with_name("nowhere").exists(), f"{verb} with {file} has followed a link"
            assert "\n" not in line and len(line) < 1600, f"{verb} with {file}, {name}: {line}"
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(home)
