"""Every name of Ray that is not public. Each function says what happens without it.

`PERCEIVER_PUBLIC_API=1` switches all of them off; so does a Ray version that has renamed them.
"""

import functools
import importlib
import logging
import os
import time
from typing import Any

log = logging.getLogger(__name__)

REST_S = 0.01
CONNECT_S, ANSWER_S = 5, 30
"""Seconds for a connection to the job server, and for its answer."""


def allowed() -> bool:
    """Return whether private names may be used."""
    return os.environ.get("PERCEIVER_PUBLIC_API") != "1"


@functools.cache
def _rest_between_steps() -> Any:
    """Return a callback that lets Ray Data's scheduling loop rest after each turn; None if this Ray has none."""
    try:
        base: Any = importlib.import_module("ray.data._internal.execution.execution_callback").ExecutionCallback
    except (ImportError, AttributeError):
        return None

    def on_execution_step(self: Any, executor: Any) -> None:
        time.sleep(REST_S)  # a turn takes one to two milliseconds

    # By this name the processes of the data tasks import it, which get the dataset's context.
    return type("RestBetweenSteps", (base,), {"on_execution_step": on_execution_step, "__module__": __name__})


def __getattr__(name: str) -> Any:
    # Made on use, so that importing this module does not import Ray.
    if name == "RestBetweenSteps" and (found := _rest_between_steps()) is not None:
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def rest_data_scheduler() -> None:
    """Have Ray Data's scheduling loop in this process rest between two turns.

    Without this the loop turns without a pause while finished rows wait for the training worker, which costs the worker
    half a core and its interpreter lock: 350 to 1,000 samples/s in place of 1,600 to 2,000 with a small model.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    callbacks = getattr(context, "custom_execution_callback_classes", None)
    rest = _rest_between_steps() if allowed() else None
    if rest is not None and callbacks is not None and rest not in callbacks:
        context.custom_execution_callback_classes = [*callbacks, rest]


def job_client_class() -> Any:
    """Return Ray's job client with a time-out for each request.

    Without this a job server that accepts a connection and does not answer blocks `perceiver submit`, `logs`, `status`
    and `stop` until Ctrl-C.
    """
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    if not allowed() or not hasattr(JobSubmissionClient, "_do_request"):
        return JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": (CONNECT_S, ANSWER_S), **options})

    return Client


def quiet_data_progress() -> None:
    """Keep Ray Data's remarks on its progress bars out of the log; without this there is one for each dataset."""
    if allowed():
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
