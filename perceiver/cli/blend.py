"""`perceiver blend`: the weights of G-blend from the histories of runs."""

import click

from perceiver.cli._types import Number
from perceiver.tracking.printable import say, say_json

EPOCH = Number(0, 1e9)


@click.command(
    epilog="""\b
Examples:
  perceiver blend audio=runs/audio-001 video=runs/video-001 joint=runs/naive-001
  perceiver blend audio=runs/audio-001 video=runs/video-001 joint=runs/naive-001 --from 1 --to 20 --json"""
)
@click.argument("runs", nargs=-1, required=True, metavar="NAME=RUN...")
@click.option("--from", "first", type=EPOCH, metavar="EPOCH", help="An evaluation of all runs; default: the first.")
@click.option("--to", "last", type=EPOCH, metavar="EPOCH", help="A later one; default: the last that all have.")
@click.option("--json", "as_json", is_flag=True, help="Print the losses and the weights as one JSON line.")
def command(runs: tuple[str, ...], first: float | None, last: float | None, as_json: bool) -> int:
    """Print the weights of the losses of several classifiers (task.blend), by how they generalise and overfit.

    Each RUN trained one classifier: a branch alone, or the joint one with the weights {joint: 1}. Its evaluations must
    be on held-out training samples (data.eval_split), never on the split that results are reported of. The weight is
    proportional to dG / dO^2 from one evaluation to the other: dG is by how much the loss on held-out samples fell, dO
    by how much its distance from the loss in training grew (Wang et al., arXiv 1905.12681).
    """
    from perceiver.api.blending import estimate

    found = estimate(dict(_named(text) for text in runs), first, last)
    if as_json:
        say_json(found)
        return 0
    say(f"from epoch {found['from']:g} to {found['to']:g}")
    for name, one in found["runs"].items():
        say(
            f"  {name:<12} train {one['train'][0]:.4f} -> {one['train'][1]:.4f}, held out {one['held_out'][0]:.4f} -> "
            f"{one['held_out'][1]:.4f}, weight {one['weight']:.3f}"
        )
    say("task.blend: {" + ", ".join(f"{name}: {one['weight']:.3f}" for name, one in found["runs"].items()) + "}")
    return 0


def _named(text: str) -> tuple[str, str]:
    name, equals, run = text.partition("=")
    if not (name and equals and run):
        raise click.BadParameter(f"got {text!r}; wanted NAME=RUN, such as audio=runs/audio-001")
    return name, run
