"""Weights & Biases gets the record of a run: offline with the real package, online with a stand-in for it."""

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from perceiver.config import UserError
from perceiver.tracking.record import WANDB, WANDB_LOG
from perceiver.tracking.runs import TrackingConfig, open_tracker
from perceiver.tracking.wandb_config import WandbConfig

RECIPE = {"name": "small", "optim": {"lr": 0.5}, "data": {"storage_options": {"secret": "hunter2hunter2"}}}


BLOCK, HEADER = 32_768, 7


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a `.wandb` file, LevelDB's log: 7 bytes, then blocks of 32 KiB with pieces of records.

    A piece has a checksum (4 bytes), its length (2), and its kind (1): 1 whole, 2 first, 3 middle, 4 last.
    """
    place, record = HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack("<4xHB", content[place : place + HEADER])
        record += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            yield record
            record = b""


def logged(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the configuration and the rows of a run's only offline folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    config, rows = {}, []
    for content in records(file.read_bytes()):
        record = Record.FromString(content)
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        items = record.history.item
        rows += (
            [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}] if items else []
        )
    return config, rows


@pytest.mark.slow
def test_offline_a_resumed_run_has_one_folder_with_each_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    request = WandbConfig(project="digits", mode="offline").request(tmp_path, RECIPE)
    for start, last, loss in ((1, 6, 1.0), (4, 8, 64.0)):
        lines = [json.dumps({"step": step, "time": 5.0, "train/loss": 1.0}) + "\n" for step in range(1, start)]
        tracker = open_tracker(None, tmp_path, history="".join(lines), wandb=request)
        for step in range(start, last + 1):
            tracker.log_metrics(step, {"train/loss": loss}, time_s=5.0)
        tracker.close("stopped")
    log = (tmp_path / WANDB_LOG).read_text()
    config, rows = logged(tmp_path)
    losses = [(step, 1.0 if step < 4 else 64.0) for step in range(1, 9)]
    assert [(row["step"], row["train/loss"]) for row in rows] == losses, log
    assert config["optim.lr"] == 0.5
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"0123456789" * 4 not in content and b"hunter2" not in content


class FakeRun(SimpleNamespace):
    rows: list[dict[str, float]] = []

    def define_metric(self, *_: str, **__: Any) -> None: ...

    def finish(self) -> None: ...

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Replace the package; return the arguments of each `wandb.init`."""
    starts: list[dict[str, Any]] = []
    module: Any = ModuleType("wandb")
    module.Settings = dict
    module.init = lambda **arguments: starts.append(arguments) or FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(FakeRun, "rows", [])
    sys.modules.pop("perceiver.tracking.wandb_writer", None)
    yield starts
    sys.modules.pop("perceiver.tracking.wandb_writer", None)


def test_online_a_resumed_run_sends_what_the_first_start_did_not(
    fake: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that run again are not sent again, as for MLflow; an evaluation may come late."""
    from perceiver.tracking.wandb_writer import RunWriter

    monkeypatch.setenv("WANDB_ENTITY", "team")
    request = WandbConfig().request(tmp_path, RECIPE)
    record = tmp_path / "history.jsonl"
    first = [{"step": step, "time": 1.0, "train/loss": step} for step in (1, 2, 3)]
    record.write_text("".join(json.dumps(row) + "\n" for row in [*first, {"step": 2, "time": 1.0, "eval/loss": 9}]))
    writer = RunWriter(request)
    writer.send()
    again = [{"step": step, "time": 2.0, "train/loss": -step} for step in (3, 4)]
    record.write_text("".join(json.dumps(row) + "\n" for row in [*first[:2], *again]))
    RunWriter(request).send()
    found = [(row["step"], key, row[key]) for row in FakeRun.rows for key in row if "/" in key]
    losses = [(step, "train/loss", step) for step in (1, 2, 3)]
    assert found == [*losses, (2, "eval/loss", 9), (4, "train/loss", -4)]
    assert len({start["id"] for start in fake}) == 1 == len(fake) - 1
    for start in fake:
        assert (start["project"], start["entity"], start["mode"], start["resume"]) == (
            "small",
            "team",
            "online",
            "allow",
        )
        assert start["settings"]["disable_git"] and "hunter2" not in str(start)
    assert json.loads((tmp_path / WANDB).read_text())["sent"] == {"train/loss": 4, "eval/loss": 2}


def test_online_needs_a_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"WANDB_API_KEY is not set.*tracking\.wandb\.mode=offline"):
        WandbConfig().check()
    WandbConfig(mode="offline").check()
    monkeypatch.setitem(os.environ, "WANDB_API_KEY", "x")
    WandbConfig().check()


@pytest.mark.parametrize("section", [{"project": "a/b"}, {"entity": " "}, {"mode": "dryrun"}, {"api_key": "x"}])
def test_bad_sections_are_refused(section: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        TrackingConfig.model_validate({"wandb": section})
