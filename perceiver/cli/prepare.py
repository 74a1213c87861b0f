"""`perceiver prepare`: raw data to shards."""

import time

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
    resize: int | None,
    fps: float | None,
    rate: int | None,
    quality: int | None,
    spectrogram: str | None,
    in_place: bool,
    as_json: bool,
) -> int:
    """Convert raw data to shards.

    Reads the raw data of source NAME at SRC, and writes shards and a manifest to DST. SRC and DST are paths or fsspec
    URLs; a source that downloads its data needs no SRC. Samples of a complete destination are not changed, and
    refused if raw files have changed since; an interrupted preparation continues with the shards that are missing or
    whose raw files have changed. Raw items that cannot be read are skipped and listed with
    the reason in DST/quarantine.parquet.

    With --resize, --fps, --rate and --quality, media are stored at the size at which they are used: smaller ones stay
    as they are, others are encoded again (JPEG, H.264 with AAC, FLAC).

    Mean and deviation of the training split are measured on a sample of it, for recipes with `mean: data`. Given again,
    the command adds those that a complete destination lacks, such as those of another --spectrogram.

    With --index (source `table` only), Parquet files with one row per sample stay in place and DST gets a manifest of
    their row groups; a run refuses files that have changed since. Row groups much larger than 64 MB train slowly this
    way: prepare such data without --index.
    """
    from perceiver.api.data import numbers, pairs, prepare_config, write_data
    from pipelines.index import HEAVY_BYTES, group_bytes

    began = time.monotonic()
    config = prepare_config(
        "perceiver prepare",
        seed=seed,
        options=pairs("--option", options),
        max_bad_fraction=max_bad_fraction,
        media={"resize": resize, "fps": fps, "rate": rate, "quality": quality},
        spectrogram=numbers("--spectrogram", spectrogram.split(",") if spectrogram else ()),
    )
    data = write_data(name, places, config, index=in_place, show=not as_json)
    dst, manifest = data.url, data.manifest
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
