"""Checkpoints in the memory of other processes: the first level, above the store (`train.checkpoint_memory_every`).

Each rank's files, as the store would have them, go to a `PartHolder` on its own node and to one on another, so that any
one node may be lost. A holder keeps the last complete checkpoint and the one that arrives. A checkpoint is complete
when all ranks' parts of one save are there; it is then laid out in a local folder and read like any other.
`cluster.worker.peers` runs the holders as Ray actors.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError
from safetensors import SafetensorError

from perceiver.config import UserError
from perceiver.storage import file_sha256, first_line, parse_json
from perceiver.train.checkpoint.store import MANIFEST, CheckpointManifest, CheckpointStore, FileEntry, Snapshot, Staged
from perceiver.train.engine.protocol import Engine
from perceiver.train.hooks import History
from perceiver.train.loop import Flags, StepInfo

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
"""Bytes of a file that are sent at a time."""

Save = tuple[int, int]
"""Step and token of a save; a step that is saved again has another token."""


class Peer(Protocol):
    """A holder of parts, perhaps in another process, whose calls then may fail."""

    def begin(self, save: Save, rank: int, sizes: Mapping[str, int], keep: Save | None) -> None:
        """Expect files of a rank, given their sizes in bytes; discard all saves but this one and `keep`."""
        ...

    def add(self, save: Save, rank: int, name: str, offset: int, chunk: bytes) -> None:
        """Take a piece of a file."""
        ...

    def finish(self, save: Save, rank: int, manifest: str) -> None:
        """Take the manifest of a rank's part (JSON), which makes the part whole."""
        ...

    def held(self) -> dict[tuple[Save, int], str]:
        """Return the manifests of the whole parts by save and rank."""
        ...

    def read(self, save: Save, rank: int, name: str, offset: int, length: int) -> bytes:
        """Return a piece of a file."""
        ...


class PartHolder:
    """Holds parts in this process; see `Peer`."""

    def __init__(self) -> None:
        self._files: dict[tuple[Save, int], dict[str, bytearray]] = {}
        self._manifests: dict[tuple[Save, int], str] = {}

    def begin(self, save: Save, rank: int, sizes: Mapping[str, int], keep: Save | None) -> None:
        """See `Peer`."""
        self._files = {part: files for part, files in self._files.items() if part[0] in (save, keep)}
        self._manifests = {part: text for part, text in self._manifests.items() if part[0] in (save, keep)}
        self._files[save, rank] = {name: bytearray(size) for name, size in sizes.items()}
        self._manifests.pop((save, rank), None)

    def add(self, save: Save, rank: int, name: str, offset: int, chunk: bytes) -> None:
        """See `Peer`."""
        memoryview(self._files[save, rank][name])[offset : offset + len(chunk)] = chunk

    def finish(self, save: Save, rank: int, manifest: str) -> None:
        """See `Peer`."""
        if (save, rank) not in self._files:
            raise KeyError(f"no part of rank {rank} of save {save}")
        self._manifests[save, rank] = manifest

    def held(self) -> dict[tuple[Save, int], str]:
        """See `Peer`."""
        return self._manifests

    def read(self, save: Save, rank: int, name: str, offset: int, length: int) -> bytes:
        """See `Peer`."""
        return bytes(memoryview(self._files[save, rank][name])[offset : offset + length])


def send_part(peer: Peer, staged: Staged, manifest: CheckpointManifest, keep: Save | None) -> None:
    """Send a rank's staged files to a holder, in pieces."""
    save = staged.snapshot.step, staged.token
    peer.begin(save, staged.rank, {name: entry.bytes for name, entry in manifest.files.items()}, keep)
    for name in manifest.files:
        with (staged.folder / name).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                peer.add(save, staged.rank, name, file.tell() - len(chunk), chunk)
    peer.finish(save, staged.rank, manifest.model_dump_json())


