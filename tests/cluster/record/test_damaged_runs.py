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

CHECKPOINT = "checkpoints/step-00000005"
FILES = ("run.json", "recipe.yaml", "model.safetensors", "lease.json", f"{CHECKPOINT}/manifest.json")
FILES += (f"{CHECKPOINT}/engine.json", f"{CHECKPOINT}/history.jsonl", f"{CHECKPOINT}/shard-00000.safetensors")
TEXTS = ("", "[1]", "\0", '{"step": NaN}', '{"step": -' + "9" * 5000 + "}", "[" * 5000)
TEXTS += ('{"step": "x", "format": [], "name": {}}',)


def irregular(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"text {text[:20]!r}": lambda path, text=text: path.write_text(text) for text in TEXTS},
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe" * 64),
    "longest header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()),
    "missing": lambda path: path.unlink(),
    "folder": irregular(Path.mkdir),
    "fifo": irregular(os.mkfifo),
    "dangling link": irregular(lambda path: path.symlink_to("nowhere")),
    "link to itself": irregular(lambda path: path.symlink_to(path.name)),
    "device": irregular(lambda path: path.symlink_to("/dev/zero")),
}


@pytest.fixture(scope="module")
def sound(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe and a run, as if it had trained for five steps."""
    home = tmp_path_factory.mktemp("home")
    tree = small_tree(home, images)
    path = write_recipe(home, tree)
    recipe = load_recipe(str(path), ())
    values = recipe.model_dump(mode="json")
    run = home / "runs" / "small-001"
    run.mkdir(parents=True)
    model = build_model(model_config(values["model"]), classes=2)
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    (run / "run.json").write_text(json.dumps({"name": "small-001", "step": 5, "status": "stopped"}))
    (run / "lease.json").write_text("{}")
    save_file(model.state_dict(), run / "model.safetensors", {"format": "pt"})
    engine = TorchEngine(model, None, OptimConfig(), lambda step: 1.0)  # type: ignore[arg-type]
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    snapshot = Snapshot(5, 40, {"kind": "torch"}, shapes, values, {}, '{"step": 5}\n', {})
    assert CheckpointStore(str(run / "checkpoints")).save(engine, snapshot)
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


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_one_line_from_every_verb(
    file: str, sound: Path, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ray(*_: object, **__: object) -> None:
        raise UserError("Ray would start")

    monkeypatch.setattr(ray, "init", no_ray)
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "runs"
    run = output / "small-001"
    verbs = {
        "train": ("train", str(sound / "small.yaml"), "--resume", f"output={output}", "tracking.enabled=false"),
        "evaluate": ("evaluate", str(run), images, "data.executor=inline", "--batch", "64"),
        "export": ("export", str(run), "--format", "safetensors", "--to", str(tmp_path / "out")),
        "predict": ("predict", str(run), images, "--to", str(tmp_path / "predictions")),
    }
    for name, damage in DAMAGES.items():
        for verb, words in verbs.items():
            if file != "run.json" and verb == "predict":  # which opens a run as `evaluate` does
                continue
            shutil.rmtree(output, ignore_errors=True)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            shutil.copytree(sound / "runs", output)
            damage(run / file)
            try:
                line = end_of(*words)
            except Exception as error:
                raise AssertionError(f"{verb} with {file}, {name}") from error
            assert "\n" not in line and len(line) < 1600, f"{verb} with {file}, {name}: {line}"
