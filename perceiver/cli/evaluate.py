"""`perceiver evaluate`: the metrics of a trained model on a data set."""

from typing import Any

import click

from perceiver.cli._types import BATCH, WEIGHTS
from perceiver.tracking.printable import say, say_json


@click.command(
    epilog="""\b
Examples:
  perceiver evaluate runs/quickstart-001
  perceiver evaluate runs/quickstart-001 data/other-digits --split test
  perceiver evaluate exported/digits data/digits --json
  perceiver evaluate runs/quickstart-001 --average 3
  perceiver evaluate runs/audioset-001 s3://bucket/audioset data.clip.eval_clips=16"""
)
@click.argument("run")
@click.argument("data", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--split", help="Split of the data; default: the run's evaluation split.")
@click.option("--batch", type=BATCH, help="Samples per forward pass; default: as in training's evaluations.")
@WEIGHTS
@click.option(
    "--average",
    type=click.IntRange(2, 1000),
    metavar="N",
    help="Average the predictions of the run's last N checkpoints: probabilities, or the numbers of a regression.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as one JSON line.")
def command(
    run: str,
    data: str | None,
    overrides: tuple[str, ...],
    split: str | None,
    batch: int | None,
    weights: Any,
    average: int | None,
    as_json: bool,
) -> int:
    """Evaluate a trained model on a data set.

    RUN is a run's folder, one of its checkpoints, an export by perceiver export --format safetensors, or a .safetensors
    file next to its recipe.yaml. DATA defaults to the run's own data. Samples are transformed as in training's
    evaluations: one centre crop; the scores of all clips of a recording are averaged. The model runs in this process.
    """
    from cluster.predict.averaging import average_checkpoints
    from cluster.predict.scoring import open_scoring
    from perceiver.api.models import measured

    data, overrides = own_data(data, overrides)
    saved, model, names = average_checkpoints(run, average, weights) if average else (run, None, [])
    given: dict[str, Any] = {"split": split, "batch": batch, "overrides": overrides, "model": model}
    scoring = open_scoring(saved, data, **given, weights=None if average else weights)
    figures = measured(scoring, lambda line: say(f"note: {line}", err=True))
    facts: dict[str, Any] = {
        "run": run,
        "data": scoring.recipe.data.url,
        "split": scoring.split,
        "samples": scoring.samples,
        **({"checkpoints": names} if names else {}),
        **figures,
    }
    if as_json:
        say_json(facts)
        return 0
    place = f"{run}, the average of {', '.join(names)}," if names else scoring.saved.place
    say(f"{place} on {scoring.recipe.data.url}, {scoring.samples:,} {scoring.split} samples")
    for name, value in figures.items():
        say(f"  {name:<16} {value:.6g}")
    return 0


def own_data(data: str | None, overrides: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """Return data and overrides; an override in the place of data means that data was left out."""
    if data is not None and "=" in data and "://" not in data:
        return None, (data, *overrides)
    return data, overrides