@dataclass(frozen=True)
class Held:
    """A complete checkpoint in memory.

    Attributes:
        save: its step and token.
        manifest: with the files of all ranks.
        parts: for each file the rank of its part, and the holders that have the part.
    """

    save: Save
    manifest: CheckpointManifest
    parts: dict[str, tuple[int, list[Peer]]]


def find_held(peers: Sequence[Peer], lease: int) -> Held | None:
    """Return the newest complete checkpoint that workers of the driver with this number have sent; None without one.

    Holders that do not answer are skipped.
    """
    found: dict[Save, dict[int, tuple[CheckpointManifest, list[Peer]]]] = {}
    for peer in peers:
        try:
            answer = peer.held()
        except Exception as error:  # noqa: BLE001  its node is lost, or its process was killed
            log.warning("a holder of checkpoints in memory does not answer: %s", first_line(error))
            continue
        for (save, rank), text in answer.items():
            manifest = _parse(text)
            if manifest is not None and manifest.lease == lease and manifest.step == save[0]:
                found.setdefault(save, {}).setdefault(rank, (manifest, []))[1].append(peer)
    complete = [s for s, parts in found.items() if 0 in parts and parts.keys() >= set(range(parts[0][0].world))]
    if not complete:
        return None
    save = max(complete, key=lambda s: (s[0], found[s][0][0].created))
    parts = found[save]
    files = {name: entry for manifest, _ in parts.values() for name, entry in manifest.files.items()}
    places = {name: (rank, holders) for rank, (manifest, holders) in parts.items() for name in manifest.files}
    return Held(save, parts[0][0].model_copy(update={"files": files}), places)


def _parse(text: str) -> CheckpointManifest | None:
    try:
        return CheckpointManifest.model_validate(parse_json(text, "a checkpoint in memory"))
    except (ValidationError, UserError) as error:
        log.warning("a part of a checkpoint in memory is not used: %s", first_line(error))
        return None


def lay_out(held: Held, store: CheckpointStore) -> None:
    """Write a checkpoint in memory to a local store, in which it is one like any other.

    Raises:
        OSError: the disk is full, or no holder has a part any more.
        UserError: the files do not match their checksums.
    """
    folder = Path(store.folder(held.save[0]))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    for name, (rank, holders) in held.parts.items():
        _read_any(holders, held.save, rank, name, held.manifest.files[name].bytes, folder / name)
    (folder / MANIFEST).write_text(held.manifest.model_dump_json())
    if problems := store.problems(held.save[0]):
        raise UserError(f"the checkpoint of step {held.save[0]} in memory is damaged: {'; '.join(problems[:3])}")


def _read_any(holders: Sequence[Peer], save: Save, rank: int, name: str, size: int, target: Path) -> None:
    """Read a file, piece by piece, from holders that answer."""
    left = list(holders)
    with target.open("wb") as file:
        for offset in range(0, size, CHUNK_BYTES):
            file.write(_piece(left, save, rank, name, offset, min(CHUNK_BYTES, size - offset)))


def _piece(left: list[Peer], save: Save, rank: int, name: str, offset: int, length: int) -> bytes:
    """Return a piece of a file from the first holder that answers; remove those that do not."""
    while left:
        try:
            return left[0].read(save, rank, name, offset, length)
        except Exception as error:  # noqa: BLE001  its node is lost, or its process was killed
            log.warning("a holder of checkpoints in memory does not answer: %s", first_line(error))
            del left[0]
    raise OSError(f"no holder has {name} of step {save[0]} any more")


