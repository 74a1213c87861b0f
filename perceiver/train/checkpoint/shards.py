"""Training state on disk, independent of how it was sharded.

Every writer stores the flat tensors of its optimizer (weights in float32 and the optimizer's moments) as safetensors,
with an index of the elements of parameters that they contain. A reader reads its own elements from all files, so a
state saved at one ZeRO stage and number of workers is restored at any other. No file is a pickle.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perceiver.config import UserError
from perceiver.optim.partition import AVERAGE, Layouts, moments_of, state_of
from perceiver.storage import NonNegativeCount, PositiveCount, PrintableName, first_line, invalid_key, parse_json

HEADER = "engine.json"
Weights = Literal["ema", "last"]
"""Which weights of a training state: their moving average (`train.ema`), or those of the last step."""
_FORMAT = 1


class Header(BaseModel):
    """The content of `engine.json`."""

    model_config = ConfigDict(extra="allow")

    format: PositiveCount
    writers: Annotated[int, Field(strict=True, ge=1, le=1 << 20, description="number of shards")]
    optim: PrintableName = Field(default="", description="kind of the optimizer")
    averaged: bool = Field(default=False, strict=True, description="whether it contains an average of the weights")
    shapes: dict[PrintableName, list[NonNegativeCount]] = Field(description="shape of each tensor of the model")


class _Entry(BaseModel):
    """The index of one flat tensor of a shard: (parameter, its first element, place in the tensor, elements)."""

    step: NonNegativeCount
    pieces: list[tuple[PrintableName, NonNegativeCount, NonNegativeCount, NonNegativeCount]]


_INDEX = TypeAdapter(list[_Entry])


def save_shard(folder: Path, number: int, layouts: Layouts, optimizer: Any) -> None:
    """Write what this rank's optimizer contains as `shard-NUMBER.safetensors`."""
    tensors: dict[str, Tensor] = {}
    index = []
    for position, (flat, layout) in enumerate(layouts.items()):
        state = state_of(optimizer, flat)
        for part, values in {"param": flat, **{key: state[key] for key in moments_of(optimizer)}}.items():
            tensors[f"{position}.{part}"] = values.detach().reshape(-1).to("cpu", copy=True)
        pieces = [[layout.names[piece.parameter], piece.start, piece.offset, piece.length] for piece in layout.pieces]
        index.append({"step": int(state["step"]), "pieces": pieces})
    save_file(tensors, folder / shard_name(number), {"index": json.dumps(index)})


