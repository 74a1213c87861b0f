"""What several sources share: options, lists of files, units of shuffled items, seeds."""

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
"""What parts of a data set are called in file and folder names."""


def source_folder(name: str, src: str | None, wanted: str) -> Folder:
    """The folder that the user gave.

    Raises:
        UserError: none given, or it does not exist.
    """
    if src is None:
        raise UserError(f"source {name} needs a source folder with {wanted}: perceiver prepare {name} SRC DST")
    folder = open_folder(src)
    if not folder.fs.isdir(folder.path):
        raise UserError(f"source folder {src} does not exist: wanted a folder with {wanted}")
    return folder


def find_files(folder: Folder, suffixes: tuple[str, ...]) -> list[str]:
    """Names relative to the folder of all files below it that end so (lower case), sorted."""
    root = folder.path.rstrip("/") + "/"
    return sorted(path[len(root) :] for path in folder.fs.find(folder.path) if path.lower().endswith(suffixes))


def split_of(name: str) -> str:
    """The part that a file belongs to by the beginning of its name, else by a folder above it, else train."""
    words = [name.rsplit("/", 1)[-1].split(".")[0].split("-")[0].split("_")[0], *reversed(name.split("/")[:-1])]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")


def base_name(src: str) -> str:
    """The last part of a path or URL."""
    return src.rstrip("/").rsplit("/", 1)[-1]


def choice(options: Mapping[str, str], key: str, allowed: Iterable[str], default: str) -> str:
    """An option that takes one of some words.

    Raises:
        UserError: another word.
    """
    value, allowed = options.get(key, default), list(allowed)
    if value not in allowed:
        raise UserError(f"option {key}={value}: wanted one of {', '.join(allowed)}")
    return value


def share(options: Mapping[str, str], key: str, default: str) -> float:
    """An option that is a share.

    Raises:
        UserError: not a number between 0 and 1.
    """
    try:
        value = float(options.get(key, default))
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UserError(f"option {key}={options[key]}: wanted a share between 0 and 1, such as {default}")
    return value


def number(options: Mapping[str, str], key: str, default: int, *, least: int = 1) -> int:
    """An option that is a whole number.

    Raises:
        UserError: no number, or a smaller one.
    """
    text = options.get(key, str(default))
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"option {key}={text}: wanted a whole number of at least {least}, such as {default}")
    return int(text)


def channels(options: Mapping[str, str], default: str = "3") -> int:
    """The option `channels` of image sources.

    Raises:
        UserError: neither 1 nor 3.
    """
    value = options.get("channels", default)
    if value not in ("1", "3"):
        raise UserError(f"option channels={value}: wanted 1 (grey) or 3 (RGB)")
    return int(value)


def hold_out(items: Sequence[Any], part: float, rng: random.Random) -> dict[str, list[Any]]:
    """A random share of the items as split `test`, the rest as `train`; at least one on each side if there are two."""
    shuffled = list(items)
    rng.shuffle(shuffled)
    cut = min(max(1, round(len(shuffled) * part)), len(shuffled) - 1)
    return {"train": shuffled[cut:], "test": shuffled[:cut]} if cut > 0 else {"train": shuffled}


def shuffled_units(
    splits: Mapping[str, Sequence[Any]], rng: random.Random, shard_rows: int, **content: Any
) -> list[Unit]:
    """Units of up to `shard_rows` items each, under `items` beside the content that all share."""
    units = []
    for split, members in splits.items():
        items = list(members)
        rng.shuffle(items)
        units += [
            Unit(split, {**content, "items": items[start : start + shard_rows]})
            for start in range(0, len(items), shard_rows)
        ]
    return units


def item_seed(seed: int, key: str) -> int:
    """A seed for what is random about one item, whatever the order in which items are read."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "little")
