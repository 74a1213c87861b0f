"""Failures of workers as one line for the user."""

import re

EXIT_STOPPED = 130
"""Exit code of a stopped run, and of commands that waited for it."""


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
