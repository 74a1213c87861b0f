"""``perceiver predict``: what a trained model says about each sample of a data set, as Parquet files."""

import json

import click


@click.command(
    epilog="""\b
Examples:
  perceiver predict runs/quickstart-001 data/digits --to predictions
  perceiver predict runs/photos-001 s3://bucket/new-photos --split all --to s3://bucket/predictions"""
)
@click.argument("run")
@click.argument("data")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--to", "target", required=True, metavar="FOLDER", help="Where to write; a path or an fsspec URL.")
@click.option("--split", help="Split of the data; default: the run's evaluation split, or the only one.")
@click.option("--batch", type=click.IntRange(1), help="Samples of a forward pass; default: as in training.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON line.")
def command(run: str, data: str, overrides: tuple[str, ...], target: str, split: str | None, batch: int | None,
            as_json: bool) -> int:
    """Predict with the model of RUN on the prepared DATA; the same command goes on where it was broken off.

    A row a sample: sample_id, key (the file or row it came from), label where there is one, prediction, probability
    and more, as the task has it.
    """
    from cluster.scoring import open_scoring, predict, ray_for

    scoring = open_scoring(run, data, split=split, batch=batch, overrides=overrides)

    def show(done: int, total: int) -> None:
        if not as_json:
            click.echo(f"  {done:,} of {total:,}")

    with ray_for(scoring):
        written = predict(scoring, target, show)
    if as_json:
        click.echo(json.dumps({"to": target, "samples": scoring.samples, "written": written}))
    else:
        click.echo(f"{target}: {written:,} samples written, {scoring.samples:,} in {data} ({scoring.split})")
    return 0
