"""Checkpoints that can be trusted: a folder counts once its manifest, written last, names every file and checksum.

Layout below the store's URL (any fsspec URL)::

    step-00000120/
        ...                     what the engine wrote, one set of files a rank
        history.jsonl           the metrics recorded so far (rank 0)
        receipt-00000.json      size and SHA-256 of each file of one rank
        manifest.json           written last; without it the folder is not a checkpoint
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from pydantic import Field, ValidationError

from perceiver.config import Config, UserError
from perceiver.train.engine import Engine

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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a local file in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointStore:
    """The checkpoints of one run below ``url``; all ranks hold one, and call ``save`` together."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self.fs, self.root = fsspec.core.url_to_fs(self.url, **dict(storage_options or {}))
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def folder(self, step: int) -> str:
        """Return the path of a step's folder inside the file system."""
        return f"{self.root}/step-{step:08d}"

    def location(self, step: int) -> str:
        """Return the URL of a step's folder, as a user would write it."""
        return f"{self.url}/step-{step:08d}"

    # -- writing ---------------------------------------------------------------------------------------------------

    def save(self, engine: Engine, snapshot: Snapshot) -> CheckpointManifest | None:
        """Write one checkpoint; every rank calls this. Return the manifest on rank 0, None elsewhere.

        The manifest is written after a collective that every rank enters only once its own files are in place, so a
        crash at any moment leaves either a whole checkpoint or a folder without manifest, which is never read.
        """
        target = self.folder(snapshot.step)
        if engine.rank == 0 and self.fs.exists(target):
            self._delete(target)
        engine.sum([0.0])
        with self._staging(target, engine.rank) as staging:
            engine.save(staging)
            if engine.rank == 0:
                (staging / HISTORY).write_text(snapshot.history)
            entries = {str(p.relative_to(staging)): p for p in sorted(staging.rglob("*")) if p.is_file()}
            receipt = {name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for name, p in entries.items()}
            for name, path in entries.items():
                self._put(path, f"{target}/{name}")
            self._write_text(f"{target}/receipt-{engine.rank:05d}.json", json.dumps(receipt))
        engine.sum([0.0])
        manifest = self._commit(target, snapshot, engine.world) if engine.rank == 0 else None
        engine.sum([0.0])
        return manifest

    def _commit(self, target: str, snapshot: Snapshot, world: int) -> CheckpointManifest:
        files: dict[str, FileEntry] = {}
        for rank in range(world):
            receipt = json.loads(self.fs.cat_file(f"{target}/receipt-{rank:05d}.json"))
            files.update({name: FileEntry(**entry) for name, entry in receipt.items()})
        manifest = CheckpointManifest(
            format=FORMAT,
            step=snapshot.step,
            samples=snapshot.samples,
            world=world,
            engine=dict(snapshot.engine),
            parameters=dict(snapshot.parameters),
            recipe=dict(snapshot.recipe),
            versions=dict(snapshot.versions),
            created=time.time(),
            files=files,
        )
        self._write_text(f"{target}/{MANIFEST}", manifest.model_dump_json(indent=1))
        return manifest

    @contextmanager
    def _staging(self, target: str, rank: int) -> Iterator[Path]:
        """Yield an empty local folder; on a local store it lies on the same disk, so that files move by rename."""
        if self.local:
            folder = Path(f"{target}/.staging-{rank:05d}")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        else:
            folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _put(self, path: Path, target: str) -> None:
        if self.local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        else:
            self.fs.put_file(str(path), target)

    def _write_text(self, target: str, text: str) -> None:
        """Write a small file so that a reader sees all of it or nothing."""
        if not self.local:
            self.fs.pipe_file(target, text.encode())
            return
        with tempfile.NamedTemporaryFile("w", dir=Path(target).parent, delete=False) as file:
            file.write(text)
        Path(file.name).replace(target)

    def _delete(self, target: str) -> None:
        """Remove a folder, its manifest first, so that a half-removed one is not taken for whole."""
        if self.fs.exists(f"{target}/{MANIFEST}"):
            self.fs.rm_file(f"{target}/{MANIFEST}")
        self.fs.rm(target, recursive=True)

    def prune(self, keep: int) -> None:
        """Remove all but the newest ``keep`` complete checkpoints (one rank calls this)."""
        for step in self.steps()[:-keep]:
            self._delete(self.folder(step))

    # -- reading ---------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first; folders without manifest are left out."""
        if not self.fs.exists(self.root):
            return []
        self.fs.invalidate_cache()
        names = [str(name).rstrip("/").rsplit("/", 1)[-1] for name in self.fs.ls(self.root, detail=False)]
        steps = sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name)))
        return [step for step in steps if self.fs.exists(f"{self.folder(step)}/{MANIFEST}")]

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
