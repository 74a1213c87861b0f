"""Data: `perceiver.prepare`."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

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
    resize: int | None = None,
    fps: float | None = None,
    rate: int | None = None,
    quality: int | None = None,
    spectrogram: Mapping[str, float] | None = None,
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
        resize: shorter side of images and videos in pixels, at most; default: media stay as they came.
        fps: frames per second of videos, at most.
        rate: samples per second of sound, at most.
        quality: of JPEG and H.264, 1 to 100; default: 90 of images, 75 of videos that are stored smaller.
        spectrogram: settings (rate, window, hop, bins, low, high) of the log-mel spectrogram whose mean and deviation
            are measured; default: the model's.
        index: read Parquet files in place (source `table`).
        progress: print notes about the data and the progress to stdout.
        options: of the source, such as `held_out=0.1`.

    Raises:
        UserError: an unknown source or option, missing data, a destination with other data, too many unreadable items.
    """
    set_up()
    config = prepare_config(
        "perceiver.prepare",
        seed=seed,
        max_bad_fraction=max_bad_fraction,
        options={name: str(value) for name, value in options.items()},
        media={"resize": resize, "fps": fps, "rate": rate, "quality": quality},
        spectrogram=dict(spectrogram or {}),
    )
    return write_data(source, [os.fspath(place) for place in places], config, index=index, show=progress)


def prepare_config(where: str, **settings: Any) -> "PrepareConfig":
    """Return the settings of a preparation; refuse a value that is out of range.

    Args:
        where: begins the error.
        settings: by the names of `pipelines.prepare.PrepareConfig`.
    """
    from perceiver.storage import invalid_key
    from pipelines.prepare import PrepareConfig

    try:
        return PrepareConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{where}: {invalid_key(error)}") from None


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


def pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    """Return values of the form KEY=VALUE of an option by key."""
    found = {}
    for given in values:
        key, equals, value = given.partition("=")
        if not equals or not key:
            raise UserError(f"{option} {given!r} is not of the form KEY=VALUE")
        found[key] = value
    return found


def numbers(option: str, values: Sequence[str]) -> dict[str, float]:
    """Return values of the form KEY=NUMBER of an option by key."""
    try:
        return {key: float(value) for key, value in pairs(option, values).items()}
    except ValueError as error:
        raise UserError(f"{option} {','.join(values)!r}: {error}; wanted numbers, as rate=16000,bins=64") from None
