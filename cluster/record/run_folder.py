"""The folder of a run: its name, its files, and how ``--resume`` finds it."""

import difflib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from perceiver.config import PLAIN_NAME, UserError
from perceiver.export.facts import FACTS, parse_facts
from perceiver.storage import (
    NotRegularError,
    RetryPolicy,
    cache_folder,
    check_no_link,
    check_own_file,
    entry_names,
    existing_file,
    first_line,
    is_local,
    open_folder,
    open_url,
    with_retries,
    write_whole,
)
from perceiver.tracking.record import FILES, HISTORY, LOG, RECORD, RUN, SENT
from perceiver.train.checkpoint.fence import Fence
from perceiver.train.checkpoint.store import CheckpointStore

RETRIES = RetryPolicy(attempts=5, backoff=1.0)
T = TypeVar("T")
WEIGHTS, REPORT, DRIVER_LOG = "model.safetensors", "report/index.html", "logs/driver.log"


def retried(fs: Any, what: str, work: Callable[[], T]) -> T:
    """Call `work`, on a remote store with the retries of `with_retries`."""
    return work() if is_local(fs) else with_retries(work, what, RETRIES)


@dataclass(frozen=True)
class RunFolder:
    """A run below ``output``: ``<output>/<name>/{run.json, recipe.yaml, checkpoints/, report/, ...}``.

    `fence` is the claim for which this process writes; without one it reads, or the run has no lease.
    """

    output: str
    name: str
    fence: Fence | None = None

    @property
    def url(self) -> str:
        """Return the URL or path of the run's folder."""
        return f"{self.output.rstrip('/')}/{self.name}"

    @property
    def local(self) -> Path:
        """Return the local folder for logs and metrics: the run's own if it is local, otherwise one in the cache.

        Runs of one name at two URLs have two folders there.
        """
        if "://" not in self.url:
            return Path(self.url)
        fs, path = open_url(self.url)
        if is_local(fs):
            return Path(path)
        return cache_folder("runs", f"{self.name}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}")

    def location(self, *parts: str) -> str:
        """Return the URL of a file or folder of the run."""
        return "/".join([self.url, *parts])

    @property
    def checkpoints(self) -> CheckpointStore:
        """Return the store of the run's checkpoints."""
        return CheckpointStore(self.location("checkpoints"), self.fence)

    def check_owner(self) -> None:
        """Raise `TakenOverError` if another driver has taken over the run."""
        if (fence := self.fence) is not None:
            taken_by = retried(fence.claims.fs, f"reading the lease of {self.url}", fence.taken_by)
            if taken_by:
                raise fence.error(taken_by)

    def write(self, part: str, data: str | bytes) -> None:
        """Write a file atomically, see `write_whole`.

        Raises:
            UserError: the file cannot be written.
            TakenOverError: another driver has taken over the run.
        """
        self.check_owner()
        fs, path = open_url(self.location(*part.split("/")))
        try:
            retried(fs, f"writing {self.location(part)}", lambda: write_whole(path, data, fs))
        except OSError as error:
            raise UserError(
                f"cannot write {self.location(part)} ({error.strerror or error}): set output= to a writable folder"
            ) from None

    def read(self, part: str) -> str | None:
        """Return a file's text, or None if it does not exist.

        Raises:
            UserError: it is a folder, FIFO or device, a link that leaves the run's folder, or not UTF-8.
        """
        fs, folder = open_url(self.url)
        try:
            content = retried(fs, f"reading {self.location(part)}", lambda: _bytes(fs, existing_file(fs, folder, part)))
            return None if content is None else content.decode()
        except (IsADirectoryError, UnicodeDecodeError, NotRegularError) as error:
            raise UserError(f"{self.location(part)} cannot be read ({first_line(error)}): restore it") from None

    def exists(self, part: str) -> bool:
        """Return whether a file exists."""
        fs, path = open_url(self.location(part))
        return retried(fs, f"looking for {self.location(part)}", lambda: fs.exists(path))

    def remove_parts(self, part: str, workers: int) -> None:
        """Delete the `part-<rank>.*` files in a folder of the run that workers of higher ranks wrote earlier.

        Args:
            part: the folder.
            workers: how many there are now; their files, and what they are writing, stay.
        """
        self.check_owner()
        fs, path = open_url(self.location(part))
        for name in entry_names(fs, path):
            if (found := re.fullmatch(r"part-(\d+)\.\w+", name)) and int(found[1]) >= workers:
                fs.rm(f"{path}/{name}")

    def facts(self) -> dict[str, Any]:
        """Return the contents of run.json; empty before the run has started.

        Raises:
            UserError: it is damaged.
        """
        return parse_facts(self.read(FACTS) or "{}", self.location(FACTS))

    def set_aside_record(self) -> None:
        """Rename the record of a deleted run of this URL, so that a new run does not take up its MLflow run."""
        for name in (HISTORY, RECORD):
            if (self.local / name).exists():
                (self.local / name).rename(self.local / f"{name}.before-{time.time_ns()}")

    def note(self, **facts: Any) -> None:
        """Add entries to run.json."""
        merged = {"name": self.name, "created": time.time(), **self.facts(), **facts}
        self.write(FACTS, json.dumps(merged, indent=1) + "\n")


