"""Training state on disk: damage in index and header is a one-line error, and only tensors are read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perceiver.config import UserError
from perceiver.train.checkpoint.shards import read_weights
from tests.perceiver.train.toy import toy_engine

SHARD = "shard-00000.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_engine().save(tmp_path)
    return tmp_path


def refused(folder: Path, message: str) -> None:
    """Expect loading and reading to refuse the folder in one line."""
    for read in (read_weights, toy_engine().load):
        with pytest.raises(UserError, match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def index_of(folder: Path) -> tuple[dict[str, torch.Tensor], list[Any]]:
    from safetensors import safe_open

    with safe_open(folder / SHARD, framework="pt") as file:
        return load_file(folder / SHARD), json.loads(file.metadata()["index"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index[0]["pieces"].pop(), "incomplete"),
        (lambda index: index[0]["pieces"].append(index[0]["pieces"][0]), "incomplete|in order"),
        (lambda index: index[0]["pieces"][0].__setitem__(3, 1 << 40), "elements up to"),
        (lambda index: index[0]["pieces"][0].__setitem__(2, -1), r"index: 0\.pieces\.0\.2"),
        (lambda index: index[0]["pieces"][0].__setitem__(1, 1), "incomplete|in order"),
        (lambda index: index[0]["pieces"][0].__setitem__(0, 7), r"index: 0\.pieces\.0\.0"),
        (lambda index: index[0].__setitem__("step", "x"), r"index: 0\.step"),
        (lambda index: index[-1].__setitem__("step", 9), "shards are of steps 0 to 9"),
        (lambda index: index.append({"step": 0, "pieces": []}), "has no tensor"),
    ],
)
def test_an_index_that_does_not_fit_its_tensors_is_refused(
    folder: Path, change: Callable[[list[Any]], Any], message: str
) -> None:
    tensors, index = index_of(folder)
    change(index)
    save_file(tensors, folder / SHARD, {"index": json.dumps(index)})
    refused(folder, message)


@pytest.mark.parametrize("text", ["", "{", "[" * 9999, "{}", "[1]"])
def test_an_index_that_is_none_is_refused(folder: Path, text: str) -> None:
    save_file(index_of(folder)[0], folder / SHARD, {"index": text})
    refused(folder, f"{SHARD}: index")


@pytest.mark.parametrize(
    "key, value",
    [
        ("writers", 0),
        ("writers", 2),
        ("writers", "1"),
        ("writers", 1 << 40),
        ("shapes", {"a": [1 << 50]}),
        ("shapes", 1),
    ]
    + [("format", 2), ("format", None)],
)
def test_a_header_out_of_range_is_refused(folder: Path, key: str, value: Any) -> None:
    path = folder / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    refused(folder, "engine.json|shard-00001")


def test_a_shape_larger_than_the_file_allocates_nothing(folder: Path) -> None:
    path = folder / "engine.json"
    tree = json.loads(path.read_text())
    name = next(name for name in tree["shapes"] if name.endswith("weight"))
    tree["shapes"][name] = [1 << 40, 1]
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"{1 << 40} elements of {name}"):
        read_weights(folder)


HEADERS = {
    "huge": b"\xff" * 7 + b"\x7f" + b"{}",
    "empty": b"",
    "short": b"\x02",
    "list": b"\x02" + bytes(7) + b"[]",
    "text": b"\x08" + bytes(7) + b"nothing!",
}


def header(**tensor: Any) -> bytes:
    """Return a file with one tensor of eight bytes."""
    text = json.dumps({"0.param": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **tensor}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


HEADERS |= {
    "outside": header(data_offsets=[0, 16]),
    "negative": header(data_offsets=[-8, 0]),
    "reversed": header(data_offsets=[8, 0]),
    "shape": header(shape=[3]),
    "overflow": header(shape=[1 << 62, 1 << 62]),
    "type": header(dtype="F33"),
    "gap": header(data_offsets=[4, 8], shape=[1]),
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("file", [SHARD, "rest.safetensors"])
def test_a_damaged_header_of_a_file_is_named(folder: Path, file: str, kind: str) -> None:
    (folder / file).write_bytes(HEADERS[kind])
    refused(folder, file)


@pytest.mark.parametrize("file", [SHARD, "rest.safetensors", "engine.json"])
@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_what_is_not_a_regular_file_is_not_opened(folder: Path, file: str, kind: str) -> None:
    path = folder / file
    path.rename(folder / "elsewhere")
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(folder / "elsewhere")
    refused(folder, file)
