"""The cheapest row of the fault table, and the table's repetitions; `make faults` runs all rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults import __main__ as program
from tests.faults.job import Outcome
from tests.faults.record import summary
from tests.faults.scenarios import SCENARIOS


@pytest.mark.slow
def test_a_kill_at_any_stage_of_a_save_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    outcome = SCENARIOS["kill at each stage of a checkpoint write"](tmp_path, {})
    assert outcome.passed, outcome


def test_an_interrupted_table_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The median of three, one of which was run before the interruption; outcomes of another commit do not count."""
    seconds = iter([1.0, 9.0, 2.0, 4.0])

    def row(folder: Path, tree: dict[str, Any]) -> Outcome:
        found = next(seconds)
        if found == 9.0:
            raise KeyboardInterrupt
        return Outcome("a fault", detected_s=found, steps_lost=0)

    monkeypatch.setattr(program, "chosen", lambda names: {"a fault": row})
    monkeypatch.setattr(program, "prepare_images", str)
    monkeypatch.setattr(program, "version", lambda: "new")
    record = tmp_path / "outcomes.jsonl"
    record.write_text(json.dumps({"row": "a fault", "version": "old", "fault": "a fault", "detected_s": 99.0}) + "\n")
    words = ["a fault", "--repeat", "3", "--record", str(record)]
    with pytest.raises(KeyboardInterrupt):
        program.main(words)
    assert program.main(words) == 0
    assert "| a fault | 2.0 (1.0 to 4.0) | - | 0 (0 to 0) | - | 3 of 3 |" in capsys.readouterr().out
    assert next(seconds, None) is None and program.main(words) == 0, "all three are there"


def test_a_row_that_failed_once_says_so() -> None:
    outcomes = [Outcome("a", first_step_s=3.0), Outcome("a", failures=["no step lost"])]
    assert summary(outcomes) == ("a", "-", "3.0 (3.0 to 3.0)", "-", "-", "NO, 1 of 2: no step lost")
    assert summary(outcomes[:1]) == ("a", "-", "3.0", "-", "-", "yes")
