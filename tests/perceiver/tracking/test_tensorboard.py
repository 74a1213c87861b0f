"""TensorBoard's event files contain the record of a run: each point once, also after a resume."""

import math
import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog

from perceiver.tracking.record import HISTORY
from perceiver.tracking.runs import open_tracker

Point = tuple[str, int, float]


def events(folder: Path) -> list[Event]:
    """Return the events of a run's only file: records of length (8 bytes), its checksum (4), content, checksum (4)."""
    (file,) = (folder / "tensorboard").iterdir()
    content, found = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def points(folder: Path) -> list[Point]:
    return [(value.tag, event.step, value.simple_value) for event in events(folder) for value in event.summary.value]


def test_a_resumed_run_has_one_curve_without_mlflow(tmp_path: Path) -> None:
    tracker = open_tracker(None, tmp_path, history="", tensorboard=True)
    for step in range(1, 7):
        tracker.log_metrics(step, {"train/loss": step / 2, "train/lr": 0.5}, time_s=1000.0 + step)
    tracker.log_metrics(4, {"eval/accuracy": math.nan})
    tracker.set_tag("token", "hunter2")
    tracker.close("stopped")
    found = points(tmp_path)
    assert [p for p in found if p[0] == "train/loss"] == [("train/loss", step, step / 2) for step in range(1, 7)]
    assert len(found) == 13 and found[-1][:2] == ("eval/accuracy", 4) and math.isnan(found[-1][2])
    assert [event.wall_time for event in events(tmp_path) if event.summary.value][0] == 1001.0

    checkpoint = "".join((tmp_path / HISTORY).read_text().splitlines(keepends=True)[:3])
    tracker = open_tracker(None, tmp_path, history=checkpoint, tensorboard=True)
    for step in range(4, 9):
        tracker.log_metrics(step, {"train/loss": 64.0})
    tracker.close("finished")
    losses = [p for p in points(tmp_path) if p[0] == "train/loss"]
    assert losses == [("train/loss", step, step / 2 if step < 4 else 64.0) for step in range(1, 9)]
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [0], "an open TensorBoard discards the points of the deleted file"
    assert sorted(path.name for path in (tmp_path / "tracking").iterdir()) == ["notes.jsonl", "tensorboard.log"]
