"""Trials whose MLflow record was cut off when the search was killed are sent by the resumed search."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tune.search import launch as search_launch
from tune.search.launch import _Tracking


def test_what_mlflow_lacks_of_ended_trials_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[tuple[str, Any]] = []
    monkeypatch.setattr(search_launch, "load_handle", lambda folder: True)
    monkeypatch.setattr(search_launch, "unsent", lambda folder: 3 if folder.name != "trial-001" else 0)
    monkeypatch.setattr(search_launch, "reconcile", lambda config, folder, status: sent.append((folder.name, status)))
    ended = [SimpleNamespace(number=n, status=s) for n, s in ((0, "failed"), (1, "failed"), (2, "stopped"))]
    launch = SimpleNamespace(
        record=SimpleNamespace(ended=lambda: ended),
        trials_url=str(tmp_path),
        tracking=None,
        background=SimpleNamespace(submit=lambda function, *args: function(*args)),
    )
    _Tracking(cast(Any, launch)).send_rest()
    assert sent == [("trial-000", "failed"), ("trial-002", "stopped")]
