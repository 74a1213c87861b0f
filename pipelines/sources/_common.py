"""Helpers of several sources: options, lists of files, units of items, seeds."""

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder
from pipelines.sources import Unit

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
}
"""Splits by their names in file and folder names."""


def source_folder(name: str, src: str | None, wanted: str) -> Folder:
    """Open the source folder that the user gave, or raise `UserError`."""
    if src is None:
        raise UserError(f"source {name} needs a source folder with {wanted}: perceiver prepare {name} SRC DST")
    folder = open_folder(src)
    if not folder.fs.isdir(folder.path):
        raise UserError(f"source folder {src} does not exist: wanted a folder with {wanted}")
    return folder


def find_files(folder: Folder, suffixes: tuple[str, ...]) -> list[str]:
    """Return all files below a folder with one of these (lower-case) endings, relative to it and sorted."""
    root = folder.path.rstrip("/") + "/"
    return sorted(path[len(root) :] for path in folder.fs.find(folder.path) if path.lower().endswith(suffixes))


def split_of(name: str) -> str:
    """Return the split that a file's name begins with, else the one that a folder above it names, else train."""
    words = [name.rsplit("/", 1)[-1].split(".")[0].split("-")[0].split("_")[0], *reversed(name.split("/")[:-1])]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")


def base_name(src: str) -> str:
    """Return the last part of a path or URL."""
    return src.rstrip("/").rsplit("/", 1)[-1]


def choice(options: Mapping[str, str], key: str, allowed: Iterable[str], default: str) -> str:
    """Return an option that takes one of some words, or raise `UserError`."""
    value, allowed = options.get(key, default), list(allowed)
    if value not in allowed:
        raise UserError(f"option {key}={value}: wanted one of {', '.join(allowed)}")
    return value


def share(options: Mapping[str, str], key: str, default: str) -> float:
    """Return an option that is a share between 0 and 1, or raise `UserError`."""
    try:
        value = float(options.get(key, default))
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UserError(f"option {key}={options[key]}: wanted a share between 0 and 1, such as {default}")
    return value


def number(options: Mapping[str, str], key: str, default: int, *, least: int = 1) -> int:
    """Return an option that is a whole number of at least `least`, or raise `UserError`."""
    text = options.get(key, str(default))
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"option {key}={text}: wanted a whole number of at least {least}, such as {default}")
    return int(text)


def channels(options: Mapping[str, str], default: str = "3") -> int:
    """Return the option `channels` of image sources: 1 (grey) or 3 (RGB)."""
    return int(choice(options, "channels", ("1", "3"), default))


def hold_out(items: Sequence[Any], part: float, rng: random.Random) -> dict[str, list[Any]]:
    """Split items at random into `test`, a share of them, and `train`; of two or more each gets at least one."""
    shuffled = list(items)
    rng.shuffle(shuffled)
    cut = min(max(1, round(len(shuffled) * part)), len(shuffled) - 1)
    return {"train": shuffled[cut:], "test": shuffled[:cut]} if cut > 0 else {"train": shuffled}


def shuffled_units(
    splits: Mapping[str, Sequence[Any]], rng: random.Random, shard_rows: int, **content: Any
) -> list[Unit]:
    """Return `units_of` shuffled items, under `items`."""
    shuffled = {split: list(members) for split, members in splits.items()}
    for items in shuffled.values():
        rng.shuffle(items)
    return units_of(shuffled, shard_rows, "items", **content)


def units_of(splits: Mapping[str, Sequence[Any]], shard_rows: int, name: str, **content: Any) -> list[Unit]:
    """Return units of up to `shard_rows` items each in order, under `name` next to the content that all share."""
    return [
        Unit(split, {**content, name: items[start : start + shard_rows]})
        for split, items in splits.items()
        for start in range(0, len(items), shard_rows)
    ]


def item_seed(seed: int, key: str) -> int:
    """Return a seed for the randomness of one item that does not depend on the order of reading."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "little")
