"""Tensors of a folder that transformers wrote: one safetensors file, or shards with an index."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from perceiver.config import PLAIN_NAME, UserError, shown
from perceiver.storage import existing_file, first_line, parse_json
from perceiver.train.checkpoint.shards import open_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_SHARDS = 10_000


def read_tensors(folder: str, name: str) -> dict[str, Tensor]:
    """Return the tensors by name.

    Args:
        folder: a local folder.
        name: class of the model, for the message.

    Raises:
        UserError: there are no safetensors, the index names something else than files of the folder, or a file or a
            tensor of it is missing.
    """
    if (single := _existing(folder, SINGLE)).is_file():
        with open_tensors(single) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it has no __iter__
    index = _existing(folder, INDEX)
    if not index.is_file():
        pickled = sorted(path.name for path in Path(folder).glob("*.bin"))
        has = f"pickled weights ({shown(pickled[0])}), which are not read" if pickled else "no weights"
        raise UserError(
            f"{folder}: got {has}; wanted {SINGLE} or {INDEX}: convert them with transformers, "
            f"{name}.from_pretrained({folder!r}).save_pretrained('NEW')"
        )
    places = _weight_map(parse_json(index.read_bytes(), str(index)), str(index))
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(places.values()):
        path = _existing(folder, shard)
        if not path.is_file():
            raise UserError(f"{folder}: {shard} is missing, which {INDEX} names: restore it")
        with open_tensors(path) as file:
            there = set(file.keys())
            for key in (key for key, place in places.items() if place == shard):
                if key not in there:
                    raise UserError(f"{path} has no tensor {shown(key)}, which {INDEX} places there: restore the files")
                tensors[key] = file.get_tensor(key)
    return tensors


def _existing(folder: str, name: str) -> Path:
    try:
        return Path(existing_file(LocalFileSystem(), folder, name))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from None


def _weight_map(tree: Any, where: str) -> Mapping[str, str]:
    """Return the file of each tensor; refuse an index that names anything but safetensors files of its folder."""
    places = tree.get("weight_map") if isinstance(tree, Mapping) else None
    if not isinstance(places, Mapping) or not places:
        raise UserError(f"{where} is no index of safetensors: it has no weight_map: restore it")
    for name in places.values():
        if not isinstance(name, str) or not re.fullmatch(rf"{PLAIN_NAME}\.safetensors", name):
            raise UserError(
                f"{where}: got the file {shown(repr(name))}; wanted a name such as model-00001-of-00002.safetensors"
            )
    if len(set(places.values())) > MOST_SHARDS:
        raise UserError(f"{where}: got {len(set(places.values())):,} files; wanted at most {MOST_SHARDS:,}")
    return places
