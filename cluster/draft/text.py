"""The text of a drafted recipe: a header with the facts, then the sections with comments."""

import textwrap
from typing import Any

import yaml

from cluster.draft.inputs import TARGETS
from cluster.draft.length import MOST_EPOCHS, Length
from cluster.draft.recipe import Draft, Machine
from cluster.recipe.config import kind_of
from cluster.recipe.preflight import CheckedModel
from perceiver.tracking.printable import safe_line
from pipelines.shards.manifest import Manifest

NAMES = 8
"""Most classes that are named."""
WIDTH = 120


def recipe_text(
    draft: Draft, checked: CheckedModel, length: Length, machine: Machine, seconds: float, file: str
) -> str:
    """Return a recipe as the text of a YAML file.

    Args:
        draft: the sections.
        checked: the recipe as it was checked.
        length: of the run.
        machine: on which the step was measured.
        seconds: of a step.
        file: name of the recipe's file.
    """
    data, workers = draft.tree["data"], draft.tree["cluster"]["workers"]
    facts = {
        "Data": describe_data(checked.manifest, data["url"]),
        "Task": f"{draft.goal.facts}, from {draft.part.facts}",
        "Model": f"{checked.parameters:,} parameters; model, optimizer and batch after {draft.nearest}, whose header"
        " states what it reaches on its data",
        "Command": f"perceiver train {file}",
        "Length": describe_length(length),
        "Machine": f"{machine}; a step of {length.train['global_batch']} samples on {workers} workers takes about"
        f" {seconds:.2g} s here (measured with random inputs)",
        "Keys": "perceiver keys lists all keys; what is not given here has its default",
    }
    lines = [f"# {draft.tree['name']}: a first recipe for these data, written by perceiver init.", "#"]
    for key, text in facts.items():
        lines += _comment(f"{key:<9} {text}", indent=10)
    capped = (f"there is time for more than {MOST_EPOCHS} epochs, after which models mostly memorise",)
    every = ("eval_every, checkpoint_every: epochs between two evaluations, and between two checkpoints",)
    notes = {**draft.notes, "train": (*capped * length.capped, *every)}
    for section, value in draft.tree.items():
        for note in notes.get(section, ()):
            lines += _comment(note)
        lines.append(_dumped({section: value}))
    return "\n".join(lines) + "\n"


def describe_data(manifest: Manifest, url: str) -> str:
    """Return name, place, splits, features and classes of data as one line."""
    splits = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
    features = ", ".join(
        f"{name} ({kind_of(feature)})" if kind_of(feature) in TARGETS or kind_of(feature) != name else name
        for name, feature in manifest.features.items()
    )
    counts = [count for values in manifest.class_counts.values() for count in values]
    spread = f"{min(counts):,} to {max(counts):,}" if len(set(counts)) > 1 else f"{counts[0]:,}" if counts else ""
    each = f" of {spread} samples" * bool(counts)
    names = ", ".join(name[:40] for name in manifest.classes[:NAMES]) + ", ..." * (len(manifest.classes) > NAMES)
    classes = f"; {len(manifest.classes)} classes{each}: {names}" if manifest.classes else ""
    return f"{manifest.name} in {url}: {splits} samples; features {features}{classes}"


def describe_length(length: Length) -> str:
    """Return epochs, steps and minutes as one line."""
    minutes = f"{length.minutes:.2g}" if length.minutes < 10 else f"{length.minutes:.0f}"
    steps = f"{length.steps:,} steps of {length.train['global_batch']}"
    return f"{length.epochs:.3g} epochs = {steps}, about {minutes} minutes here, plus start-up"


def _comment(text: str, indent: int = 0) -> list[str]:
    """Return the lines of a comment, whatever characters the text has."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in safe_line(text))
    prefix = "# " + " " * indent
    return textwrap.wrap(printable, WIDTH, initial_indent="# ", subsequent_indent=prefix, break_on_hyphens=False)


def _dumped(section: dict[str, Any]) -> str:
    """Return a section as YAML; collections without further ones in a line."""
    text = yaml.safe_dump(section, sort_keys=False, default_flow_style=None, width=WIDTH, allow_unicode=True)
    # Without nested collections PyYAML writes the whole section as a flow mapping in braces.
    if text.startswith("{"):
        text = yaml.safe_dump(section, sort_keys=False, default_flow_style=False, width=WIDTH, allow_unicode=True)
    return text.rstrip("\n")
