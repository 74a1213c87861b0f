"""Sources: what `perceiver prepare` can read. A source is one module here with an object named `source`.

Damage shows in one of two places. What is stored as it came (encoded images, audio, video, texts) is not looked into
here: if it cannot be decoded, training quarantines and replaces it, and `perceiver inspect` names it. What has to be
read to make a sample (a mesh, a line of JSON, a member of an archive) and cannot be is yielded as `Rejected`: it is
left out, listed with key and reason in `quarantine.parquet` beside the manifest, and counted against the budget of
`prepare`. A source raises only for what concerns all of the data, such as a folder that is not there.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from perceiver.config import UserError
from pipelines.features import Feature

Sample = Mapping[str, Any]
"""A row of a shard: `key` and a value for each feature."""


@dataclass(frozen=True)
class Rejected:
    """A raw item that no sample can be made of; yielded in place of the sample.

    Attributes:
        key: where it lies, as precisely as for a sample.
        reason: short and without the item's name, so that reasons can be counted.
    """

    key: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """The samples of one shard, by reference: small, picklable, and the same at each listing.

    Attributes:
        split: the part it belongs to.
        content: what the source needs to read them (paths, indices), as JSON-able values.
    """

    split: str
    content: Any


@dataclass(frozen=True)
class Listing:
    """What a source found: the manifest's facts and the work to do, before any sample is read."""

    name: str
    features: Mapping[str, Feature]
    classes: tuple[str, ...]
    licence: str
    origin: str
    units: Iterable[Unit]


class Source(Protocol):
    """One data set or layout."""

    title: str
    """One line for the list of sources."""

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the samples, shuffled by the seed, in units of at most `shard_rows`."""
        ...

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the samples of one unit, one after the other, at each call in the same order."""
        ...


def source_names() -> list[str]:
    """Names of all sources, found by being there."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load_source(name: str) -> Source:
    """Import one source.

    Raises:
        UserError: there is none of that name.
    """
    names = source_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise UserError(
            f"no source named '{name}'"
            + (f", did you mean '{near[0]}'?" if near else "")
            + f" Sources: {', '.join(names)}"
        )
    return importlib.import_module(f"{__name__}.{name}").source


def refuse_options(options: Mapping[str, str], known: Iterable[str] = ()) -> None:
    """Refuse options that a source does not know.

    Raises:
        UserError: naming the first unknown option and the known ones.
    """
    known = list(known)
    for key in options:
        if key not in known:
            raise UserError(f"unknown option '{key}' of this source; it takes {', '.join(known) or 'none'}")
