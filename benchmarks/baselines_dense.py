"""Classical methods on a recipe's prepared data, for tasks whose answer is not one label: flow, words, reconstructions.

    python -m benchmarks.baselines_dense recipes/train/moving_photos.yaml
    python -m benchmarks.baselines_dense runs/docs_words-001        # and what this run has reached
    python -m benchmarks.baselines_dense RECIPE KEY=VALUE ...        # overrides, as of perceiver train

Flow: no motion, and OpenCV's Farnebäck and DIS where `opencv-python-headless` is installed, on the frames as they are
and enlarged. Masked words: the frequency of bytes, of bytes by the length of the word and the place in it, and an
n-gram that backs off from the words on both sides to one of them, and to place and length (Witten and Bell 1991). The
masks are those of an evaluation's probability, in batches of 100. Reconstructions: principal components, as many as the
latents have numbers, divided between the signals in several ways.

All see what the model sees: the recipe's view of the data, through our readers, without augmentation.
"""

import argparse
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.baselines import Arrays, arrays
from cluster.recipe.config import Recipe, kind_of, load_recipe
from perceiver.config import UserError
from perceiver.tasks import build_task
from perceiver.tasks.masked_language import word_numbers
from perceiver.text_ids import SPECIALS
from pipelines.feed.ingest import load_data

