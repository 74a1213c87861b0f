"""``perceiver predict``: what a trained model says about each sample of a data set, as Parquet files."""

import json

import click


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
@click.option("--to", "target", required=True, metavar="FOLDER", help="Where to write; a path or an fsspec URL.")
@click.option("--split", help="Split of the data; default: the run's evaluation split, or the only one.")
@click.option("--batch", type=click.IntRange(1), help="Samples of a forward pass; default: as training evaluates.")
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Ray Data actors that hold the model; 0: this process. Default:"
    " one a GPU on a cluster (RAY_ADDRESS, cluster.address) or where this machine has several, one a node on"
    " a cluster without GPUs; else 0.",
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
    """Predict with the model of RUN on the prepared DATA; the same command goes on where it was broken off.

    A row a sample: sample_id, key (the file or row it came from), label where there is one, prediction, probability
    and more, as the task has it. RUN is what perceiver evaluate takes. Any --workers writes the same files, and goes on
    with those of another.
    """
    from cluster.predict.inference import predict
    from cluster.predict.scoring import open_scoring, ray_for

    scoring = open_scoring(run, data, split=split, batch=batch, overrides=overrides)
    if note := scoring.note():
        click.echo(f"note: {note}", err=True)

    def show(done: int, total: int) -> None:
        if not as_json:
            click.echo(f"  {done:,} of {total:,}")

    with ray_for(scoring):
        written = predict(scoring, target, show, workers)
    if as_json:
        click.echo(json.dumps({"to": target, "samples": scoring.samples, "written": written}))
    else:
        click.echo(f"{target}: {written:,} samples written, {scoring.samples:,} in {data} ({scoring.split})")
    return 0
