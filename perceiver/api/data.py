"""Data: `perceiver.prepare`."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perceiver.api.recipes import set_up
from perceiver.config import UserError

if TYPE_CHECKING:
    from perceiver.api.recipes import Place
    from pipelines.prepare import PrepareConfig
    from pipelines.shards.manifest import Manifest


@dataclass(frozen=True)
class Data:
    """Prepared data, for `perceiver.train(..., data=...)`.

    Attributes:
        url: the folder, a path or an fsspec URL.
        manifest: name, features, classes, splits and licence of the data.
    """

    url: str
    manifest: "Manifest"

    def __fspath__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Data({self.url!r}, {self.samples}, {len(self.classes)} classes)"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.manifest.classes

    @property
    def samples(self) -> dict[str, int]:
        """Number of samples by split."""
        return {name: split.samples for name, split in self.manifest.splits.items()}


def prepare(
    source: str,
    *places: "Place",
    seed: int = 0,
    max_bad_fraction: float = 0.01,
    index: bool = False,
    progress: bool = True,
    **options: Any,
) -> Data:
    """Convert raw data to shards, as `perceiver prepare` does; prepared data are found and not written again.

    Args:
        source: the kind of the raw data, such as `image_folder`; `perceiver prepare --help` lists them.
        places: the raw data and the folder to write, paths or fsspec URLs; sources that bring their data take only the
            folder.
        seed: of the splits and of the order.
        max_bad_fraction: share of unreadable raw items above which preparation fails.
        index: read Parquet files in place (source `table`).
        progress: print notes about the data and the progress to stdout.
        options: of the source, such as `held_out=0.1`.

    Raises:
        UserError: an unknown source or option, missing data, a destination with other data, too many unreadable items.
    """
    from pipelines.prepare import PrepareConfig

    set_up()
    pairs = {name: str(value) for name, value in options.items()}
    config = PrepareConfig(seed=seed, options=pairs, max_bad_fraction=max_bad_fraction)
    return write_data(source, [os.fspath(place) for place in places], config, index=index, show=progress)


def write_data(source: str, places: Sequence[str], config: "PrepareConfig", *, index: bool, show: bool) -> Data:
    """Prepare data, see `prepare`."""
    from perceiver.tracking.printable import say
    from pipelines import index as indexing
    from pipelines import prepare as preparing

    if not 1 <= len(places) <= 2:
        raise UserError(f"got {len(places)} places ({', '.join(places)}), wanted [SRC] DST")
    *before, dst = places
    work = indexing.index if index else preparing.prepare

    def note(line: str) -> None:
        if show:
            say(f"  {line}")

    manifest = work(source, before[0] if before else None, dst, config, progress=_progress(note), note=note)
    return Data(dst, manifest)


def _progress(show: Callable[[str], None]) -> Callable[[int, str], None]:
    before = 0

    def progress(total: int, shard: str) -> None:
        nonlocal before
        count = total - before
        show(f"{shard}: {count:,} sample{'' if count == 1 else 's'} ({total:,} so far)")
        before = total

    return progress


def pairs(options: Sequence[str]) -> Mapping[str, str]:
    """Return options of the form KEY=VALUE by key."""
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise UserError(f"--option {option!r} is not of the form KEY=VALUE")
        found[key] = value
    return found
