"""The stacks of a worker that makes no progress, and the operation in which it stands."""

import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Folder of our packages."""
OURS = ("perceiver", "pipelines", "cluster", "tune")
TORCH = "torch/distributed/"


def all_stacks() -> str:
    """Return the stacks of all threads of this process, innermost frame last, each below the name of its thread."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in frames.items()
    )


def operation(thread: threading.Thread) -> str:
    """Return what a thread is doing: its innermost frame of ours, and that of torch.distributed if it is below it."""
    frame = sys._current_frames().get(thread.ident or 0)
    below = ""
    for entry in reversed(traceback.extract_stack(frame) if frame is not None else []):
        file = Path(entry.filename)
        if f"/{TORCH}" in entry.filename:
            if not below and entry.name != "wrapper":  # c10d's decorator around each operation
                below = f"{entry.name} ({TORCH}{entry.filename.rpartition(f'/{TORCH}')[2]}:{entry.lineno})"
        elif file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in OURS:
            place = f"{entry.name} ({file.relative_to(ROOT)}:{entry.lineno})"
            return f"{below}, called by {place}" if below else place
    return below or "an unknown operation"


def by_operation(operations: Mapping[int, str]) -> str:
    """Return ranks by their operation: ``ranks 0, 1, 3 in sum (...); rank 2 in step (...)``; at most 8 are listed."""
    groups: dict[str, list[int]] = {}
    for rank, name in sorted(operations.items()):
        groups.setdefault(name, []).append(rank)
    return "; ".join(
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}"
        f"{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''} in {name}"
        for name, ranks in groups.items()
    )
