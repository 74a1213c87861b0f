"""The layout of a folder of raw data: which splits and classes the names of its files and folders state.

Shared by all sources that read files. What these rules take for a split or a class, and what they leave out, is told in
`Listing.notes`, which `perceiver prepare` prints.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perceiver.config import UserError
from perceiver.storage import Folder
from pipelines.sources._common import choice, share
from pipelines.sources._files import Found

SPLIT_WORDS = {
    "train": ("train", "training"),
    "trainval": ("trainval",),
    "val": ("val", "valid", "validation"),
    "dev": ("dev",),
    "test": ("test", "testing"),
    "eval": ("eval", "evaluation"),
}
"""Spellings of the splits, in any case."""
STORED_AS = {"trainval": "train", "dev": "val", "eval": "test"}
ORDER = ("train", "val", "test")
SHOWN = 3
"""Names that a line or an error shows."""
NOTHING_TO_EVALUATE = "no split to evaluate on: --option held_out=0.2 holds out a share of train"

_KNOWN = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_LETTERS = re.compile(r"[^\W\d_]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")

Labelled = tuple[str, int | tuple[int, ...]]
"""A path relative to the source folder, and its class, or its classes where it may have several."""


def split_words(name: str) -> list[str]:
    """Return the splits that the words of a file's or folder's name spell: `TrainImages_2017` has the word train."""
    words = (word for run in _LETTERS.findall(name) for word in (run, *_CAMEL.split(run)))
    return list(dict.fromkeys(_KNOWN[word.lower()] for word in words if word.lower() in _KNOWN))


def _base(name: str) -> str:
    """Return a file's name without folders and ending."""
    return name.rsplit("/", 1)[-1].split(".")[0] or name.rsplit("/", 1)[-1]


def split_option(options: Mapping[str, str]) -> bool:
    """Return whether names state splits: the option `splits`, names (default) or none."""
    return choice(options, "splits", ("names", "none"), "names") == "names"


def splits_of_files(folder: Folder, names: Sequence[str], options: Mapping[str, str]) -> dict[str, list[str]]:
    """Return files by split, train first: a word of the file's name decides, else one of the nearest folder's.

    Files without such a word belong to train; if no file has one, the only split is "", of which a share may be held
    out.

    Raises:
        UserError: a name states two splits, or several spellings are used for one, so that they may be different sets.
    """
    if not split_option(options):
        return {"": list(names)}
    stated: dict[str, str] = {}
    for name in names:
        own = split_words(_base(name))
        outer = next((words for part in reversed(name.split("/")[:-1]) if (words := split_words(part))), [])
        if len(own) > 1 or len(outer) > 1 or (own and outer and own != outer and "train" in own + outer):
            raise UserError(
                f"{folder.url}/{name} names more than one split ({', '.join([*outer, *own])}): rename it or its"
                " folder, or set --option splits=none to take no split from names"
            )
        stated[name] = "".join(own or outer)
    if not any(stated.values()):
        return {"": list(names)}
    return by_split(folder, stated)


def by_split(folder: Folder, stated: Mapping[str, str]) -> dict[str, list[str]]:
    """Return files by the split that they are stored as.

    Args:
        folder: the source folder, for the error.
        stated: each file's split as it is spelled; empty for train.

    Raises:
        UserError: two spellings are stored as one split.
    """
    examples: dict[str, dict[str, str]] = {}
    splits: dict[str, list[str]] = {}
    for name, spelled in stated.items():
        split = STORED_AS.get(spelled, spelled or "train")
        examples.setdefault(split, {}).setdefault(spelled or "train", name)
        splits.setdefault(split, []).append(name)
    for split, names in examples.items():
        if len(names) > 1:
            found = " and ".join(f"{spelled} ({name})" for spelled, name in names.items())
            raise UserError(
                f"{folder.url} has {found}, which would both be the split {split}: move one away, or prepare them apart"
            )
    return {split: splits[split] for split in ORDER if split in splits}


@dataclass(frozen=True)
class ClassFiles:
    """Files of a tree with a folder per class.

    Attributes:
        classes: the names of the classes, sorted.
        splits: the files of each split with their classes; only "" if no name states a split.
        notes: what was taken for splits and classes.
    """

    classes: list[str]
    splits: Mapping[str, Sequence[Labelled]]
    notes: tuple[str, ...]