@dataclass
class MemoryCheckpointHook:
    """Sends each `every`-th step's state to other processes in the background; every rank has one.

    A step waits only until its state is on the local disk. Steps that are due while an earlier send is in progress on
    any rank are skipped. A send that fails costs that checkpoint; holders that fail are not asked again.

    Attributes:
        engine: its state is sent.
        staging: a store on this node's disk, in which the files are written first.
        every: steps between two checkpoints in memory.
        targets: the holders of this rank's node and another, then those that replace one that fails.
        snapshot: return what a checkpoint records.
        samples: return the sample ids up to a step, as a Parquet file.
        history: gets the share of time that steps waited, and the number of skipped ones, at recorded steps.
        log_every: steps between two records.
        failed: called with the reason when this rank loses a holder, or the first of some sends in a row fails.
        copies: holders that get each part.
        complete: the last complete save, which the holders keep until the next one is complete.
        skipped: number of steps that were due and skipped.
    """

    engine: Engine
    staging: CheckpointStore
    every: int
    targets: list[Peer]
    snapshot: Callable[[StepInfo], Snapshot]
    samples: Callable[[int], bytes]
    history: History
    log_every: int
    failed: Callable[[str], None] = log.warning
    copies: int = 2
    complete: Save | None = None
    skipped: int = 0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._sending: Save | None = None
        self._failure = self._failing = False
        self._notices: deque[str] = deque()
        self._waited = 0.0

    def flags(self) -> Flags:
        """Return this rank's part of `Flags`."""
        busy = self._thread is not None and self._thread.is_alive()
        return Flags(copying=busy, copy_failed=self._failure)

    def __call__(self, info: StepInfo) -> None:
        while self._notices:
            self.failed(self._notices.popleft())
        if self._sending is not None and not info.flags.copying:
            if not info.flags.copy_failed:
                self.complete = self._sending
            self._sending, self._failure = None, False
        if info.last or info.step % self.every:
            return
        if self._sending is not None:
            self.skipped += 1
        else:
            self._start(info)
        if self.engine.rank == 0 and info.step % self.log_every == 0:
            share = self._waited / (time.perf_counter() - self.started)
            figures = {"checkpoint_memory_stall_share": share, "checkpoint_memory_skipped": float(self.skipped)}
            self.history.record(info.step, {f"train/{name}": value for name, value in figures.items()})

    def join(self) -> None:
        """Wait for the send in progress, if there is one."""
        if self._thread is not None:
            self._thread.join()

    def _start(self, info: StepInfo) -> None:
        began = time.perf_counter()
        try:
            staged = self.staging.stage(self.engine, self.snapshot(info))
            self._sending = info.step, staged.token
            self._thread = threading.Thread(target=self._send, args=(staged,), name="checkpoint memory", daemon=True)
            self._thread.start()
        except (OSError, SafetensorError) as error:  # the other ranks may send
            self._sending = info.step, 0
            self._fail(info.step, error)
        self._waited += time.perf_counter() - began

    def _send(self, staged: Staged) -> None:
        step, keep = staged.snapshot.step, self.complete
        try:
            (staged.folder / f"samples-{staged.rank:05d}.parquet").write_bytes(self.samples(step))
            paths = sorted(path for path in staged.folder.iterdir() if path.is_file())
            files = {path.name: FileEntry(bytes=path.stat().st_size, sha256=file_sha256(path)) for path in paths}
            manifest = self.staging.manifest_of(staged, files)
            sent = 0
            while sent < self.copies and len(self.targets) > sent:
                try:
                    send_part(self.targets[sent], staged, manifest, keep)
                    sent += 1
                except Exception as error:  # noqa: BLE001  its node is lost, or its process was killed
                    del self.targets[sent]
                    self._notices.append(f"a holder of checkpoints in memory is lost ({first_line(error)})")
            if not sent:
                raise OSError("no holder is left")
            self._failing = False
        except Exception as error:  # noqa: BLE001  training continues without this checkpoint
            self._fail(step, error)
        finally:
            shutil.rmtree(staged.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other ranks of this node may still be reading theirs
                Path(staged.target).rmdir()

    def _fail(self, step: int, error: Exception) -> None:
        if not self._failing:
            self._notices.append(f"the checkpoint of step {step} in memory was not saved ({first_line(error)})")
        self._failure = self._failing = True
