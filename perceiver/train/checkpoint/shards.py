"""Training state on disk, independent of how it was sharded.

Every writer stores the flat tensors of its optimizer (weights in float32 and both moments) as safetensors, with an
index of the elements of parameters that they contain. A reader reads its own elements from all files, so a state saved
at one ZeRO stage and number of workers is restored at any other. No file is a pickle.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from perceiver.config import UserError
from perceiver.optim.partition import Layouts, state_of

_HEADER = "engine.json"
_FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_shard(folder: Path, number: int, layouts: Layouts, optimizer: Any) -> None:
    """Write what this rank's optimizer contains as `shard-NUMBER.safetensors`."""
    tensors: dict[str, Tensor] = {}
    index = []
    for position, (flat, layout) in enumerate(layouts.items()):
        state = state_of(optimizer, flat)
        for part, values in {"param": flat, **{key: state[key] for key in MOMENTS}}.items():
            tensors[f"{position}.{part}"] = values.detach().reshape(-1).to("cpu", copy=True)
        pieces = [[layout.names[piece.parameter], piece.start, piece.offset, piece.length] for piece in layout.pieces]
        index.append({"step": int(state["step"]), "pieces": pieces})
    save_file(tensors, _shard_path(folder, number), {"index": json.dumps(index)})


def save_whole_shard(folder: Path, number: int, parameters: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Write whole parameters as `shard-NUMBER.safetensors`.

    Args:
        folder: folder of the training state.
        number: number of the shard.
        parameters: `param`, `exp_avg` and `exp_avg_sq` by name of the parameter, on the CPU.
        step: number of optimizer steps taken.
    """
    tensors = {
        f"{position}.{part}": values.detach().reshape(-1)
        for position, parts in enumerate(parameters.values())
        for part, values in parts.items()
    }
    index = [{"step": step, "pieces": [[name, 0, 0, parts["param"].numel()]]} for name, parts in parameters.items()]
    save_file(tensors, _shard_path(folder, number), {"index": json.dumps(index)})


def save_header(folder: Path, shapes: Mapping[str, Iterable[int]], writers: int, **facts: Any) -> None:
    """Write `engine.json`: the model's shapes, the number of shards, and further facts."""
    header = {"format": _FORMAT, "writers": writers, **facts, "shapes": {name: list(shapes[name]) for name in shapes}}
    (folder / _HEADER).write_text(json.dumps(header, indent=1))


def check_header(folder: Path, shapes: Mapping[str, Iterable[int]], optim: str) -> dict[str, Any]:
    """Read `engine.json`.

    Raises:
        UserError: nothing was saved here, or the model, the optimizer or the format differs.
    """
    path = folder / _HEADER
    if not path.is_file():
        raise UserError(f"no training state {path}; wanted a folder written by an engine's save")
    header = json.loads(path.read_text())
    if header.get("format") != _FORMAT:
        raise UserError(f"{path} has format {header.get('format')!r}; this version reads {_FORMAT}")
    _check_same_model(shapes, header["shapes"], path)
    if header["optim"] != optim:
        raise UserError(
            f"{path} was saved with optim.kind = {header['optim']!r}, this run has {optim!r}: make them agree"
        )
    return header


def _check_same_model(ours: Mapping[str, Iterable[int]], saved: Mapping[str, Iterable[int]], path: Path) -> None:
    for name in sorted(ours.keys() | saved.keys()):
        mine, theirs = (tuple(shapes[name]) if name in shapes else "(absent)" for shapes in (ours, saved))
        if mine != theirs:
            raise UserError(
                f"{path} is from another model: {name} has shape {theirs} there, {mine} in the recipe's model; "
                "use the recipe of that checkpoint, or start a new run"
            )


def load_shards(folder: Path, writers: int, layouts: Layouts, optimizer: Any) -> int:
    """Fill this rank's flat tensors and moments from all writers' shards; return the number of steps taken.

    Reads only the elements of this rank.

    Raises:
        UserError: a shard or elements are missing.
    """
    with contextlib.ExitStack() as stack:
        sources = _Sources([stack.enter_context(_open(_shard_path(folder, number))) for number in range(writers)])
        for flat, layout in layouts.items():
            state = state_of(optimizer, flat)
            for part, tensor in {"param": flat.detach(), **{key: state[key] for key in MOMENTS}}.items():
                line = tensor.contiguous().view(-1)
                for piece in layout.pieces:
                    target = line.narrow(0, piece.offset, piece.length)
                    sources.fill(target, part, layout.names[piece.parameter], piece.start)
                if not tensor.is_contiguous():
                    tensor.copy_(line.view_as(tensor))
            state["step"].fill_(sources.step)
        return sources.step


def read_parameters(
    folder: Path, writers: int, shapes: Mapping[str, Iterable[int]]
) -> Iterator[tuple[str, dict[str, Tensor], int]]:
    """Yield each parameter's name, its whole `param`, `exp_avg` and `exp_avg_sq`, and the number of steps taken.

    Raises:
        UserError: a shard or elements are missing.
    """
    with contextlib.ExitStack() as stack:
        sources = _Sources([stack.enter_context(_open(_shard_path(folder, number))) for number in range(writers)])
        for name, shape in shapes.items():
            parts = {part: torch.empty(tuple(shape), dtype=torch.float32) for part in ("param", *MOMENTS)}
            for part, tensor in parts.items():
                sources.fill(tensor.view(-1), part, name, 0)
            yield name, parts, sources.step


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the whole state of a saved model in float32, buffers included, from any ZeRO stage.

    Raises:
        UserError: a shard or elements are missing.
    """
    header = json.loads((folder / _HEADER).read_text())
    rest = load_tensors(folder, "rest") or {}
    tensors: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(_shard_path(folder, number))) for number in range(header["writers"])]
        sources = _Sources(files)
        for name, shape in header["shapes"].items():
            if name not in rest:
                tensors[name] = torch.empty(shape, dtype=torch.float32)
                sources.fill(tensors[name].view(-1), "param", name, 0)
    return {name: rest[name] if name in rest else tensors[name] for name in header["shapes"]}


class _Sources:
    """The shards of a saved state, searched by parameter."""

    def __init__(self, files: list[Any]) -> None:
        self._found: dict[str, list[tuple[Any, int, int, int, int]]] = {}
        self.step = 0
        for file in files:
            for position, entry in enumerate(json.loads(file.metadata()["index"])):
                self.step = max(self.step, entry["step"])
                for name, start, offset, length in entry["pieces"]:
                    self._found.setdefault(name, []).append((file, position, start, offset, length))

    def fill(self, target: Tensor, part: str, name: str, start: int) -> None:
        """Copy the elements [start, start + len(target)) of a parameter's weights or moment into the target."""
        filled = 0
        for file, position, have, offset, length in self._found.get(name, []):
            first, last = max(start, have), min(start + target.numel(), have + length)
            if first < last:
                values = file.get_slice(f"{position}.{part}")[offset + first - have : offset + last - have]
                target.narrow(0, first - start, last - first).copy_(values)
                filled += last - first
        if filled != target.numel():
            raise UserError(
                f"the training state is incomplete: {filled} of {target.numel()} elements of {name} were found; "
                "take another checkpoint"
            )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"the training state is incomplete: {path} is missing; take another checkpoint")
    with safe_open(path, framework="pt") as file:
        yield file


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def save_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors (buffers, random generators) as NAME.safetensors."""
    copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    save_file(copies, folder / f"{name}.safetensors")


def load_tensors(folder: Path, name: str) -> dict[str, Tensor] | None:
    """Read what `save_tensors` wrote; None if there is no such file."""
    path = folder / f"{name}.safetensors"
    return load_file(path) if path.is_file() else None
