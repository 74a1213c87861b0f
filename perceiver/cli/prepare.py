"""`perceiver prepare`: raw data to shards."""

import time
from collections.abc import Callable

import click

from perceiver.cli._types import Number
from perceiver.tracking.printable import say, say_json


def _sources() -> str:
    from pipelines.sources import load_source, source_names

    return "\n".join(f"  {name:<14}{load_source(name).title}" for name in source_names())


class _WithSources(click.Command):
    """A command with the list of sources in its help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sources, then the examples."""
        formatter.write(f"\nSources:\n{_sources()}\n")
        super().format_epilog(ctx, formatter)


@click.command(
    cls=_WithSources,
    epilog="""\b
Examples:
  perceiver prepare digits data/digits
  perceiver prepare image_folder photos/ s3://bucket/photos
  perceiver prepare table s3://hub/pets data/pets --index""",
)
@click.argument("name")
@click.argument("places", nargs=-1, required=True, metavar="[SRC] DST")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of the source.")
@click.option(
    "--seed",
    type=click.IntRange(0, (1 << 63) - 1),
    default=0,
    show_default=True,
    help="Seed of the splits and of the order.",
)
@click.option(
    "--max-bad-fraction",
    default=0.01,
    show_default=True,
    type=Number(0, 1),
    help="Share of unreadable raw items above which preparation fails.",
)
@click.option("--resize", type=click.IntRange(1, 1 << 24), help="Shorter side of images and videos in pixels, at most.")
@click.option("--fps", type=Number(0.001, 1000), help="Frames per second of videos, at most.")
@click.option("--rate", type=click.IntRange(100, 1_000_000), help="Samples per second of sound, at most.")
@click.option("--quality", type=click.IntRange(1, 100), help="Of JPEG and H.264; default: 90 of images, 75 of videos.")
@click.option(
    "--spectrogram",
    metavar="KEY=NUMBER,...",
    help="Settings (rate, window, hop, bins, low, high) of the log-mel spectrogram to measure; default: the model's.",
)
@click.option("--index", "in_place", is_flag=True, help="Read Parquet files in place: write only a manifest.")
@click.option("--json", "as_json", is_flag=True, help="Print what was prepared as one JSON line.")
def command(
    name: str,
    places: tuple[str, ...],
    options: tuple[str, ...],
    seed: int,
    max_bad_fraction: float,
    spectrogram: str | None,
    resize: int | None,
    fps: float | None,
    rate: int | None,
    quality: int | None,
    in_place: bool,
    as_json: bool,
) -> int:
    """Convert raw data to shards.

    Reads the raw data of source NAME at SRC, and writes shards and a manifest to DST. SRC and DST are paths or fsspec
    URLs; a source that downloads its data needs no SRC. Samples of a complete destination are not changed; an
    interrupted preparation continues with the missing shards. Raw items that cannot be read are skipped and listed with
    the reason in DST/quarantine.parquet.

    With --resize, --fps, --rate and --quality, media are stored at the size at which they are used: smaller ones stay
    as they are, others are encoded again (JPEG, H.264 with AAC, FLAC).

    Mean and deviation of the training split are measured on a sample of it, for recipes with `mean: data`. Given again,
    the command adds those that a complete destination lacks, such as those of another --spectrogram.

    With --index (source `table` only), Parquet files with one row per sample stay in place and DST gets a manifest of
    their row groups; a run refuses files that have changed since. Row groups much larger than 64 MB train slowly this
    way: prepare such data without --index.
    """
    from perceiver.config import UserError
    from pipelines.index import HEAVY_BYTES, group_bytes, index
    from pipelines.prepare import PrepareConfig, prepare
    from pipelines.transforms.store import StoreConfig

    if not 1 <= len(places) <= 2:
        raise UserError(f"got {len(places)} places ({', '.join(places)}), wanted [SRC] DST")
    *source, dst = places
    src = source[0] if source else None
    pairs = dict(_pair(option) for option in options)
    began = time.monotonic()
    config = PrepareConfig(
        seed=seed,
        options=pairs,
        max_bad_fraction=max_bad_fraction,
        spectrogram=_numbers(spectrogram or ""),
        media=StoreConfig(resize=resize, fps=fps, rate=rate, quality=quality),
    )
    work = index if in_place else prepare

    def note(line: str) -> None:
        if not as_json:
            say(f"  {line}")

    manifest = work(name, src, dst, config, progress=_progress(note), note=note)
    if as_json:
        say_json(manifest.model_dump(mode="json"))
        return 0
    rows = ", ".join(f"{split.samples:,} {key}" for key, split in manifest.splits.items())
    classes = f"{len(manifest.classes)} class{'es' * (len(manifest.classes) != 1)}"
    say(f"{dst}: {manifest.name}, {rows}, {classes} ({time.monotonic() - began:.1f} s)")
    if "test" not in manifest.splits and "val" in manifest.splits:
        say("no split test: evaluate on val with data.eval_split=val")
    if in_place and (size := group_bytes(manifest)) > HEAVY_BYTES:
        say(
            f"row groups of up to {size / 1e6:,.0f} MB: training reads whole row groups; prepare without --index"
            " if it has to wait for data"
        )
    if manifest.rejected:
        say(f"{manifest.rejected:,} raw items could not be read: see {dst.rstrip('/')}/quarantine.parquet")
    return 0


def _progress(show: Callable[[str], None]) -> Callable[[int, str], None]:
    before = 0

    def progress(total: int, shard: str) -> None:
        nonlocal before
        count = total - before
        show(f"{shard}: {count:,} sample{'' if count == 1 else 's'} ({total:,} so far)")
        before = total

    return progress


def _numbers(option: str) -> dict[str, float]:
    from perceiver.config import UserError

    pairs = dict(_pair(part, "--spectrogram") for part in option.split(",") if part)
    try:
        return {key: float(value) for key, value in pairs.items()}
    except ValueError as error:
        raise UserError(f"--spectrogram {option!r}: {error}; wanted numbers, as rate=16000,bins=64") from None


def _pair(option: str, of: str = "--option") -> tuple[str, str]:
    from perceiver.config import UserError

    key, equals, value = option.partition("=")
    if not equals or not key:
        raise UserError(f"{of} {option!r} is not of the form KEY=VALUE")
    return key, value
