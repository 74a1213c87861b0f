"""Folders on any fsspec file system: opening, atomic writing, references to environment variables in options."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec

from perceiver.config import UserError

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}


def resolve_options(options: Mapping[str, str]) -> dict[str, str]:
    """Replace each value of the form `$NAME` by the environment variable NAME, so that no secret stands in a recipe.

    Raises:
        UserError: the variable is not set.
    """
    resolved = {}
    for key, value in options.items():
        if value.startswith("$"):
            if value[1:] not in os.environ:
                raise UserError(
                    f"data.storage_options.{key} names {value}, but the environment has no variable"
                    f" {value[1:]}: export it, or give another name"
                )
            value = os.environ[value[1:]]
        resolved[key] = value
    return resolved


@dataclass(frozen=True)
class Folder:
    """A folder on a file system: `fs` does the work, `path` is without the protocol, `url` is what was given."""

    fs: Any
    path: str
    url: str

    def file(self, name: str) -> str:
        """The path of a file of this folder, as `fs` wants it."""
        return f"{self.path.rstrip('/')}/{name}"

    @property
    def protocols(self) -> set[str]:
        """The names the file system goes by, such as {"s3", "s3a"}."""
        return {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)

    @property
    def local(self) -> bool:
        """Whether the folder lies on this machine's file system, where half-written files can be seen."""
        return "file" in self.protocols

    def make_room(self, path: str) -> None:
        """Make the folder of a file that is about to be written; object stores have none, and would make a bucket."""
        if not self.protocols & OBJECT_STORES:
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)

    def exists(self, name: str) -> bool:
        """Whether the file is there (never answered from a cached listing)."""
        self.fs.invalidate_cache()
        return self.fs.exists(self.file(name))

    def names(self) -> list[str]:
        """Names of the files in it, none if it is not there."""
        self.fs.invalidate_cache()
        return sorted(path.rpartition("/")[2] for path in self.fs.find(self.path, maxdepth=1))

    def read_text(self, name: str) -> str:
        """The content of a small UTF-8 file."""
        return self.fs.cat_file(self.file(name)).decode("utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Write a small UTF-8 file so that a reader sees the whole of it or none."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file so that a reader sees the whole of it or none."""
        target = self.file(name)
        self.make_room(target)
        scratch = f"{target}.{os.getpid()}.partial" if self.local else target
        self.fs.pipe_file(scratch, content)
        if scratch != target:
            self.fs.mv(scratch, target)


def open_folder(url: str, options: Mapping[str, str] | None = None) -> Folder:
    """Open a folder by path or fsspec URL (`s3://bucket/x`, `gs://`, `file://`, a plain path).

    Raises:
        UserError: the protocol is unknown, its driver is not installed, or an option names an unset variable.
    """
    try:
        fs, path = fsspec.core.url_to_fs(os.fspath(url), **resolve_options(options or {}))
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot open {url}: {error}; wanted a path or a URL that fsspec knows"
            " (for s3:// install perceiver-train[s3])"
        ) from error
    return Folder(fs, path, os.fspath(url))
