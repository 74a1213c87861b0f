"""Failures of workers as one line for the user."""

import re

EXIT_STOPPED = 130
"""Exit code of a stopped run, and of commands that waited for it."""


FINAL = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError, ValueError)
"""Errors of wrong values and of code: the same call raises them again."""


TRANSIENT = re.compile(r"connect|gloo|nccl|timed? ?out|memory|ray\.|OSError", re.IGNORECASE)
"""Part of a reason for a failure that a later start may not meet again."""


def is_final(error: BaseException) -> bool:
    """Return whether an error of a worker's set-up or first step would be raised again by the next start.

    Others, such as RuntimeError, may come from torch's connections, from a device or from a lack of memory.
    """
    from ray.exceptions import RayError

    return isinstance(error, FINAL) and not isinstance(error, OSError | RayError)


def failure_reason(error: BaseException) -> str:
    """Return one line about a failed `fit`: the first worker's own exception, without Ray's frames."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = sorted(failures.items())[0]
        cause = getattr(cause, "cause", None) or cause
        return f"worker {rank}: {one_line(cause)}"
    return one_line(getattr(error, "controller_failure", None) or error)


def one_line(error: BaseException) -> str:
    """Return the most informative line of an exception: the last exception of a traceback, otherwise the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Killed)\w*\b", line)]
    if named:
        return named[-1][:300]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