def class_files(folder: Folder, found: Found, options: Mapping[str, str]) -> ClassFiles:
    """Find splits and classes of files by the names of their folders.

    The layouts are `CLASS/**/FILE`, `SPLIT/CLASS/**/FILE` and `CLASS/SPLIT/**/FILE`, also below folders that contain
    nothing else. A split is never taken for a class. Files without a class, and training files that are named after
    another split, are left out and counted in `found`.

    Args:
        folder: the source folder.
        found: its files.
        options: of the source; `splits=none` takes all folders as classes.

    Raises:
        UserError: there are no classes, a class has no training files, or folders of splits and of classes lie next to
            each other.
    """
    tree = [(name, name.split("/")[:-1]) for name in found.names]
    by_name = split_option(options)
    depth = _split_depth(folder, [folders for _, folders in tree]) if by_name else None
    members = list(_in_classes(tree, found) if depth is None else _in_splits(tree, depth, found))
    if by_name:
        members = list(_without_others(members, found))
    if not members:
        raise UserError(
            f"{folder.url} has {counted(len(found.names), 'file')}, but none in the folder of a class to train on:"
            f" wanted CLASS/FILE, or train/CLASS/FILE with test/CLASS/FILE{'; '.join(['', *found.notes()])}"
        )
    classes = sorted({label for _, label, _ in members})
    index = {label: number for number, label in enumerate(classes)}
    labels = {name: index[label] for _, label, name in members}
    files = by_split(folder, {name: split for split, _, name in members}) if depth is not None else {"": list(labels)}
    splits = {split: [(name, labels[name]) for name in names] for split, names in files.items()}
    check_classes(folder, classes, splits)
    return ClassFiles(classes, splits, _tree_notes(classes, splits, members))


def _split_depth(folder: Folder, tree: list[list[str]]) -> int | None:
    """Return the depth at which the folders are splits; None if none are."""
    for depth in range(max(map(len, tree), default=0)):
        level = {folders[depth] for folders in tree if len(folders) > depth}
        exact = {name for name in level if _exact_split(name)}
        spelled = {word for name in level for word in split_words(name)[:1]}
        all_spelled = len(spelled) > 1 and "train" in spelled and all(map(split_words, level))
        outside = [folders for folders in tree if depth and len(folders) <= depth]
        if (all_spelled or (exact and exact == level)) and not outside:
            return depth
        if exact:
            others = sorted(level - exact) or ["/".join(folders) for folders in outside]
            raise UserError(
                f"{folder.url} has folders of splits ({', '.join(sorted(exact)[:SHOWN])}) next to others"
                f" ({', '.join(others[:SHOWN])}{', ...' if len(others) > SHOWN else ''}): move the others away, or set"
                " --option splits=none if all are classes"
            )
        if len(level) > 1 and depth >= 1:
            return None
    return None


def _exact_split(name: str) -> bool:
    """Return whether a folder's name is a split and nothing else but digits and signs."""
    words = _LETTERS.findall(name)
    return len(words) == 1 and words[0].lower() in _KNOWN


def _in_splits(tree: list[tuple[str, list[str]]], depth: int, found: Found) -> Iterator[tuple[str, str, str]]:
    """Yield (split, class, file) of a tree with folders of splits at a depth."""
    inner = []
    for name, folders in tree:
        if len(folders) > depth:
            split, below = split_words(folders[depth])[0], folders[depth + 1 :]
            # Archives that were unpacked into a folder of their own name: seg_train/seg_train/CLASS.
            below = below[1:] if below and split_words(below[0])[:1] == [split] else below
            inner.append((name, split, folders[:depth], below))
        else:
            found.ignore("files outside the folders of the splits", name)
    outer = {tuple(above) for _, _, above, _ in inner}
    classes_first = depth > 0 and (len(outer) > 1 or not any(below for _, _, _, below in inner))
    for name, split, above, below in inner:
        if classes_first or below:
            yield split, above[-1] if classes_first else below[0], name
        else:
            found.ignore(f"files of {split} without the folder of a class", name)


def _in_classes(tree: list[tuple[str, list[str]]], found: Found) -> Iterator[tuple[str, str, str]]:
    """Yield ("", class, file) of a tree of classes, also below folders that contain nothing else."""
    levels = [
        {folders[depth] for _, folders in tree}
        for depth in range(min((len(folders) for _, folders in tree), default=0))
    ]
    depth = next((depth for depth, level in enumerate(levels) if len(level) > 1), 0)
    for name, folders in tree:
        if len(folders) > depth:
            yield "", folders[depth], name
        else:
            found.ignore("files outside the folders of classes", name)


def _without_others(members: list[tuple[str, str, str]], found: Found) -> Iterator[tuple[str, str, str]]:
    """Yield the members without training files that are named after another split, whose place is unclear."""
    for split, label, name in members:
        words = split_words(_base(name)) if split in ("", "train", "trainval") else []
        if words and not {"train", "trainval"} & set(words):
            found.ignore("training files named after another split (--option splits=none takes them)", name)
        else:
            yield split, label, name


def check_classes(folder: Folder, classes: Sequence[str], splits: Mapping[str, Sequence[Labelled]]) -> None:
    """Refuse classes without training files."""
    if "train" not in splits:
        if "" not in splits:
            raise UserError(
                f"{folder.url} has files of {', '.join(splits)} only, in folders of classes: wanted train/CLASS/FILE"
            )
        return
    trained = {label for _, label in splits["train"]}
    missing = [name for number, name in enumerate(classes) if number not in trained]
    if missing:
        number = classes.index(missing[0])
        example = next(name for members in splits.values() for name, label in members if label == number)
        raise UserError(
            f"{folder.url}: {len(missing)} of {len(classes)} classes have no training files:"
            f" {', '.join(missing[:SHOWN])} (for example {example}): move held-out files into the folders of their"
            " classes, or move these away"
        )


