"""Weights and run folders from outside: damage is one line from every command that reads them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from perceiver.cli import cli
from perceiver.config import UserError
from perceiver.export.weights import open_weights
from tests.cluster.recipes import prepare_images
from tests.perceiver.export.test_formats import SMALL, WORDS, export, run_folder

WEIGHTS = "model.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(run_folder(tmp_path / "run", SMALL, prepare_images(tmp_path, per_class=2))[0])


def refused(run: Path, message: str, tmp_path: Path) -> None:
    """Expect each command that reads weights to refuse the run in one line."""
    for words in (
        ["evaluate", str(run)],
        ["predict", str(run), str(tmp_path / "data"), "--to", str(tmp_path / "predicted")],
        ["export", str(run), "--format", "safetensors", "--to", str(tmp_path / "out")],
    ):
        with pytest.raises(UserError, match=message) as caught:
            CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_nan_or_infinite_are_named(run: Path, value: float, tmp_path: Path) -> None:
    tensors = load_file(run / WEIGHTS)
    tensors["latents"][0, 1] = value
    save_file(tensors, run / WEIGHTS)
    refused(run, rf"{WEIGHTS}: tensor latents has NaN or infinite values", tmp_path)


@pytest.mark.parametrize(
    "file, content",
    [
        ("run.json", b"{"),
        ("run.json", b"[1]"),
        ("run.json", b'{"step": 1, "step": 2}'),
        ("run.json", b'{"step": -1}'),
        ("run.json", b'{"step": "7"}'),
        ("run.json", b'{"evaluation": {"accuracy": "high"}}'),
        ("run.json", b'{"data": {"name": 3}}'),
        ("run.json", b"\xff"),
        ("run.json", b"[" * 99_999),
        ("recipe.yaml", b"a: [1"),
        ("recipe.yaml", b"- 1"),
        ("recipe.yaml", b"data: [1]"),
        ("recipe.yaml", b"\xff\xfe\xfd"),
        ("recipe.yaml", b"[" * 9999),
        ("recipe.yaml", b"model: {kind: nosuch}"),
        (WEIGHTS, b""),
        (WEIGHTS, b"\xff" * 90),
        (WEIGHTS, b"\x02" + bytes(7) + b"[]"),
    ],
)
def test_a_damaged_file_is_named(run: Path, file: str, content: bytes, tmp_path: Path) -> None:
    (run / file).write_bytes(content)
    refused(run, rf"{file}|{WEIGHTS}: model", tmp_path)


@pytest.mark.parametrize("file", ["run.json", "recipe.yaml", WEIGHTS])
@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_not_a_regular_file_is_not_opened(run: Path, file: str, kind: str, tmp_path: Path) -> None:
    (run / file).rename(tmp_path / "elsewhere")
    if kind == "fifo":
        os.mkfifo(run / file)
    elif kind == "link":
        (run / file).symlink_to(tmp_path / "elsewhere")
    else:
        (run / file).mkdir()
    refused(run, file, tmp_path)


def test_weights_of_another_shape_than_their_config_are_refused_before_a_model_is_built(run: Path) -> None:
    config = json.dumps({**open_weights(str(run)).model.model_dump(mode="json"), "latents": 1 << 24})  # type: ignore[union-attr]
    save_file(load_file(run / WEIGHTS), run / WEIGHTS, {"model": config})
    with pytest.raises(UserError, match=rf"got latents .*wanted .*\[{1 << 24}, "):
        open_weights(str(run)).build()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree: tree.update(transformers_weights="../elsewhere.safetensors"), ""),
        (lambda tree: tree.update(num_latents=1 << 30), "tensor perceiver.embeddings.latents"),
        (lambda tree: tree.update(d_latents=-1), r"config\.json"),
        (lambda tree: tree.update(architectures=["os.system"]), r"config\.json.*os\.system"),
        (lambda tree: tree.update(architectures=3), r"config\.json"),
        (lambda tree: tree.update(hidden_act="no\nsuch"), r"config\.json"),
    ],
)
def test_a_transformers_config_chooses_nothing_outside(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    pytest.importorskip("transformers")
    source, model = run_folder(tmp_path / "run", WORDS)
    export(source, "transformers", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    (tmp_path / "out" / "model.safetensors.index.json").write_text('{"weight_map": {"latents": "../x.safetensors"}}')
    (tmp_path / "out" / "adapter_config.json").write_text('{"base_model_name_or_path": "../elsewhere"}')
    if not message:
        found = open_weights(str(tmp_path / "out"))
        assert all(torch.equal(found.tensors[name], value) for name, value in model.state_dict().items())
        return
    with pytest.raises(UserError, match=message) as caught:
        open_weights(str(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_export_overwrites_only_what_it_wrote(run: Path, tmp_path: Path) -> None:
    export(str(run), "safetensors", tmp_path / "out")
    export(str(run), "safetensors", tmp_path / "out")
    words = ["export", str(run), "--format", "safetensors", "--to"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("notes")
    (tmp_path / "out" / WEIGHTS).write_bytes(b"better ones")
    for folder, file in (("mine", "README.md"), ("out", WEIGHTS), ("run", WEIGHTS)):
        before = {path: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        with pytest.raises(UserError, match=rf"--to .*{folder}: has .*did not write") as caught:
            CliRunner().invoke(cli, [*words, str(tmp_path / folder)], catch_exceptions=False, standalone_mode=False)
        assert "\n" not in str(caught.value) and (folder == "run" or file in str(caught.value))
        assert {path: path.read_bytes() for path in (tmp_path / folder).iterdir()} == before


@pytest.mark.parametrize("weights", ["ema", "last"])
def test_only_a_run_or_checkpoint_has_several_weights(run: Path, weights: Any) -> None:
    with pytest.raises(UserError, match=f"'{weights}' needs a run's folder"):
        open_weights(str(run / "model.safetensors"), weights)
