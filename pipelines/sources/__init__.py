"""Sources, the data that `perceiver prepare` can read. A source is one module here with an object named `source`.

Damage is found in one of two places. Encoded images, audio, video and texts are stored unchanged and not decoded here:
training quarantines and replaces those that cannot be decoded, and `perceiver inspect` names them. What must be read to
make a sample (a mesh, a line of JSON, a member of an archive) and is damaged is yielded as `Rejected`: it is left out,
listed with key and reason in `quarantine.parquet` next to the manifest, and counted against the budget of `prepare`. A
source raises only errors that concern all of the data, such as a missing folder.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from perceiver import registry
from perceiver.config import UserError
from pipelines.features import Feature

Sample = Mapping[str, Any]
"""A row of a shard: `key` and a value for each feature."""


@dataclass(frozen=True)
class Rejected:
    """An unusable raw item, yielded in place of the sample.

    Attributes:
        key: its location, as precise as a sample's key.
        reason: short and without the item's name, so that reasons can be counted.
    """

    key: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """The samples of one shard, by reference: small, picklable, and the same at each listing.

    Attributes:
        split: name of the split.
        content: what the source needs to read the samples (paths, indices), as JSON-able values.
    """

    split: str
    content: Any


@dataclass(frozen=True)
class Listing:
    """The content of a source before any sample is read: facts for the manifest, and the units to read.

    Attributes:
        name: of the data set.
        features: by name.
        classes: names of the classes by index; empty without labels.
        licence, origin: for the manifest.
        units: the samples.
        notes: lines about what was taken for splits and classes, and what was left out.
        rejected: unusable items that were found while listing.
        versions: size and time, or ETag, of what the units refer to, by its name in their content. A shard of an
            earlier listing is only used again if those of its unit are the same; None (not known): never, unless the
            data are a file of a package.
    """

    name: str
    features: Mapping[str, Feature]
    classes: tuple[str, ...]
    licence: str
    origin: str
    units: Iterable[Unit]
    notes: tuple[str, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    versions: Mapping[str, str] | None = None


class Source(Protocol):
    """A data set or layout that can be prepared.

    A source whose listing reads much of the data may also have `versions(src)`, which returns `Listing.versions`
    without that: complete data are compared by it.
    """

    title: str
    """The line of the source in the list of sources."""

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the samples, shuffled by the seed, in units of at most `shard_rows`."""
        ...

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the samples of one unit, one after the other, at each call in the same order."""
        ...


def source_names() -> list[str]:
    """Return the names of all sources: the modules of this package, and those that installed packages offer."""
    return sorted([*_own_names(), *registry.offered("source", _own_names())])


def _own_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def load_source(name: str) -> Source:
    """Import a source by name, or raise `UserError` if there is none."""
    names = source_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f", did you mean '{near[0]}'?" if near else ""
        raise UserError(f"no source named '{name}'{hint} Sources: {', '.join(names)}")
    if name in (offered := registry.offered("source", _own_names())):
        return offered[name]
    return importlib.import_module(f"{__name__}.{name}").source


def refuse_options(options: Mapping[str, str], known: Iterable[str] = ()) -> None:
    """Refuse options that a source does not know: raise `UserError` for the first one."""
    known = list(known)
    for key in options:
        if key not in known:
            raise UserError(f"unknown option '{key}' of this source; it takes {', '.join(known) or 'none'}")