def _tree_notes(
    classes: Sequence[str], splits: Mapping[str, Sequence[Labelled]], members: Iterable[tuple[str, str, str]]
) -> tuple[str, ...]:
    spelled = Counter(split for split, _, _ in members)
    found = [
        f"{STORED_AS.get(split, split)} ({counted(count, 'file')}{f' of {split}' if split in STORED_AS else ''})"
        for split, count in spelled.items()
        if split
    ]
    notes = [*class_notes(classes), f"splits: {', '.join(found) or 'none named'}"]
    if set(splits) == {"train"}:
        notes.append(NOTHING_TO_EVALUATE)
    return tuple(notes)


def counted(count: int, unit: str) -> str:
    """Return a number of things in words, such as `1 file` or `2 files`."""
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def split_notes(splits: Mapping[str, Sequence[str]], held_out: float, unit: str = "file") -> tuple[str, ...]:
    """Return a line about the files, or rows, of each split, with an example of each.

    Args:
        splits: files by split, see `splits_of_files`.
        held_out: the share that is held out; 0 if none is.
        unit: what the names are of.
    """
    found = ", ".join(f"{split} {counted(len(names), unit)} ({names[0]})" for split, names in splits.items() if split)
    notes = [f"splits: {found or 'none named'}" + (f"; {held_out:g} held out as test" if held_out else "")]
    if set(splits) == {"train"} and not held_out:
        notes.append(NOTHING_TO_EVALUATE)
    return tuple(notes)


def class_notes(classes: Sequence[str]) -> list[str]:
    """Return lines about the classes."""
    shown = ", ".join(classes[:SHOWN]) + (", ..." if len(classes) > SHOWN else "")
    notes = [f"classes: {len(classes):,} ({shown})"]
    return notes if len(classes) > 1 else [*notes, "fewer than two classes: there is nothing to classify"]


def hold_out_classes(
    found: ClassFiles, folder: Folder, options: Mapping[str, str], default: str, rng: random.Random
) -> ClassFiles:
    """Return the files with a share of each class as split `test`, if they have no split to evaluate on.

    Args:
        found: the files.
        folder: the source folder, for the error.
        options: of the source; `held_out` is the share.
        default: the share if no name states a split.
        rng: decides which files.

    Raises:
        UserError: `held_out` is given, but the data have a split to evaluate on.
    """
    part = held_out_share(found.splits, folder, options, default)
    if not part:
        whole = {split or "train": members for split, members in found.splits.items()}
        return ClassFiles(found.classes, whole, found.notes)
    by_class: dict[int, list[Labelled]] = {}
    for member in next(iter(found.splits.values())):
        by_class.setdefault(member[1] if isinstance(member[1], int) else 0, []).append(member)
    splits: dict[str, list[Labelled]] = {"train": [], "test": []}
    for label in sorted(by_class):
        rng.shuffle(by_class[label])
        cut = min(round(len(by_class[label]) * part), len(by_class[label]) - 1)
        splits["test"] += by_class[label][:cut]
        splits["train"] += by_class[label][cut:]
    splits = {split: members for split, members in splits.items() if members}
    notes = [note for note in found.notes if note != NOTHING_TO_EVALUATE]
    several = any(not isinstance(label, int) for members in splits.values() for _, label in members)
    if "test" in splits:
        of = "the files" if several else "the files of each class"
        return ClassFiles(found.classes, splits, (*notes, f"held out: {part:g} of {of}, as test"))
    note = (
        f"no split to evaluate on: the classes have too few files to hold out {part:g} of each: set --option held_out"
    )
    return ClassFiles(found.classes, splits, (*notes, note))


def held_out_share(splits: Mapping[str, Any], folder: Folder, options: Mapping[str, str], default: str) -> float:
    """Return the share of the only split to hold out as `test`; 0 if nothing is.

    Args:
        splits: as the names state them: only "" if they state none.
        folder: the source folder, for the error.
        options: of the source; `held_out` is the share, or `none`.
        default: the share if the names state no splits.

    Raises:
        UserError: `held_out` is given, but the data have a split to evaluate on.
    """
    if options.get("held_out") == "none" or not ("" in splits or "held_out" in options):
        return 0.0
    if "" in splits:
        return share(options, "held_out", default)
    if set(splits) != {"train"}:
        raise UserError(
            f"option held_out={options['held_out']}: {folder.url} has the splits {', '.join(splits)} by its names;"
            " remove the option, or set splits=none"
        )
    return share(options, "held_out", default)
