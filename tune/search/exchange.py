"""Weights from one trial for another: Tune transports a small pointer, and the checkpoint is copied."""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.record.run_folder import RunFolder
from perceiver.storage import write_whole
from perceiver.train.checkpoint.store import MANIFEST, CheckpointStore
from tune.space.space import Values

log = logging.getLogger(__name__)

POINTER = "pointer.json"
OVER_WAIT_S = 60.0


class Pointer(BaseModel):
    """The location of a trial's checkpoint, which Tune gets in place of the checkpoint."""

    number: int
    output: str
    name: str
    step: int
    values: Values = {}
    token: str

    def write(self, folder: str) -> None:
        """Write the pointer into one of Tune's folders."""
        Path(folder, POINTER).write_text(self.model_dump_json())

    @classmethod
    def read(cls, folder: str) -> "Pointer":
        """Read a pointer."""
        return cls.model_validate_json(Path(folder, POINTER).read_text())

    @property
    def folder(self) -> RunFolder:
        """Return the run folder of the trial it points to."""
        return RunFolder(self.output, self.name)


def take_over(own: RunFolder, pointer: Pointer) -> int | None:
    """Make another trial's checkpoint the only one of this trial's folder; return its step.

    If that step is no longer kept, the newest valid one is used. Return None, and do nothing, if the exchange was done
    before (a trial that failed after it continues from its own checkpoints) or if the other trial has no checkpoint.
    """
    if own.facts().get("exchange") == pointer.token:
        return None
    _wait_until_over(own)
    store = pointer.folder.checkpoints
    step = pointer.step
    if step not in store.steps() or store.problems(step):
        newest = store.newest()
        if newest is None:
            log.warning("%s has no checkpoint for another trial", pointer.folder.url)
            return None
        step = newest.step
    copy_checkpoint(store, own.checkpoints, step)
    own.note(exchange=pointer.token, taken_over={"from": pointer.name, "step": step})
    return step


def _wait_until_over(own: RunFolder) -> None:
    """Wait for the last checkpoint of the trial's previous process, which Ray has stopped without waiting."""
    deadline = time.monotonic() + OVER_WAIT_S
    while own.facts().get("status") == "running" and time.monotonic() < deadline:
        time.sleep(0.1)


def copy_checkpoint(source: CheckpointStore, target: CheckpointStore, step: int) -> None:
    """Copy one checkpoint between stores, manifest last; the target's checkpoints are deleted after the download."""
    with source.fetch(step) as local:
        files, manifest = source.manifest(step).files, source.fs.cat_file(f"{source.folder(step)}/{MANIFEST}")
        if target.fs.exists(target.root):
            target.fs.rm(target.root, recursive=True)
        for name in files:
            _put(target, local / name, f"{target.folder(step)}/{name}")
    target.fs.invalidate_cache()
    write_whole(f"{target.folder(step)}/{MANIFEST}", manifest, target.fs)


def _put(target: CheckpointStore, path: Path, place: str) -> None:
    if target.local:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    else:
        target.fs.put_file(str(path), place)


def pointer_of(folder: RunFolder, number: int, values: Values, checkpoint: dict[str, Any]) -> Pointer:
    """Return the pointer to a checkpoint that a trial has reported."""
    step = int(checkpoint["step"])
    return Pointer(
        number=number,
        output=folder.output,
        name=folder.name,
        step=step,
        values=values,
        token=f"{folder.name}-{step}-{checkpoint['at']:.6f}",
    )
