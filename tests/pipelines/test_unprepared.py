"""Data that are not prepared: what would hang or fill the memory is refused before it is read."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perceiver.config import UserError
from pipelines import unprepared
from pipelines.features import TextFeature
from pipelines.unprepared import Inputs, write_unprepared

TEXTS = Inputs("text", TextFeature())


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_fifo_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is a FIFO, a socket or a device: wanted a regular file"):
        write_unprepared([str(tmp_path / name)], (), TEXTS, str(tmp_path / "out"))


def test_a_table_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("wb") as file:
        file.truncate(600 * 2**20)
    with pytest.raises(UserError, match=r"a.csv has 629,145,600 bytes, more than"):
        write_unprepared([str(tmp_path / "a.csv")], (), TEXTS, str(tmp_path / "out"))


def test_too_many_samples_are_refused_before_they_are_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unprepared, "MOST_SAMPLES", 3)
    (tmp_path / "a.csv").write_text("text\n" + "a\n" * 4)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 4)
    (tmp_path / "a.txt").write_text("a\r\n" * 4)
    pq.write_table(pa.table({"text": pa.array([None] * 4, pa.string())}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.txt", "a.parquet"):
        with pytest.raises(UserError, match=rf"{name}: got more than 3 samples"):
            write_unprepared([str(tmp_path / name)], (), TEXTS, str(tmp_path / "out"))
    (tmp_path / "b.txt").write_text("a\r\nb\r\n")
    with pytest.raises(UserError, match=r"b.txt: got more than 3 samples with the places before it"):
        write_unprepared([str(tmp_path / "b.txt")] * 2, (), TEXTS, str(tmp_path / "out"))
    manifest, problems = write_unprepared([str(tmp_path / "b.txt")], ["c"], TEXTS, str(tmp_path / "out"))
    assert (manifest.split("all").samples, problems) == (3, [])
