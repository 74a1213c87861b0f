"""The record of a run: what was logged is in its files, whatever happens to process and disk."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from perceiver.storage import write_whole
from perceiver.tracking.record import HISTORY, NOTES, SENT, LineWriter, read_rows, unsent

CRASH = """
import sys
from pathlib import Path
from perceiver.tracking.record import LineWriter
writer = LineWriter(Path(sys.argv[1]))
for step in range(10**9):
    writer.append({"step": step})
    print(step, flush=True)
"""


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_rows(path, 0)[0]]


def test_every_row_survives_sigkill_and_a_truncated_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.jsonl"
    process = subprocess.Popen([sys.executable, "-c", CRASH, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reported = [int(process.stdout.readline()) for _ in range(200)][-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = steps(path)
    assert kept == list(range(len(kept))) and len(kept) > reported
    with path.open("ab") as file:
        file.write(b'{"step": 77')
    assert steps(path) == kept, "a line without its end is not read yet"
    writer = LineWriter(path)
    writer.append({"step": -1})
    assert steps(path) == [*kept, -1]


def test_rows_are_read_from_an_offset_on_in_parts(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path / "rows.jsonl")
    for step in range(3000):
        writer.append({"step": step, "text": "x" * 1000})
    seen: list[int] = []
    rows, end = read_rows(writer.path, 0)
    while rows:
        assert len(rows) < 3000
        seen += [row["step"] for row in rows]
        rows, end = read_rows(writer.path, end)
    assert seen == list(range(3000)) and end == writer.path.stat().st_size
    assert read_rows(tmp_path / "absent", 5) == ([], 5)


def test_numbers_that_are_not_finite_are_read_as_they_were_written(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path / "rows.jsonl")
    writer.append({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e-300})
    (row,), _ = read_rows(writer.path, 0)
    assert math.isnan(row["a"]) and [row[key] for key in "bcd"] == [math.inf, -math.inf, 1e-300]


def test_a_replacement_takes_the_place_of_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    writer = LineWriter(path, '{"step": 1}\n')
    writer.append({"step": 7})
    assert steps(path) == [1, 7]
    assert steps(LineWriter(path, "").path) == []


def test_a_full_disk_stops_nothing_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LineWriter(tmp_path / "rows.jsonl")
    writer.append({"step": 0})
    real, full = os.write, True

    def write(descriptor: int, data: bytes) -> int:
        return real(descriptor, data[:5] if full else data)

    monkeypatch.setattr(os, "write", write)
    writer.append({"step": 1})
    writer.append({"step": 2})
    assert writer.path.read_bytes() == b'{"step": 0}\n'
    full = False
    writer.append({"step": 3})
    assert steps(writer.path) == [0, 1, 2, 3]


def test_what_a_full_disk_lost_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = LineWriter(tmp_path / "rows.jsonl")
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    for step in range(3):
        writer.append({"step": step})
    writer.close()
    assert "3 lines" in caplog.text and str(writer.path) in caplog.text


def test_lines_that_mlflow_does_not_have_are_counted(tmp_path: Path) -> None:
    assert unsent(tmp_path) == 0
    for name in (HISTORY, NOTES):
        writer = LineWriter(tmp_path / name)
        for step in range(3):
            writer.append({"step": step})
    assert unsent(tmp_path) == 6
    size = (tmp_path / HISTORY).stat().st_size
    write_whole(tmp_path / SENT, json.dumps({"run_id": "x", HISTORY: size, NOTES: size // 3}))
    assert unsent(tmp_path) == 2
