"""`perceiver predict`: predictions of a trained model, as Parquet files or printed."""

import re
import tempfile
from pathlib import Path
from typing import Any

import click

from perceiver.cli._types import BATCH, WEIGHTS
from perceiver.tracking.printable import say, say_json

SHOWN = 8
"""Longest list of values that is printed for a sample."""


@click.command(
    epilog="""\b
Examples:
  perceiver predict runs/quickstart-001 data/digits --to predictions
  perceiver predict runs/photos-001 a.jpg b.jpg
  perceiver predict runs/photos-001 new-photos --to predictions-new
  perceiver predict runs/photos-001 photos.csv --option image=path --to predictions-table
  perceiver predict runs/languages-001 --text "Guten Morgen" --text "Bonjour"
  perceiver predict runs/mlm_bytes-001 --text "The cat [MASK] on the mat."
  perceiver predict runs/general-001 photo.png --ask "find every red digit"
  perceiver predict exported/digits data/digits --split train --to predictions-train --workers 2
  perceiver predict runs/photos-001 s3://bucket/new-photos --split all --to s3://bucket/predictions"""
)
@click.argument("run")
@click.argument("given", nargs=-1, metavar="[PLACE]... [KEY=VALUE]...")
@click.option("--to", "target", metavar="FOLDER", help="Folder to write to; a path or an fsspec URL. Default: print.")
@click.option("--text", "texts", multiple=True, help="A text to predict.")
@click.option(
    "--ask",
    "asked",
    metavar="TASK",
    help="A task in words for the images PLACE, of a model of task.kind general; draws NAME-answer.png in FOLDER, or in"
    " the current folder.",
)
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of the source, as in prepare.")
@click.option("--split", help="Split of the data; default: the run's evaluation split, or the only one.")
@click.option("--batch", type=BATCH, help="Samples per forward pass; default: as in training's evaluations.")
@click.option(
    "--workers",
    type=click.IntRange(0, 10_000),
    help="Ray Data actors that run the model; 0: this process. Default: one per GPU on a cluster (RAY_ADDRESS,"
    " cluster.address) or if this machine has several, one per node on a cluster without GPUs, otherwise 0.",
)
@WEIGHTS
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON line.")
def command(
    run: str,
    given: tuple[str, ...],
    target: str | None,
    texts: tuple[str, ...],
    asked: str | None,
    options: tuple[str, ...],
    split: str | None,
    batch: int | None,
    workers: int | None,
    weights: Any,
    as_json: bool,
) -> int:
    """Predict with a trained model.

    RUN is as for perceiver evaluate. PLACE is prepared data; or files, folders, globs and tables (.csv, .tsv, .jsonl,
    .parquet), labelled or not, or .txt files with a text in each line, which are decoded as in training. The results
    have one row per sample: sample_id, key (the file or row it came from), label if there is one, and the outputs of
    the task (prediction, class, probability, ...). A masked language model fills `[MASK]` in texts. What cannot be read
    or decoded is listed with its reason in FOLDER/_quarantine and counted. The same command resumes an interrupted
    prediction. The files do not depend on --workers.

    With --ask a general model answers about images: it prints the text and the relevant boxes (left, top, right, bottom
    in pixels) and draws them.
    """
    from cluster.predict.inference import check_target
    from perceiver.api.data import pairs
    from perceiver.api.models import Request, read_predictions, write_predictions
    from perceiver.config import UserError
    from perceiver.export.weights import open_weights

    overrides = tuple(word for word in given if _is_override(word))
    places = tuple(word for word in given if word not in overrides)
    if asked is not None:
        others = {"--text": texts, "--option": options, "--split": split, "--batch": batch, "--workers": workers}
        if unused := [name for name, value in {**others, "KEY=VALUE": overrides}.items() if value not in (None, ())]:
            raise UserError(f"--ask: got {unused[0]}, which it does not take: leave it out")
        return _ask(open_weights(run, weights), places, asked, target, as_json)
    if target is not None:
        check_target(target)
    request = Request(places, texts, split, batch, workers, pairs("--option", options), overrides)

    def show(done: int, total: int) -> None:
        if not as_json and target is not None:
            say(f"  {done:,} of {total:,}")

    with tempfile.TemporaryDirectory() as scratch:
        folder = target if target is not None else scratch
        scoring, written, unread = write_predictions(
            open_weights(run, weights), None, request, folder, show, lambda line: say(f"note: {line}", err=True)
        )
        found = read_predictions(folder) if target is None or scoring.origin else None
    rejected = found.rejected if found else ()
    if target is None and found is not None:
        if as_json:
            say_json({"predictions": list(found), "rejected": list(rejected)})
            return 0
        for row in found:
            say(f"{row['key']}  {described(row)}")
        for problem in rejected:
            say(f"{problem['key']}  not used: {problem['reason']}", err=True)
        return 0
    counted = {"samples": scoring.samples + unread, "written": written}
    if as_json:
        say_json({"to": target, **counted, **({"rejected": len(rejected)} if found else {})})
        return 0
    where = f"{', '.join((*places[:3], *texts[:1]))} ({scoring.split})"
    say(f"{target}: {written:,} samples written, {counted['samples']:,} in {where}")
    if rejected:
        say(f"{len(rejected):,} could not be used: see {str(target).rstrip('/')}/_quarantine")
    return 0


def _ask(saved: Any, photos: tuple[str, ...], task: str, target: str | None, as_json: bool) -> int:
    """Print and draw what a general model answers about images."""
    from perceiver.api.asking import replies

    folder = Path(target or ".")
    found = replies(saved, photos, task)
    folder.mkdir(parents=True, exist_ok=True)
    for number, reply in enumerate(found):
        stem = Path(reply.key).stem
        repeated = sum(Path(other.key).stem == stem for other in found[:number])
        place = folder / f"{stem}-answer{f'-{repeated + 1}' if repeated else ''}.png"
        reply.picture.save(place)
        row = {**reply.row(), "picture": str(place)}
        if as_json:
            say_json(row)
            continue
        say(f"{reply.key}  {reply.answer}{'' if reply.ended else '…'}")
        for box, share in zip(row["boxes"], row["relevance"], strict=True):
            say(f"  box {', '.join(f'{side:.0f}' for side in box)}  {share:.1%}")
        say(f"  {place}")
    return 0


def _is_override(word: str) -> bool:
    """Return whether a word is KEY=VALUE with a dotted key, and not a file."""
    return bool(re.match(r"[a-z_]+(\.\w+)+=", word)) and not Path(word).exists()


def described(row: dict[str, Any]) -> str:
    """Return a prediction as a line: the class and its probability, a filled text, else the values that are short."""
    probability = row.get("probability")
    if "class" in row and isinstance(probability, list):
        return f"{row['class']}  {max(probability):.1%}"
    if "text" in row and "words" in row:
        return str(row["text"])
    left = {name: value for name, value in row.items() if name not in ("sample_id", "key", "label")}
    return "  ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in left.items()
        if not isinstance(value, list) or len(value) <= SHOWN
    )