Result = tuple[str, dict[str, float], float]
"""Name, figures, seconds."""
LONGEST = 20
"""Longer words, and places further to the right, count as this one."""
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the principal components that are tried for the first signal."""


def flow(recipe: Recipe, train: Arrays, test: Arrays) -> Iterator[Result]:
    """Yield the end-point error of each method."""
    began = time.perf_counter()
    yield (
        "no motion",
        {"epe": error(test, lambda first, second: np.zeros((*first.shape, 2)))},
        time.perf_counter() - began,
    )
    try:
        import cv2  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("(no OpenCV: pip install opencv-python-headless)")
        return
    methods: dict[str, Callable[..., Any]] = {
        f"Farnebäck, window {side}": lambda a, b, side=side: cv2.calcOpticalFlowFarneback(
            a, b, None, 0.5, 3, side, 10, 5, 1.1, 0
        )
        for side in (9, 15, 21)
    }
    for name in ("FAST", "MEDIUM"):
        made = cv2.DISOpticalFlow_create(getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{name}"))
        methods[f"DIS, {name.lower()}"] = lambda a, b, made=made: made.calc(a, b, None)
    for name, method in methods.items():
        for factor in (1, 2, 4):
            began = time.perf_counter()
            found = error(test, lambda a, b, method=method, factor=factor: enlarged(cv2, method, a, b, factor))
            yield f"{name}, enlarged {factor} times", {"epe": found}, time.perf_counter() - began


def enlarged(cv2: Any, method: Callable[..., Any], first: Any, second: Any, factor: int) -> NDArray[Any]:
    """Return the flow (H, W, 2) that a method finds in frames enlarged by a factor."""
    if factor == 1:
        return method(first, second)
    pair = [cv2.resize(each, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC) for each in (first, second)]
    return cv2.resize(method(*pair), first.shape[::-1], interpolation=cv2.INTER_AREA) / factor


def error(test: Arrays, method: Callable[[Any, Any], NDArray[Any]]) -> float:
    """Return the mean end-point error in pixels over the valid pixels of all pairs."""
    total = count = 0.0
    for pair, true, valid in zip(test["video"], test["flow"], test["flow_valid"], strict=True):
        grey = pair.transpose(0, 2, 3, 1).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        first, second = grey.round().astype(np.uint8)
        found = method(first, second).transpose(2, 0, 1)
        total += float(np.hypot(*(found - true))[valid].sum())
        count += float(valid.sum())
    return total / count


class Backoff:
    """Counts of bytes by context; the probability of one falls back to that of a shorter context (Witten and Bell)."""

    def __init__(self) -> None:
        self.counts: dict[Any, Counter[int]] = defaultdict(Counter)

    def add(self, context: Any, byte: int) -> None:
        """Count a byte."""
        self.counts[context][byte] += 1

    def __call__(self, context: Any, byte: int, shorter: float) -> float:
        """Return the probability of a byte after a context."""
        found = self.counts.get(context)
        if not found:
            return shorter
        kinds = len(found)
        return (found[byte] + kinds * shorter) / (found.total() + kinds)


def words_of(ids: NDArray[Any], recipe: Recipe) -> list[list[tuple[int, bytes]]]:
    """Return start and bytes of the words of each text (n, M)."""
    task: Any = recipe.task
    numbers = word_numbers(
        torch.from_numpy(ids), torch.tensor(task.spaces), torch.tensor(task.word_start), task.specials
    ).numpy()
    found = []
    for row, places in zip(ids, numbers, strict=True):
        starts = np.flatnonzero(np.diff(places, prepend=0) * (places > 0))
        lengths = [int((places == places[start]).sum()) for start in starts]
        found.append(
            [
                (int(start), bytes((row[start : start + length] - SPECIALS).tolist()))
                for start, length in zip(starts, lengths, strict=True)
            ]
        )
    return found


def words(recipe: Recipe, train: Arrays, test: Arrays) -> Iterator[Result]:
    """Yield the perplexity of each model at the masked bytes."""
    began = time.perf_counter()
    tables = {name: Backoff() for name in ("byte", "place", "left", "right", "both")}
    for text in words_of(train["text"], recipe):
        for index, (_, word) in enumerate(text):
            left = text[index - 1][1] if index else None
            right = text[index + 1][1] if index + 1 < len(text) else None
            for name, place, byte in contexts(word, left, right):
                tables[name].add(place, byte)
    losses: dict[str, float] = defaultdict(float)
    count = 0
    for masked, text in zip(masks(recipe, test), words_of(test["text"], recipe), strict=True):
        seen = [None if masked[start] else word for start, word in text]
        for index, (_, word) in enumerate(text):
            if seen[index] is not None:
                continue
            left, right = seen[index - 1] if index else None, seen[index + 1] if index + 1 < len(text) else None
            chances = dict[str, float]()
            for name, place, byte in contexts(word, left, right):
                shorter = {
                    "byte": 1 / 256,
                    "place": chances.get("byte", 0),
                    "left": chances.get("place", 0),
                    "right": chances.get("place", 0),
                    "both": (chances.get("left", 0) + chances.get("right", 0)) / 2,
                }[name]
                chances[name] = tables[name](place, byte, shorter)
                losses[name] -= math.log(chances[name])
            count += len(word)
    captions = {
        "byte": "bytes",
        "place": "bytes by place and length of the word",
        "left": "n-gram, word before",
        "right": "n-gram, word after",
        "both": "n-gram, words on both sides",
    }
    for name, caption in captions.items():
        yield caption, {"perplexity": math.exp(losses[name] / count)}, time.perf_counter() - began


def contexts(word: bytes, left: bytes | None, right: bytes | None) -> Iterator[tuple[str, Any, int]]:
    """Yield (table, context, byte) of each byte of a word, from the shortest context to the longest."""
    size = min(len(word), LONGEST)
    for place, byte in enumerate(word):
        at = (size, min(place, LONGEST))
        yield "byte", None, byte
        yield "place", at, byte
        yield "left", (left, at), byte
        yield "right", (right, at), byte
        yield "both", (left, right, at), byte


def masks(recipe: Recipe, test: Arrays) -> Iterator[NDArray[np.bool_]]:
    """Yield which bytes of each text are masked, as an evaluation would."""
    task: Any = build_task(recipe.task, classes=0)
    for start in range(0, len(test["text"]), 100):
        part = {name: torch.from_numpy(test[name][start : start + 100]) for name in ("text", "text_mask")}
        numbers = torch.arange(start, start + len(part["text"]))
        yield from task.masked({**part, "sample_id": numbers}).numpy()


def reconstructions(recipe: Recipe, train: Arrays, test: Arrays) -> Iterator[Result]:
    """Yield the PSNR of principal components with as many numbers as the latents have, by their division."""
    model: Any = recipe.model
    numbers = model.latents * model.latent_channels
    task: Any = build_task(recipe.task, classes=1)
    signals = {}
    for name in task.grids:
        parts = [task.targets({name: torch.from_numpy(each[name])}, name).flatten(1).numpy() for each in (train, test)]
        mean = parts[0].mean(0)
        axes = np.linalg.svd(parts[0] - mean, full_matrices=False)[2]
        signals[name] = (parts[1] - mean, axes)
    shares = SHARES if len(signals) == 2 else (1.0,)
    for share in shares:
        began = time.perf_counter()
        figures = {}
        for (name, (centred, axes)), part in zip(signals.items(), (share, 1 - share), strict=False):
            kept = axes[: round(numbers * part)]
            left = centred - (centred @ kept.T) @ kept
            figures[f"psnr_{name}"] = task.psnr(name, float(np.square(left).mean()))
        shown = " and ".join(f"{round(numbers * part)} of {name}" for name, part in zip(signals, (share, 1 - share)))
        yield f"principal components, {shown}", figures, time.perf_counter() - began


METHODS = {"flow": flow, "masked_language": words, "autoencoding": reconstructions}


def recorded(run: Path, names: list[str]) -> dict[str, float]:
    """Return figures of a run's last evaluation."""
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    last = [row for row in rows if any(name.startswith("eval/") for name in row)][-1]
    return {name: last[f"eval/{name}"] for name in names if f"eval/{name}" in last}


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a recipe, or the folder of a run")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as of perceiver train")
    given = parser.parse_args()
    path = given.source / "recipe.yaml" if given.source.is_dir() else given.source
    recipe = load_recipe(path, given.overrides)
    kind = kind_of(recipe.task)
    if kind not in METHODS:
        raise UserError(f"task.kind = {kind}: wanted {', '.join(METHODS)}; benchmarks/baselines.py takes labels")
    data = recipe.data.model_copy(update={"executor": "inline"})
    manifest = load_data(data)
    train, test = (arrays(data, manifest, split) for split in (data.train_split, data.eval_split))
    print(f"{manifest.name}: {manifest.split(data.train_split).samples:,} {data.train_split}", end="")
    print(f", {manifest.split(data.eval_split).samples:,} {data.eval_split}\n", flush=True)
    shown = False
    for name, figures, seconds in METHODS[kind](recipe, train, test):
        if not shown:
            print("| method | " + " | ".join(figures) + " | seconds |\n|---|" + "---:|" * (len(figures) + 1))
            shown = True
            if given.source.is_dir():
                own = recorded(given.source, list(figures))
                print(
                    f"| ours, {given.source} | " + " | ".join(f"{own.get(k, math.nan):.3f}" for k in figures) + " | |"
                )
        print(
            f"| {name} | " + " | ".join(f"{each:.3f}" for each in figures.values()) + f" | {seconds:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
