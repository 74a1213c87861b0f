"""The store of checkpoints. A folder is a checkpoint once its manifest, written last, lists every file and checksum.

Layout at the store's URL (any fsspec URL)::

    step-00000120/
        ...                     files of the engine, one set per rank
        history.jsonl           the metrics recorded so far (rank 0)
        receipt-00000-TOKEN.json  size and SHA-256 of the files of one rank, for one attempt to save
        manifest.json           written last; without it the folder is not a checkpoint

A manifest has the number of the driver that wrote it. A step that an earlier driver has reached after a later one had
started from a step before it does not count (`perceiver.train.checkpoint.fence`).
"""

import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perceiver.config import Config, UserError
from perceiver.storage import (
    Checksum,
    FileName,
    NonNegativeCount,
    NotRegularError,
    PositiveCount,
    PrintableName,
    StrictNumber,
    cache_folder,
    entry_names,
    existing_file,
    file_sha256,
    invalid_key,
    is_local,
    open_url,
    parse_json,
    write_whole,
)
from perceiver.train.checkpoint.fence import Claims, Fence, Owner
from perceiver.train.checkpoint.shards import HEADER, parse_header, shard_name
from perceiver.train.engine.protocol import Engine

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
HISTORY = "history.jsonl"
T = TypeVar("T")
R = TypeVar("R")

READERS = 16
"""Requests at a time: at a store with slow answers, those for each file and each incomplete folder would add up."""


class FileEntry(Config):
    """One file of a checkpoint."""

    bytes: NonNegativeCount
    sha256: Checksum


class CheckpointManifest(Config):
    """Contents and origin of a checkpoint."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # A metric may be NaN.

    format: PositiveCount = Field(default=FORMAT, description="version of this layout")
    step: NonNegativeCount = Field(description="number of optimizer steps")
    samples: NonNegativeCount = Field(description="training samples consumed: the position in the sample plan")
    world: PositiveCount = Field(description="number of workers")
    engine: dict[str, Any] = Field(description="kind of engine and its ZeRO stage")
    parameters: dict[PrintableName, list[PositiveCount]] = Field(description="name and shape of each parameter")
    recipe: dict[str, Any] = Field(description="the resolved recipe, secrets redacted")
    versions: dict[str, str] = Field(description="versions of the libraries")
    metrics: dict[PrintableName, StrictNumber] = Field(
        default={}, description="metrics of this step and of its evaluation, if any"
    )
    number: NonNegativeCount = Field(default=0, description="number of earlier checkpoints of the run")
    lease: NonNegativeCount = Field(default=0, description="number of the driver's claim of the run, 0 without one")
    recent_losses: list[StrictNumber] = Field(default=[], description="losses that `train.on_spike` compares with")
    created: StrictNumber = Field(allow_inf_nan=False, description="seconds since the epoch")
    files: dict[FileName, FileEntry] = Field(description="files in the folder")


class HistoryRow(BaseModel):
    """A line of the history: metrics by name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, StrictNumber]

    step: NonNegativeCount


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint records in addition to the engine's files."""

    step: int
    samples: int
    engine: Mapping[str, Any]
    parameters: Mapping[str, list[int]]
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    history: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    number: int = 0
    recent_losses: Sequence[float] = ()


@dataclass(frozen=True)
class Staged:
    """One rank's part of a checkpoint on its way from the local disk to the store."""

    target: str
    folder: Path
    rank: int
    world: int
    token: int
    snapshot: Snapshot
    published: dict[str, Any] = field(default_factory=dict)


def _receipt(rank: int, token: int) -> str:
    return f"receipt-{rank:05d}-{token:013x}.json"


