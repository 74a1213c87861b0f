"""Handing weights from one trial to another: a small pointer travels through Tune, the checkpoint itself is copied."""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.record.run_folder import RunFolder
from perceiver.train.checkpoint.store import MANIFEST, CheckpointStore
from tune.space.space import Values

log = logging.getLogger(__name__)

POINTER = "pointer.json"
OVER_WAIT_S = 60.0


class Pointer(BaseModel):
    """What a trial gives Tune in place of a checkpoint: where the checkpoint lies."""

    number: int
    output: str
    name: str
    step: int
    values: Values = {}
    token: str

    def write(self, folder: str) -> None:
        """Write it into a folder of Tune's."""
        Path(folder, POINTER).write_text(self.model_dump_json())

    @classmethod
    def read(cls, folder: str) -> "Pointer":
        """Read what `write` wrote."""
        return cls.model_validate_json(Path(folder, POINTER).read_text())

    @property
    def folder(self) -> RunFolder:
        """Return the run folder of the trial it points to."""
        return RunFolder(self.output, self.name)


def take_over(own: RunFolder, pointer: Pointer) -> int | None:
    """Make another trial's checkpoint the only one of this trial's folder; return its step.

    Where that step is no longer kept, the newest one that verifies is taken. Nothing is done, and None returned, if
    this very exchange was made before (a trial that failed after it goes on from its own checkpoints) or if the other
    trial has none.
    """
    if own.facts().get("exchange") == pointer.token:
        return None
    _wait_until_over(own)
    store = pointer.folder.checkpoints
    step = pointer.step
    if step not in store.steps() or store.problems(step):
        newest = store.newest()
        if newest is None:
            log.warning("%s has no checkpoint to take over", pointer.folder.url)
            return None
        step = newest.step
    copy_checkpoint(store, own.checkpoints, step)
    own.note(exchange=pointer.token, taken_over={"from": pointer.name, "step": step})
    return step


def _wait_until_over(own: RunFolder) -> None:
    """Wait for the trial's former process to save for the last time: Ray has told it to end, but does not wait."""
    deadline = time.monotonic() + OVER_WAIT_S
    while own.facts().get("status") == "running" and time.monotonic() < deadline:
        time.sleep(0.1)


def copy_checkpoint(source: CheckpointStore, target: CheckpointStore, step: int) -> None:
    """Copy one checkpoint between stores, manifest last; all that the target had goes, once the copy is at hand."""
    with source.fetch(step) as local:
        files, manifest = source.manifest(step).files, source.fs.cat_file(f"{source.folder(step)}/{MANIFEST}")
        if target.fs.exists(target.root):
            target.fs.rm(target.root, recursive=True)
        for name in files:
            _put(target, local / name, f"{target.folder(step)}/{name}")
    target.fs.invalidate_cache()
    target.fs.pipe_file(f"{target.folder(step)}/{MANIFEST}", manifest)


def _put(target: CheckpointStore, path: Path, place: str) -> None:
    if target.local:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    else:
        target.fs.put_file(str(path), place)


def pointer_of(folder: RunFolder, number: int, values: Values, checkpoint: dict[str, Any]) -> Pointer:
    """Return the pointer to a checkpoint that a trial has announced."""
    step = int(checkpoint["step"])
    return Pointer(
        number=number,
        output=folder.output,
        name=folder.name,
        step=step,
        values=values,
        token=f"{folder.name}-{step}-{checkpoint['at']:.6f}",
    )
