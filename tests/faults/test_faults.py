"""The cheapest row of the fault table; `make faults` runs all of them."""

from pathlib import Path

import pytest

from tests.faults.scenarios import SCENARIOS


@pytest.mark.slow
def test_a_kill_at_any_stage_of_a_save_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    outcome = SCENARIOS["kill at each stage of a checkpoint write"](tmp_path, {})
    assert outcome.passed, outcome
