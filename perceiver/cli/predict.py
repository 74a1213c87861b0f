"""`perceiver predict`: predictions of a trained model for each sample of a data set, as Parquet files."""

import click

from perceiver.cli._types import BATCH
from perceiver.tracking.printable import say, say_json


@click.command(
    epilog="""\b
Examples:
  perceiver predict runs/quickstart-001 data/digits --to predictions
  perceiver predict exported/digits data/digits --split train --to predictions-train --workers 2
  perceiver predict runs/photos-001 s3://bucket/new-photos --split all --to s3://bucket/predictions"""
)
@click.argument("run")
@click.argument("data")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--to", "target", required=True, metavar="FOLDER", help="Folder to write to; a path or an fsspec URL.")
@click.option("--split", help="Split of the data; default: the run's evaluation split, or the only one.")
@click.option("--batch", type=BATCH, help="Samples per forward pass; default: as in training's evaluations.")
@click.option(
    "--workers",
    type=click.IntRange(0, 10_000),
    help="Ray Data actors that run the model; 0: this process. Default: one per GPU on a cluster (RAY_ADDRESS,"
    " cluster.address) or if this machine has several, one per node on a cluster without GPUs, otherwise 0.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON line.")
def command(
    run: str,
    data: str,
    overrides: tuple[str, ...],
    target: str,
    split: str | None,
    batch: int | None,
    workers: int | None,
    as_json: bool,
) -> int:
    """Write a trained model's predictions for a data set.

    RUN is as for perceiver evaluate, DATA is prepared data. The files have one row per sample: sample_id, key (the file
    or row it came from), label if there is one, and the outputs of the task (prediction, probability, ...). The same
    command resumes an interrupted prediction. The files do not depend on --workers.
    """
    from cluster.predict.inference import check_target, predict
    from cluster.predict.scoring import open_scoring, ray_for

    check_target(target)
    scoring = open_scoring(run, data, split=split, batch=batch, overrides=overrides)
    for note in scoring.notes():
        say(f"note: {note}", err=True)

    def show(done: int, total: int) -> None:
        if not as_json:
            say(f"  {done:,} of {total:,}")

    with ray_for(scoring):
        written = predict(scoring, target, show, workers)
    if as_json:
        say_json({"to": target, "samples": scoring.samples, "written": written})
    else:
        say(f"{target}: {written:,} samples written, {scoring.samples:,} in {data} ({scoring.split})")
    return 0