def save_whole_shard(folder: Path, number: int, parameters: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Write whole parameters as `shard-NUMBER.safetensors`.

    Args:
        folder: folder of the training state.
        number: number of the shard.
        parameters: `param` and the moments of each, by name of the parameter, on the CPU.
        step: number of optimizer steps taken.
    """
    tensors = {
        f"{position}.{part}": values.detach().reshape(-1)
        for position, parts in enumerate(parameters.values())
        for part, values in parts.items()
    }
    index = [{"step": step, "pieces": [[name, 0, 0, parts["param"].numel()]]} for name, parts in parameters.items()]
    save_file(tensors, folder / shard_name(number), {"index": json.dumps(index)})


def save_header(folder: Path, shapes: Mapping[str, Iterable[int]], writers: int, **facts: Any) -> None:
    """Write `engine.json`: the model's shapes, the number of shards, and further facts."""
    header = {"format": _FORMAT, "writers": writers, **facts, "shapes": {name: list(shapes[name]) for name in shapes}}
    (folder / HEADER).write_text(json.dumps(header, indent=1))


def read_header(folder: Path) -> Header:
    """Read `engine.json`.

    Raises:
        UserError: it is missing, damaged, or of another format.
    """
    path = _regular(folder / HEADER)
    return parse_header(path.read_bytes(), str(path))


def parse_header(content: bytes, where: str) -> Header:
    """Return the content of an `engine.json`; see `read_header`."""
    try:
        header = Header.model_validate(parse_json(content, where))
    except ValidationError as error:
        raise UserError(f"{where} is not a training state: {invalid_key(error)}; take another checkpoint") from None
    if header.format != _FORMAT:
        raise UserError(f"{where} has format {header.format}; this version reads {_FORMAT}")
    return header


def check_header(folder: Path, shapes: Mapping[str, Iterable[int]], optim: str) -> Header:
    """Read `engine.json` and compare it with this run.

    Raises:
        UserError: nothing was saved here, or the model, the optimizer or the format differs.
    """
    header, path = read_header(folder), folder / HEADER
    _check_same_model(shapes, header.shapes, path)
    if header.optim != optim:
        raise UserError(f"{path} was saved with optim.kind = {header.optim!r}, this run has {optim!r}: make them agree")
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
        UserError: a shard or elements are missing, or a shard is damaged.
    """
    with contextlib.ExitStack() as stack:
        moments = moments_of(optimizer)
        sources = _Sources(stack, folder, writers, moments)
        for flat, layout in layouts.items():
            state = state_of(optimizer, flat)
            for part, tensor in {"param": flat.detach(), **{key: state[key] for key in moments}}.items():
                line = tensor.contiguous().view(-1)
                for piece in layout.pieces:
                    target = line.narrow(0, piece.offset, piece.length)
                    sources.fill(target, part, layout.names[piece.parameter], piece.start)
                if not tensor.is_contiguous():
                    tensor.copy_(line.view_as(tensor))
            state["step"].fill_(sources.step)
        return sources.step


def read_parameters(
    folder: Path, writers: int, shapes: Mapping[str, Iterable[int]], moments: Sequence[str]
) -> Iterator[tuple[str, dict[str, Tensor], int]]:
    """Yield each parameter's name, its whole `param` and moments, and the number of steps taken.

    Raises:
        UserError: a shard or elements are missing, or a shard is damaged.
    """
    with contextlib.ExitStack() as stack:
        sources = _Sources(stack, folder, writers, moments)
        for name, shape in shapes.items():
            parts = {part: torch.empty(tuple(shape), dtype=torch.float32) for part in ("param", *moments)}
            for part, tensor in parts.items():
                sources.fill(tensor.view(-1), part, name, 0)
            yield name, parts, sources.step


def read_weights(folder: Path, weights: Weights | None = None) -> dict[str, Tensor]:
    """Return the whole state of a saved model in float32, buffers included, from any ZeRO stage.

    Args:
        folder: folder of the training state.
        weights: the moving average or the last weights; default: the average if there is one.

    Raises:
        UserError: a shard or elements are missing, a shard is damaged, or there is no average.
    """
    header = read_header(folder)
    if weights == "ema" and not header.averaged:
        raise UserError(
            f"{folder} has no average of the weights: it was trained without train.ema; wanted weights=last"
        )
    part = AVERAGE if header.averaged and weights != "last" else "param"
    rest = load_tensors(folder, "rest") or {}
    tensors: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        sources = _Sources(stack, folder, header.writers, (part,))
        for name, shape in header.shapes.items():
            if name not in rest:
                sources.check(name, math.prod(shape))
                tensors[name] = torch.empty(shape, dtype=torch.float32)
                sources.fill(tensors[name].view(-1), part, name, 0)
    return {name: rest[name] if name in rest else tensors[name] for name in header.shapes}


class _Sources:
    """The shards of a saved state, searched by parameter: the weights, and the named moments."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, writers: int, moments: Sequence[str]) -> None:
        self._found: dict[str, list[tuple[Any, int, int, int, int]]] = {}
        self.folder = folder
        steps: set[int] = set()
        for number in range(writers):
            path = _regular(folder / shard_name(number))
            file = stack.enter_context(open_tensors(path))
            try:
                index = _INDEX.validate_python(parse_json((file.metadata() or {}).get("index", ""), f"{path}: index"))
            except ValidationError as error:
                raise UserError(f"{path}: index: {invalid_key(error)}; take another checkpoint") from None
            for position, entry in enumerate(index):
                steps.add(entry.step)
                size = min(_flat_size(file, path, f"{position}.{part}") for part in ("param", *moments))
                for name, start, offset, length in entry.pieces:
                    if offset + length > size:
                        raise UserError(
                            f"{path}: index: {name} has elements up to {offset + length}, the tensor {size};"
                            " take another checkpoint"
                        )
                    self._found.setdefault(name, []).append((file, position, start, offset, length))
        self.step = max(steps, default=0)
        if len(steps) > 1:
            raise UserError(f"{folder}: its shards are of steps {min(steps)} to {self.step}; take another checkpoint")

    def check(self, name: str, elements: int) -> None:
        """Refuse a parameter of which elements are missing or stored twice."""
        end = 0
        for _, _, start, _, length in sorted(self._found.get(name, []), key=lambda piece: piece[2]):
            if start != end:
                break
            end += length
        found = sum(length for *_, length in self._found.get(name, []))
        if not end == found == elements:
            raise UserError(
                f"the training state {self.folder} is incomplete: {found} of {elements} elements of {name} were found,"
                f" {end} of them in order; take another checkpoint"
            )

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


def _flat_size(file: Any, path: Path, name: str) -> int:
    """Return the elements of a flat tensor of real numbers."""
    try:
        found = file.get_slice(name)
    except SafetensorError:
        raise UserError(f"{path} has no tensor {name}; take another checkpoint") from None
    shape, kind = found.get_shape(), found.get_dtype()
    if len(shape) != 1 or kind not in ("F32", "F64", "F16", "BF16"):
        raise UserError(f"{path}: tensor {name} is {kind} of shape {shape}, wanted F32 of one axis")
    return shape[0]


@contextlib.contextmanager
def open_tensors(path: Path, where: str = "") -> Iterator[Any]:
    """Open a safetensors file, which checks its header against its size.

    Args:
        path: the file.
        where: what to call it in an error; default: its path.

    Raises:
        UserError: it is damaged, or a tensor read in the `with` block is missing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where or path} is not a sound safetensors file ({first_line(error)})") from None


def _regular(path: Path) -> Path:
    """Return the path if it is a regular file, not a link, a folder or a FIFO."""
    if path.is_symlink() or not path.is_file():
        raise UserError(f"the training state is incomplete: {path} is missing or no file; take another checkpoint")
    return path


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def save_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors (buffers, random generators) as NAME.safetensors."""
    copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    save_file(copies, folder / f"{name}.safetensors")


def load_tensors(
    folder: Path, name: str, shapes: Mapping[str, Iterable[int]] | None = None
) -> dict[str, Tensor] | None:
    """Read what `save_tensors` wrote; None if there is no such file.

    Args:
        folder: folder of the training state.
        name: of the file, without its suffix.
        shapes: shapes of tensors that must be there.

    Raises:
        UserError: the file is damaged, or a tensor is missing or of another shape.
    """
    path = folder / f"{name}.safetensors"
    if not path.exists() and not shapes:
        return None
    with open_tensors(_regular(path)) as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it has no __iter__
    for key, shape in (shapes or {}).items():
        if key not in found or found[key].shape != torch.Size(shape):
            has = f"has {key} of shape {list(found[key].shape)}" if key in found else f"lacks {key}"
            raise UserError(f"{path} {has}, wanted shape {list(shape)}; take another checkpoint")
    return found
