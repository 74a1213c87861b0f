"""The cheapest rows of the fault table; `make faults` runs all of them."""

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.recipes import small_tree
from tests.faults.scenarios import SCENARIOS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fault_costs_what_is_promised(tmp_path: Path, images: str) -> None:
    tree: dict[str, Any] = small_tree(tmp_path, images)
    outcome = SCENARIOS["loss NaN: roll back"](tmp_path, tree)
    assert outcome.passed, outcome


@pytest.mark.slow
def test_a_kill_at_any_stage_of_a_save_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    outcome = SCENARIOS["kill at each stage of a checkpoint write"](tmp_path, {})
    assert outcome.passed, outcome
