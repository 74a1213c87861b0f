"""What recognises prepared data of the same source: hashes of the settings, of each unit of work, and of the raw files.

A finished shard is used again only by a preparation in which its unit has the same fingerprint, and complete data only
while the raw files are the same. Raw files are compared by name, size, and time or ETag, as the listing finds them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from perceiver.config import UserError
from perceiver.environment import DISTRIBUTION, installed_version
from perceiver.hashing import short_hash
from perceiver.storage import open_folder, open_url
from pipelines.shards.listing import file_tag
from pipelines.sources import Listing, Source, Unit
from pipelines.sources._files import PREPARED, others_version, version

SOFTWARE = (DISTRIBUTION, "numpy", "pyarrow", "pillow", "av", "soundfile", "soxr", "h5py", "trimesh")
"""Distributions on whose version the content of a shard may depend."""


class RawFiles:
    """The versions of a source's raw files.

    Args:
        versions: of the listing; None: the file, or all files of the folder, count as one.
        src: the place of the source.
    """

    def __init__(self, versions: Mapping[str, str] | None, src: str | None) -> None:
        self._known: Mapping[str, str] = versions or {}
        self._whole = "none" if versions is not None or src is None else _place_version(src)

    def digest(self) -> str:
        """Return a hash of all of them; empty if they are not known."""
        return self._whole and short_hash([self._whole, sorted(self._known.items())])

    def unit_digest(self, unit: Unit) -> str:
        """Return a hash of a unit and of the raw files that its content names; empty if one is not known."""
        found = {name: self._known[name] for name in _texts(unit.content) if name in self._known}
        if not self._whole or not all(found.values()):
            return ""
        return short_hash([self._whole, unit.split, unit.content, sorted(found.items())])


def _texts(value: Any) -> Iterator[str]:
    """Yield the strings of JSON-able values."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            left.extend(each.values())
        elif isinstance(each, list | tuple):
            left.extend(each)


def _place_version(src: str) -> str:
    """Return the version of a file, or of all files of a folder; empty if it is neither."""
    try:
        fs, path = open_url(src)
        if fs.isdir(path):
            return others_version(open_folder(src), PREPARED)
        facts = fs.info(path)
    except (UserError, OSError, ValueError):
        return ""
    return version(facts.get("size"), file_tag(facts))


def unit_fingerprint(raw: RawFiles, unit: Unit, *facts: Any) -> str:
    """Return what a shard depends on as a hash; empty if that is not known.

    Args:
        raw: the raw files.
        unit: the shard's unit.
        facts: other JSON-able values: of the settings, the features and the layout.
    """
    own = raw.unit_digest(unit)
    return own and short_hash([own, {name: installed_version(name) for name in SOFTWARE}, *facts])


def check_unchanged(
    before: str,
    dst: str,
    src: str | None,
    source: Source,
    listing: Callable[[], Listing],
    note: Callable[[str], None] | None,
) -> None:
    """Refuse complete data whose raw files have changed since; note if they cannot be compared.

    Args:
        before: their digest in the manifest; empty (data of earlier versions): nothing is compared.
        dst, src: places of the data and of the raw files; data of a pinned package have no `src`.
        source, listing: the source, and what lists it.
        note: called with a line.

    Raises:
        UserError: files were added, removed or changed.
    """
    if not before or src is None:
        return
    try:
        quick = getattr(source, "versions", None)
        now = RawFiles(quick(src) if quick else listing().versions, src).digest()
    except UserError as error:
        if note:
            note(f"{dst} is complete; not compared with its source: {error}")
        return
    if now != before:
        raise UserError(
            f"{src} has changed since {dst} was prepared from it (files were added, removed or changed): give another"
            " folder, or delete this one first"
        )
