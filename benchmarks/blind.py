"""What the words of tasks alone give, without their images: what a model has to exceed.

    perceiver prepare scenes data/scenes
    python benchmarks/blind.py recipes/train/general.yaml

The answer is the most frequent one of the training split to the same words; to words that were
never seen, such as those of a hidden pair, the most frequent one to the same words with another concept. The boxes are
the mean of the training split. Figures are those of the task `general`.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.baselines import Arrays, arrays, texts  # noqa: E402
from cluster.recipe.config import load_recipe  # noqa: E402
from perceiver.tasks._boxes import average_precision  # noqa: E402
from perceiver.tasks._skills import PARTS  # noqa: E402
from pipelines.feed.ingest import load_data  # noqa: E402
from pipelines.sources._scenes import NAMES  # noqa: E402

CONCEPTS = re.compile("|".join(NAMES))


def questions(rows: Arrays) -> list[tuple[int, str]]:
    """Return skill and words of each row."""
    return list(zip(rows["label"].tolist(), texts(rows["text"], rows["text_mask"]), strict=True))


def masked(question: tuple[int, str]) -> tuple[int, str]:
    """Return a question without the names of its concepts."""
    return question[0], CONCEPTS.sub("#", question[1])


def figures(train: Arrays, test: Arrays, skills: tuple[str, ...]) -> dict[str, float]:
    """Return the share of right answers, and AP50 of one constant box, of each skill and part, in percent."""
    known: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    kinds: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    for question, answer in zip(questions(train), texts(train["answer"], train["answer_mask"]), strict=True):
        known[question][answer] += 1
        kinds[masked(question)][answer] += 1
    there = np.arange(train["boxes"].shape[1]) < train["boxes_count"][:, None]
    box = train["boxes"][there].mean(0, keepdims=True)
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    asked, answers = questions(test), texts(test["answer"], test["answer_mask"])
    for row, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        key = question[0], PARTS[int(test["held_out"][row])]
        if answer:
            guess = (known.get(question) or kinds[masked(question)]).most_common(1)
            found[key].append(float(bool(guess) and guess[0][0] == answer))
        elif (count := int(test["boxes_count"][row])) > 0:
            found[key].append(average_precision(box, [1.0], test["boxes"][row, :count]))
    return {
        f"{skills[skill]}_{part}": round(100 * float(np.mean(each)), 1) for (skill, part), each in sorted(found.items())
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="of the task general, such as recipes/train/general.yaml")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as of perceiver train")
    given = parser.parse_args()
    data = load_recipe(given.recipe, ["data.executor=inline", *given.overrides]).data
    manifest = load_data(data)
    split = {name: arrays(data, manifest, name) for name in ("train", "test")}
    print(json.dumps(figures(split["train"], split["test"], tuple(manifest.classes)), indent=1))


if __name__ == "__main__":
    main()
