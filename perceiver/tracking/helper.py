"""The process that imports MLflow for this one: one for each run, or one that all runs of a process share."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perceiver.tracking.sidecar import SharedSidecar, Sidecar

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "False",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
CODE = "from perceiver.tracking.mlflow_writer import main; main(load={load})"
NO_LOG = Path(os.devnull)
"""Where a helper writes whose run is not known yet."""

_share_helper = False
_shared: SharedSidecar | None = None


def share_helper() -> None:
    """Have all trackers of this process use one helper process, which then ends with this process.

    For a process that serves many runs one after the other: MLflow is imported once.
    """
    global _share_helper
    _share_helper = True


def start_helper(section: Any) -> None:
    """Start the helper of `share_helper` before its run is known: it imports MLflow while the recipe is checked.

    Args:
        section: the recipe's `tracking` section as it was read; without tracking nothing is started.
    """
    global _shared
    if _shared is None and not (isinstance(section, Mapping) and section.get("enabled") is False):
        share_helper()
        _shared = SharedSidecar(CODE.format(load=True), NO_LOG, ENVIRONMENT)
        _shared.start()


def helper_process(folder: Path, store: str = "", nice: int = 0) -> Sidecar:
    """The helper process; `store` is a URI to be opened, and created if missing, while it starts."""
    global _shared
    log, env = folder / "mlflow.log", {**ENVIRONMENT, "PERCEIVER_PREWARM": store}
    if _shared is not None and _shared.log == NO_LOG:
        _shared.log_to(log)
    if _share_helper and _shared is None:
        _shared = SharedSidecar(CODE.format(load=False), log, env, nice)
    if _shared is not None:
        return _shared
    return Sidecar(CODE.format(load=False), log, env, nice)