class CheckpointStore:
    """The checkpoints of one run at a URL; every rank has a store, and all call `save` together.

    Args:
        url: of the checkpoints; the claims of the run are next to them.
        fence: the claim for which this process writes; None: it reads, or the run has no lease.
    """

    def __init__(self, url: str, fence: Fence | None = None) -> None:
        self.url, self.fence = url.rstrip("/"), fence
        self.fs, self.root = open_url(self.url)
        self.local = is_local(self.fs)
        self._judge: Owner | None = None

    def folder(self, step: int) -> str:
        """Return the path of a step's folder in the file system."""
        return f"{self.root}/step-{step:08d}"

    def location(self, step: int) -> str:
        """Return the URL of a step's folder."""
        return f"{self.url}/step-{step:08d}"

    # -- writing ---------------------------------------------------------------------------------------------------

    def stage(self, engine: Engine, snapshot: Snapshot) -> "Staged":
        """Write this rank's state to a folder on the local disk; every rank calls this, then training may continue.

        Rank 0 deletes the target folder if it exists. The token, the same on all ranks, distinguishes the receipts of
        this save from those of an earlier attempt.

        Raises:
            OSError: this rank could not write, or rank 0 could not delete the folder; then on all ranks.
        """
        target = self.folder(snapshot.step)
        token, failure = 0.0, OSError(f"rank 0 could not prepare {target}")
        if engine.rank == 0:
            try:
                token = float(secrets.randbits(52))
                if self.fs.exists(target) and not (self.fence and self.fence.taken_by()):
                    self._delete(target)
            except OSError as error:  # the other ranks wait in the sum
                token, failure = math.nan, error
        token = engine.sum([token])[0]
        if math.isnan(token):
            raise failure
        staged = Staged(target, self._staging(target, engine.rank), engine.rank, engine.world, int(token), snapshot)
        shutil.rmtree(staged.folder, ignore_errors=True)
        staged.folder.mkdir(parents=True, mode=0o700)
        engine.save(staged.folder)
        if engine.rank == 0:
            (staged.folder / HISTORY).write_text(snapshot.history)
        return staged

    def publish(self, staged: "Staged") -> None:
        """Move a rank's staged files to the store, then write a receipt; may be repeated after a failure.

        Raises:
            TakenOverError: another driver has taken over the run.
        """
        for path in sorted(p for p in staged.folder.rglob("*") if p.is_file()):
            name = str(path.relative_to(staged.folder))
            if name not in staged.published:
                self.check_owner()
                entry = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                self._put(path, f"{staged.target}/{name}")
                staged.published[name] = entry
        write_whole(f"{staged.target}/{_receipt(staged.rank, staged.token)}", json.dumps(staged.published), self.fs)
        shutil.rmtree(staged.folder, ignore_errors=True)

    def commit(self, staged: "Staged", abandoned: Callable[[], bool] = lambda: False) -> CheckpointManifest | None:
        """Wait for the receipts of all ranks, then write the manifest (rank 0); return None if abandoned.

        Raises:
            TakenOverError: another driver has taken over the run.
        """
        files: dict[str, FileEntry] = {}
        for rank in range(staged.world):
            path = f"{staged.target}/{_receipt(rank, staged.token)}"
            while not self._there(path):
                if abandoned():
                    return None
                time.sleep(0.02 if self.local else 0.5)
            files.update({n: FileEntry(**entry) for n, entry in json.loads(self.fs.cat_file(path)).items()})
        manifest = self.manifest_of(staged, files)
        self.check_owner()
        write_whole(f"{staged.target}/{MANIFEST}", manifest.model_dump_json(indent=1), self.fs)
        return manifest

    def manifest_of(self, staged: "Staged", files: Mapping[str, FileEntry]) -> CheckpointManifest:
        """Return the manifest of a staged checkpoint with these files."""
        snapshot = staged.snapshot
        return CheckpointManifest(
            format=FORMAT,
            step=snapshot.step,
            samples=snapshot.samples,
            world=staged.world,
            engine=dict(snapshot.engine),
            parameters=dict(snapshot.parameters),
            recipe=dict(snapshot.recipe),
            versions=dict(snapshot.versions),
            metrics=dict(snapshot.metrics),
            number=snapshot.number,
            lease=self.fence.number if self.fence else 0,
            recent_losses=list(snapshot.recent_losses),
            created=time.time(),
            files=dict(files),
        )

    def save(self, engine: Engine, snapshot: Snapshot) -> CheckpointManifest | None:
        """Write one checkpoint and wait for it; every rank calls this. Return the manifest on rank 0, None elsewhere.

        The manifest is written after the receipts of all ranks, so a crash leaves either a complete checkpoint or a
        folder without a manifest, which is never read.
        """
        staged = self.stage(engine, snapshot)
        try:
            self.publish(staged)
            manifest = self.commit(staged) if engine.rank == 0 else None
        finally:
            shutil.rmtree(staged.folder, ignore_errors=True)
        engine.sum([0.0])
        return manifest

    def check_owner(self) -> None:
        """Raise `TakenOverError` if another driver has taken over the run."""
        if self.fence is not None:
            self.fence.check()

    def _there(self, path: str) -> bool:
        if not self.local:
            self.fs.invalidate_cache()
        return self.fs.exists(path)

    def _staging(self, target: str, rank: int) -> Path:
        """Return a rank's staging folder; for a local store it is on the same disk, so that files are renamed.

        Each driver has its own, as one that was taken over may still be writing.
        """
        name = f"{rank:05d}-{self.fence.number:08d}" if self.fence else f"{rank:05d}"
        if self.local:
            return Path(f"{target}/.staging-{name}")
        place = cache_folder("staging", hashlib.sha256(self.url.encode()).hexdigest()[:16])
        for left in place.glob(f"{rank:05d}*"):
            shutil.rmtree(left, ignore_errors=True)
        return place / name

    def _put(self, path: Path, target: str) -> None:
        if self.local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(target)
        else:
            self.fs.put_file(str(path), target)

    def _delete(self, target: str) -> None:
        """Delete a folder, its manifest first, so that a partly deleted one is not a checkpoint."""
        if self.fs.exists(f"{target}/{MANIFEST}"):
            self.fs.rm(f"{target}/{MANIFEST}", recursive=True)
        self.fs.rm(target, recursive=True)

    def prune(self, keep: Collection[int]) -> None:
        """Delete all checkpoints but those of the steps `keep`, and incomplete ones before the newest of them."""
        self.check_owner()
        newest = max(keep, default=-1)
        complete = set(self.steps())
        for step in self._folders():
            if step not in keep and (step in complete or step < newest):
                self._delete(self.folder(step))

    # -- reading ---------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first; folders without a manifest are skipped.

        So are those that a driver wrote after a later one had started from an earlier step.
        """
        owner = self._last_owner()
        folders = self._folders()
        counted = at_once(lambda step: self._counts(step, owner), folders)
        return [step for step, counts in zip(folders, counted, strict=True) if counts]

    def _counts(self, step: int, owner: Owner | None) -> bool:
        """Return whether a folder is a checkpoint of the run."""
        if owner is None or step <= owner.last_step(0):
            return self.fs.exists(f"{self.folder(step)}/{MANIFEST}")
        try:
            number = int(json.loads(self.fs.cat_file(self._file(step, MANIFEST))).get("lease", 0))
        except FileNotFoundError:
            return False
        except (OSError, UserError, ValueError, TypeError, AttributeError):
            return True  # damaged, which `problems` reports
        if step > owner.last_step(number):
            log.info("checkpoint %s is not used: driver %d wrote it after the next one", self.location(step), number)
            return False
        return True

    def _last_owner(self) -> Owner | None:
        """Return the owner that knows where each driver started: our own, which no other changes, or the newest."""
        run = self.url.rpartition("/")[0]
        if self.fence is None:
            claims = Claims(run) if run else None
            return claims.readable(claims.newest()) if claims else None
        if self._judge is None:
            self._judge = self.fence.claims.read(self.fence.number)
        return self._judge

    def _folders(self) -> list[int]:
        """Return the steps of all folders, complete or not, oldest first."""
        names = entry_names(self.fs, self.root)
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name)))

    def manifest(self, step: int) -> CheckpointManifest:
        """Read a step's manifest.

        Raises:
            UserError: it is missing or invalid, is that of another step, or a newer version of this program wrote it.
        """
        where = f"{self.location(step)}/{MANIFEST}"
        tree = parse_json(self._read(step, MANIFEST), where)
        try:
            manifest = CheckpointManifest.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{where} is not a checkpoint manifest ({invalid_key(error)})") from None
        if manifest.format > FORMAT:
            raise UserError(
                f"{where} has format {manifest.format}, this version reads up to {FORMAT}: update perceiver-train"
            )
        if manifest.step != step:
            raise UserError(f"{where} has step {manifest.step}, wanted {step}, the step of its folder")
        return manifest

    def _read(self, step: int, name: str) -> bytes:
        """Return the content of a file of a checkpoint; raise `UserError` if it is missing or not a regular file."""
        try:
            return self.fs.cat_file(self._file(step, name))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise UserError(f"{self.location(step)}/{name} is missing or a folder: take another checkpoint") from None

    def _file(self, step: int, name: str) -> str:
        """Return the path of a file of a checkpoint, see `existing_file`."""
        try:
            return existing_file(self.fs, self.root, f"step-{step:08d}/{name}")
        except NotRegularError as error:
            raise UserError(f"{self.url}/{error}: take another checkpoint") from None

    def problems(self, step: int) -> list[str]:
        """Return the problems of a checkpoint: missing files, wrong sizes, wrong checksums; empty if it is intact."""
        try:
            manifest = self.manifest(step)
            looked = at_once(lambda named: self._problem(step, *named), manifest.files.items())
            return [problem for problem in looked if problem] or self._unnamed(step, manifest.files)
        except UserError as error:
            return [str(error)]

    def _unnamed(self, step: int, named: Collection[str]) -> list[str]:
        """Return the files that would be read, or are wanted, although the manifest does not name them."""
        wanted = {name for name in entry_names(self.fs, self.folder(step)) if name.endswith(".safetensors")}
        if HEADER in named:
            header = parse_header(self._read(step, HEADER), f"{self.location(step)}/{HEADER}")
            wanted |= {shard_name(number) for number in range(header.writers)}
        return [f"{name} is not in {MANIFEST}" for name in sorted({HEADER, *wanted} - set(named))]

    def _problem(self, step: int, name: str, entry: FileEntry) -> str | None:
        try:
            path = self._file(step, name)
        except UserError as error:
            return str(error)
        if not self.fs.exists(path):
            return f"{name} is missing"
        if (size := self.fs.size(path)) != entry.bytes:
            return f"{name} has {size} bytes, expected {entry.bytes}"
        return None if file_sha256(path, self.fs) == entry.sha256 else f"{name} does not match its checksum"

    def newest(self) -> CheckpointManifest | None:
        """Return the manifest of the newest intact checkpoint; damaged ones are logged."""
        for step in reversed(self.steps()):
            problems = self.problems(step)
            if not problems:
                return self.manifest(step)
            log.warning("checkpoint %s is not used: %s", self.location(step), "; ".join(problems[:3]))
        return None

    def history(self, step: int) -> str:
        """Return the recorded metrics (JSON lines) up to a checkpoint.

        Raises:
            UserError: it is missing or damaged.
        """
        text = self._read(step, HISTORY).decode(errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{self.location(step)}/{HISTORY}, line {number},"
            row = parse_json(line, where) if line else {"step": 0}
            try:
                HistoryRow.model_validate(row)
            except ValidationError as error:
                raise UserError(f"{where} is not a row of metrics ({invalid_key(error)})") from None
        return text

    @contextmanager
    def fetch(self, step: int) -> Iterator[Path]:
        """Yield a local folder with a checkpoint's files: the store's own if it is local, else a temporary copy."""
        if self.local:
            yield Path(self.folder(step))
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:

            def get(name: str) -> None:
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(self._file(step, name), str(target))

            at_once(get, self.manifest(step).files)
            yield Path(folder)


def at_once(ask: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the answer for each item, in order, asked for in threads; raise the first error."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint") as readers:
        return list(readers.map(ask, items))


def parameter_difference(saved: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> str | None:
    """Return the first difference between two sets of parameters in one phrase; None if they agree."""
    for name in wanted:
        if name not in saved:
            return f"the recipe's model has a parameter {name!r} that the checkpoint lacks"
        if list(saved[name]) != list(wanted[name]):
            return f"parameter {name!r} is {list(saved[name])} in the checkpoint, {list(wanted[name])} in the recipe"
    extra = next((name for name in saved if name not in wanted), None)
    return f"the checkpoint has a parameter {extra!r} that the recipe's model lacks" if extra else None