def _bytes(fs: Any, path: str) -> bytes | None:
    return fs.cat_file(path) if fs.exists(path) else None


def named_run(output: str, name: str) -> RunFolder:
    """Return the folder of a run that the user names.

    Raises:
        UserError: the name is not a plain folder name.
    """
    if not re.fullmatch(PLAIN_NAME, name):
        raise UserError(f"--run {name!r} is not a plain name: use letters, digits, dot, dash and underscore")
    return RunFolder(output, name)


def new_run(output: str, name: str) -> RunFolder:
    """Return the folder of a new run, ``<name>-001`` or the next free number."""
    taken = [int(n[len(name) + 1 :]) for n in run_names(output, name)]
    return RunFolder(output, f"{name}-{max(taken, default=0) + 1:03d}")


def run_names(output: str, name: str) -> list[str]:
    """Return the runs of a recipe below ``output``, oldest first."""
    folder = open_folder(output)
    runs = [entry for entry in entry_names(folder.fs, folder.path) if re.fullmatch(re.escape(name) + r"-\d+", entry)]
    return sorted(runs, key=lambda run: int(run.rsplit("-", 1)[1]))


def find_run(output: str, recipe_name: str, run: str | None = None) -> RunFolder:
    """Return the run to resume: the named one, otherwise the newest of the recipe.

    Raises:
        UserError: there is no such run.
    """
    names = run_names(output, recipe_name)
    if run is None:
        if not names:
            raise UserError(f"--resume: no run of {recipe_name!r} below {output}: start one without --resume")
        return RunFolder(output, names[-1])
    folder = named_run(output, run)
    if not folder.facts():
        near = difflib.get_close_matches(run, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"its runs: {', '.join(names[-5:]) or 'none'}"
        raise UserError(f"no run {run!r} below {output}; {hint}")
    return folder


def choose_run(output: str, name: str, resume: bool, run: str | None = None) -> RunFolder:
    """Return the folder of a command's run: an existing one with ``resume``, otherwise a new one.

    Raises:
        UserError: there is no run to resume, ``run`` is not a plain name, a file that the run continues is not a
            regular file, or anything in the run's folder is a link.
    """
    if resume:
        folder = find_run(output, name, run)
    else:
        folder = named_run(output, run) if run else new_run(output, name)
    for part in (DRIVER_LOG, *FILES, SENT, RUN, LOG):
        check_own_file(folder.local / part)
    for parent, folders, files in os.walk(folder.local):
        for name in folders + files:
            check_no_link(Path(parent, name))
    return folder
