"""Checkpoints that can be trusted: a folder counts once its manifest, written last, names every file and checksum.

Layout below the store's URL (any fsspec URL)::

    step-00000120/
        ...                     what the engine wrote, one set of files a rank
        history.jsonl           the metrics recorded so far (rank 0)
        receipt-00000-TOKEN.json  size and SHA-256 of each file of one rank, of one attempt to save
        manifest.json           written last; without it the folder is not a checkpoint
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from pydantic import Field, ValidationError

from perceiver.config import Config, UserError
from perceiver.storage import cache_folder, is_local, write_whole
from perceiver.train.engine.protocol import Engine

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
HISTORY = "history.jsonl"


class FileEntry(Config):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class CheckpointManifest(Config):
    """What a checkpoint holds and what made it."""

    format: int = Field(default=FORMAT, description="version of this layout")
    step: int = Field(description="optimizer steps done")
    samples: int = Field(description="training samples consumed: the position in the sample plan")
    world: int = Field(description="number of workers that wrote it")
    engine: dict[str, Any] = Field(description="kind of engine and its ZeRO stage")
    parameters: dict[str, list[int]] = Field(description="name and shape of each parameter")
    recipe: dict[str, Any] = Field(description="the resolved recipe, secrets redacted")
    versions: dict[str, str] = Field(description="versions of the libraries")
    metrics: dict[str, float] = Field(default={}, description="figures of this step and, if it had one, its evaluation")
    number: int = Field(default=0, description="how many checkpoints the run had made before it")
    created: float = Field(description="seconds since the epoch")
    files: dict[str, FileEntry] = Field(description="each file below the folder")


@dataclass(frozen=True)
class Snapshot:
    """What a save records beside the engine's own files."""

    step: int
    samples: int
    engine: Mapping[str, Any]
    parameters: Mapping[str, list[int]]
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    history: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    number: int = 0


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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a local file in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointStore:
    """The checkpoints of one run below ``url``; all ranks hold one, and call ``save`` together."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self.fs, self.root = fsspec.core.url_to_fs(self.url, **dict(storage_options or {}))
        self.local = is_local(self.fs)

    def folder(self, step: int) -> str:
        """Return the path of a step's folder inside the file system."""
        return f"{self.root}/step-{step:08d}"

    def location(self, step: int) -> str:
        """Return the URL of a step's folder, as a user would write it."""
        return f"{self.url}/step-{step:08d}"

    # -- writing ---------------------------------------------------------------------------------------------------

    def stage(self, engine: Engine, snapshot: Snapshot) -> "Staged":
        """Write this rank's state to a folder on the local disk; every rank calls this, and may train on afterwards.

        Rank 0 removes what lies at the target. The token, the same on all ranks, tells this save's receipts from those
        that one before it left behind.
        """
        target = self.folder(snapshot.step)
        token = 0.0
        if engine.rank == 0:
            token = float(secrets.randbits(52))
            if self.fs.exists(target):
                self._delete(target)
        token = engine.sum([token])[0]
        staged = Staged(target, self._staging(target, engine.rank), engine.rank, engine.world, int(token), snapshot)
        shutil.rmtree(staged.folder, ignore_errors=True)
        staged.folder.mkdir(parents=True, mode=0o700)
        engine.save(staged.folder)
        if engine.rank == 0:
            (staged.folder / HISTORY).write_text(snapshot.history)
        return staged

    def publish(self, staged: "Staged") -> None:
        """Move what a rank staged to its place, then leave a receipt; may be called again after a failure."""
        for path in sorted(p for p in staged.folder.rglob("*") if p.is_file()):
            name = str(path.relative_to(staged.folder))
            if name not in staged.published:
                entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
                self._put(path, f"{staged.target}/{name}")
                staged.published[name] = entry
        write_whole(self.fs, f"{staged.target}/{_receipt(staged.rank, staged.token)}", json.dumps(staged.published))
        shutil.rmtree(staged.folder, ignore_errors=True)

    def commit(self, staged: "Staged", abandoned: Callable[[], bool] = lambda: False) -> CheckpointManifest | None:
        """Wait for the receipts of all ranks, then write the manifest (rank 0); None if it was abandoned meanwhile."""
        snapshot, files = staged.snapshot, {}
        for rank in range(staged.world):
            path = f"{staged.target}/{_receipt(rank, staged.token)}"
            while not self._there(path):
                if abandoned():
                    return None
                time.sleep(0.02 if self.local else 0.5)
            files.update({n: FileEntry(**entry) for n, entry in json.loads(self.fs.cat_file(path)).items()})
        manifest = CheckpointManifest(
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
            created=time.time(),
            files=files,
        )
        write_whole(self.fs, f"{staged.target}/{MANIFEST}", manifest.model_dump_json(indent=1))
        return manifest

    def save(self, engine: Engine, snapshot: Snapshot) -> CheckpointManifest | None:
        """Write one checkpoint and wait for it; every rank calls this. Return the manifest on rank 0, None elsewhere.

        The manifest is written once the receipts of all ranks are there, so a crash at any moment leaves either a whole
        checkpoint or a folder without manifest, which is never read.
        """
        staged = self.stage(engine, snapshot)
        try:
            self.publish(staged)
            manifest = self.commit(staged) if engine.rank == 0 else None
        finally:
            shutil.rmtree(staged.folder, ignore_errors=True)
        engine.sum([0.0])
        return manifest

    def _there(self, path: str) -> bool:
        if not self.local:
            self.fs.invalidate_cache()
        return self.fs.exists(path)

    def _staging(self, target: str, rank: int) -> Path:
        """Where a rank stages; for a local store on the same disk, so that files move by rename."""
        if self.local:
            return Path(f"{target}/.staging-{rank:05d}")
        place = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return cache_folder("staging", place, f"{rank:05d}")

    def _put(self, path: Path, target: str) -> None:
        if self.local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(target)
        else:
            self.fs.put_file(str(path), target)

    def _delete(self, target: str) -> None:
        """Remove a folder, its manifest first, so that a half-removed one is not taken for whole."""
        if self.fs.exists(f"{target}/{MANIFEST}"):
            self.fs.rm_file(f"{target}/{MANIFEST}")
        self.fs.rm(target, recursive=True)

    def prune(self, keep: Collection[int]) -> None:
        """Remove all checkpoints but those of the steps ``keep``, and what crashes left before the newest of them."""
        newest = max(keep, default=-1)
        complete = set(self.steps())
        for step in self._folders():
            if step not in keep and (step in complete or step < newest):
                self._delete(self.folder(step))

    # -- reading ---------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first; folders without manifest are left out."""
        return [step for step in self._folders() if self.fs.exists(f"{self.folder(step)}/{MANIFEST}")]

    def _folders(self) -> list[int]:
        """Return the steps of all folders, complete or not, oldest first."""
        if not self.fs.exists(self.root):
            return []
        self.fs.invalidate_cache()
        names = [str(name).rstrip("/").rsplit("/", 1)[-1] for name in self.fs.ls(self.root, detail=False)]
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name)))

    def manifest(self, step: int) -> CheckpointManifest:
        """Read a step's manifest.

        Raises:
            UserError: it cannot be parsed, or a newer version of this program wrote it.
        """
        path = f"{self.location(step)}/{MANIFEST}"
        try:
            manifest = CheckpointManifest.model_validate_json(self.fs.cat_file(f"{self.folder(step)}/{MANIFEST}"))
        except ValidationError as error:
            raise UserError(f"{path} is not a checkpoint manifest ({error.errors()[0]['msg']})") from None
        if manifest.format > FORMAT:
            raise UserError(f"{path} has format {manifest.format}, this program reads up to {FORMAT}: update it")
        return manifest

    def problems(self, step: int) -> list[str]:
        """Return what is wrong with a checkpoint: missing files, wrong sizes, wrong checksums; empty if it is whole."""
        try:
            manifest = self.manifest(step)
        except UserError as error:
            return [str(error)]
        return [problem for name, entry in manifest.files.items() if (problem := self._problem(step, name, entry))]

    def _problem(self, step: int, name: str, entry: FileEntry) -> str | None:
        path = f"{self.folder(step)}/{name}"
        if not self.fs.exists(path):
            return f"{name} is missing"
        if (size := self.fs.size(path)) != entry.bytes:
            return f"{name} has {size} bytes, expected {entry.bytes}"
        with self.fs.open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 22):
                digest.update(block)
        return None if digest.hexdigest() == entry.sha256 else f"{name} does not match its checksum"

    def newest(self) -> CheckpointManifest | None:
        """Return the manifest of the newest checkpoint whose every file verifies; a bad one is named in the log."""
        for step in reversed(self.steps()):
            problems = self.problems(step)
            if not problems:
                return self.manifest(step)
            log.warning("checkpoint %s is not used: %s", self.location(step), "; ".join(problems[:3]))
        return None

    def history(self, step: int) -> str:
        """Return the recorded metrics (JSON lines) up to a checkpoint."""
        return self.fs.cat_file(f"{self.folder(step)}/{HISTORY}").decode()

    @contextmanager
    def fetch(self, step: int) -> Iterator[Path]:
        """Yield a local folder with a checkpoint's files: the store's own if it is local, else a copy for the while."""
        if self.local:
            yield Path(self.folder(step))
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
            for name in self.manifest(step).files:
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{self.folder(step)}/{name}", str(target))
            yield Path(folder)


def parameter_difference(saved: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> str | None:
    """Say how two sets of parameters differ in one phrase, or None if they agree."""
    for name in wanted:
        if name not in saved:
            return f"the recipe's model has a parameter {name!r} that the checkpoint lacks"
        if list(saved[name]) != list(wanted[name]):
            return f"parameter {name!r} is {list(saved[name])} in the checkpoint, {list(wanted[name])} in the recipe"
    extra = next((name for name in saved if name not in wanted), None)
    return f"the checkpoint has a parameter {extra!r} that the recipe's model lacks" if extra else None
