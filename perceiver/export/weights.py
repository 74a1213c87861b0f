"""Reads weights from a run's folder, one of its checkpoints, a safetensors file or a transformers folder."""

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from perceiver.config import Config, UserError, shown
from perceiver.export.facts import FACTS, DataFacts, parse_classes, parse_facts
from perceiver.factory import build_model, model_config, on_meta
from perceiver.modalities._positions import resize_table
from perceiver.storage import existing_file, first_line, invalid_key, is_local, open_url, parse_json, refusing
from perceiver.train.checkpoint.shards import Weights, open_tensors, read_weights
from perceiver.train.checkpoint.store import CheckpointManifest, CheckpointStore
from perceiver.yaml_reader import parse_yaml

HEADS = ("head.", "decoder.", "answer.", "net.classifier.")
"""Prefixes of tensors that belong to a task and may keep their initial values; all others must be in the weights."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Saved:
    """Weights with their origin.

    Args:
        place: the file or folder that they were read from.
        tensors: the model's state by name.
        model: the model's config; None if unknown.
        recipe: the recipe that trained them; empty if unknown.
        facts: the run's facts (run.json); empty if unknown.
        classes: names of the classes, in the order of the model's outputs; None if unknown.
    """

    place: str
    tensors: dict[str, Tensor]
    model: Config | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def digest(self) -> str:
        """Return 16 hexadecimal digits that identify the tensors and their names."""
        found = hashlib.sha256()
        for name in sorted(self.tensors):
            found.update(name.encode())
            found.update(self.tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()[:16]

    @property
    def data(self) -> DataFacts | None:
        """The recorded training data; None if the run has no record."""
        found = self.facts.get("data")
        return TypeAdapter(DataFacts).validate_python(found) if found else None

    def build(self, **changes: Any) -> nn.Module:
        """Build the model with these weights, in evaluation mode; `changes` replace keys of its config.

        Raises:
            UserError: the model's config is unknown, or the weights are of another model.
        """
        if self.model is None:
            raise UserError(f"{self.place}: got weights without a model's config; wanted a recipe.yaml next to them")
        config = self.model.model_copy(update=changes)
        classes = class_count(self.model, self.shapes)
        wanted = _meta_state(config, classes)
        if strange := wanted.keys() ^ self.tensors.keys():
            raise UserError(f"{self.place}: the weights do not belong to the recipe's model: see {min(strange)}")
        for name, tensor in self.tensors.items():
            like = wanted[name]
            if tensor.shape != like.shape or tensor.is_floating_point() != like.is_floating_point():
                raise UserError(
                    f"{self.place}: got {name} {tensor.dtype} of shape {list(tensor.shape)}; wanted {like.dtype} of"
                    f" shape {list(like.shape)} for the recipe's model"
                )
        model = build_model(config, classes=classes)
        model.load_state_dict(self.tensors)
        return model.eval()


def class_count(config: Config, shapes: Shapes) -> int | None:
    """Return the number of classes, derived from the shapes of a state; None for a model without a classifier."""
    return next((shapes[name][0] for name in class_tensors(config) if name in shapes), None)


def class_tensors(config: Config) -> tuple[str, ...]:
    """Return the tensors of a model that have one row for each class, by name."""
    one, two = _meta_state(config, 1), _meta_state(config, 2)
    return tuple(name for name in one if one[name].shape != two[name].shape)


def _meta_state(config: Config, classes: int | None) -> dict[str, Tensor]:
    with on_meta():
        return build_model(config, classes=classes).state_dict()


def open_weights(place: str, weights: Weights | None = None) -> Saved:
    """Read weights from a run's folder (its model.safetensors, else its newest sound checkpoint), a checkpoint's
    folder, a safetensors file, or a folder that transformers wrote; paths or fsspec URLs.

    Args:
        place: the place.
        weights: of a run's folder or a checkpoint: the moving average of the weights, or the last ones, which a run's
            newest checkpoint has; default: the average if the run has one (`train.ema`).

    Raises:
        UserError: none of these is there, it is damaged, or a tensor has NaN or infinite values; or `weights` is given
            for another place, or a run without an average.
    """
    saved = _open(place, weights)
    for name, tensor in saved.tensors.items():
        if not name.isprintable():
            raise UserError(f"{saved.place}: got tensor {name[:80]!r}; wanted names that can be printed")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{saved.place}: tensor {name} has NaN or infinite values: use weights of an earlier step")
    return saved


def _open(place: str, weights: Weights | None) -> Saved:
    fs, path = open_url(place.rstrip("/") or place)
    with refusing(place, "check the place and the access to it"):
        names = ("config.json", "engine.json", "recipe.yaml", "checkpoints", _FILE)
        there = {name: fs.exists(f"{path}/{name}") for name in names}
        is_file = fs.isfile(path)
    if weights and not (there["engine.json"] or there["checkpoints"]):
        raise UserError(f"{place}: weights = {weights!r} needs a run's folder or one of its checkpoints")
    if is_file:
        return _from_file(place, fs, path)
    if there["config.json"]:
        return _from_transformers(place, fs, path)
    if there["engine.json"]:
        folder, _, name = place.rstrip("/").rpartition("/")
        if not re.fullmatch(r"step-\d{8,15}", name):
            raise UserError(f"{place}: got a checkpoint's files in a folder named {name}; wanted step- and 8 digits")
        store, step = CheckpointStore(folder), int(name.removeprefix("step-"))
        if problems := store.problems(step):
            raise UserError(f"{store.location(step)}: {problems[0]}; take another checkpoint")
        return _from_checkpoint(store, store.manifest(step), weights)
    if there[_FILE] and weights is None:
        return _from_file(f"{place.rstrip('/')}/{_FILE}", fs, f"{path}/{_FILE}")
    if there["recipe.yaml"] or weights:
        store = CheckpointStore(f"{place.rstrip('/')}/checkpoints")
        newest = store.newest()
        if newest is None:
            raise UserError(f"{place}: got a run without weights or a sound checkpoint; train it with --resume first")
        return _from_checkpoint(store, newest, weights)
    raise UserError(
        f"{place}: got {'neither weights nor a run' if fs.exists(path) else 'nothing'}; wanted a run's "
        "folder, a checkpoint, a .safetensors file or a folder that transformers wrote"
    )


_FILE = "model.safetensors"


@contextlib.contextmanager
def _local(fs: Any, path: str) -> Iterator[Path]:
    """Yield a local path of a file: its own, or that of a temporary copy."""
    if is_local(fs):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        fs.get_file(path, f"{folder}/weights")
        yield Path(folder, "weights")


def _from_file(place: str, fs: Any, path: str) -> Saved:
    folder, _, name = path.rpartition("/")
    try:
        existing_file(fs, folder, name)
        with _local(fs, path) as local, open_tensors(local, place) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it has no __iter__
            metadata = file.metadata() or {}
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: cannot be read ({first_line(error)})") from None
    recipe, facts, classes = _recipe(fs, folder), _facts(fs, folder), None
    if "facts" in metadata:  # those of the run may have been of a longer training that has not ended yet
        facts |= parse_facts(metadata["facts"], f"{place}: facts")
    if "classes" in metadata:
        classes = tuple(parse_classes(metadata["classes"], f"{place}: classes"))
    values = parse_json(metadata["model"], f"{place}: model") if "model" in metadata else recipe.get("model")
    model = _model(values, place) if values else None
    return Saved(place, tensors, model, recipe, facts, classes or _recorded_classes(facts))


def _recorded_classes(facts: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the classes in a run's facts; None if it has none."""
    return tuple((facts.get("data") or {}).get("classes", ())) or None


def _read(fs: Any, folder: str, name: str) -> bytes | None:
    """Return the content of a file, or None if it does not exist."""
    try:
        path = existing_file(fs, folder, name)
        return fs.cat_file(path) if fs.exists(path) else None
    except OSError as error:
        raise UserError(f"{folder}/{name} cannot be read: {first_line(error)}") from None


def _facts(fs: Any, folder: str) -> dict[str, Any]:
    return parse_facts(_read(fs, folder, FACTS) or "{}", f"{folder}/{FACTS}")


def _recipe(fs: Any, folder: str) -> dict[str, Any]:
    where = f"{folder}/recipe.yaml"
    return _sections(parse_yaml(_read(fs, folder, "recipe.yaml") or b"", where) or {}, where)


def _sections(tree: Any, where: str) -> dict[str, Any]:
    """Return a recipe as it was read; refuse one without the form of a recipe."""
    whole = isinstance(tree, dict)
    wrong = [key for key in ("data", "task", "model") if not isinstance(tree.get(key, {}), dict)] if whole else [""]
    if wrong:
        raise UserError(f"{where} is not a recipe: {wrong[0] or 'it'} is not a section with keys: restore it")
    return tree


def _model(values: Any, where: str) -> Config:
    try:
        return model_config(values)
    except ValidationError as error:
        raise UserError(f"{where}: model.{invalid_key(error)}") from None


def _from_checkpoint(store: CheckpointStore, manifest: CheckpointManifest, weights: Weights | None) -> Saved:
    step, where = manifest.step, store.location(manifest.step)
    recipe = _sections(manifest.recipe, where)
    if "model" not in recipe:
        raise UserError(f"{where}: its recipe has no model section: take another checkpoint")
    facts = _facts(store.fs, store.root.rpartition("/")[0])
    with store.fetch(step) as folder:
        tensors = read_weights(folder, weights)
    if facts.get("step") != step or weights == "last":
        facts.pop("evaluation", None)  # it belongs to the run's last step, and its average if there is one
    model = _model(recipe["model"], where)
    return Saved(where, tensors, model, recipe, {**facts, "step": step}, _recorded_classes(facts))


def _from_transformers(place: str, fs: Any, path: str) -> Saved:
    from perceiver.export.transformers_folder import read_transformers

    if not is_local(fs):
        raise UserError(f"{place}: got a transformers folder at a URL; wanted a local copy")
    ours = read_transformers(path)
    return Saved(place, dict(ours.state_dict()), cast(Config, ours.config))


@dataclass(frozen=True)
class WeightPlan:
    """How a model is initialized from saved weights: tensors taken, resized to its grid, or left at initial values.

    `order` has the row in the saved tensors of each class, if the classes are the same in another order; `remark` says
    in what the classes differ.
    """

    taken: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    order: tuple[int, ...] = ()
    remark: str = ""

    def describe(self, place: str) -> str:
        """Return the plan in one line."""
        parts = [f"{len(self.taken)} tensors from {place}"]
        parts += [f"resized {', '.join(self.resized)}"] if self.resized else []
        parts += [f"fresh {', '.join(self.fresh)}"] if self.fresh else []
        parts += [self.remark] if self.remark else []
        return "starts from " + "; ".join(parts)


def plan_weights(model: nn.Module, saved: Saved, classes: Sequence[str] = ()) -> WeightPlan:
    """Plan the initialization of a model from saved weights; a head that does not fit keeps its initial values.

    The tensors with one row for each class keep them also if the classes have other names; classes of the same names in
    another order are reordered.

    Args:
        model: to initialize.
        saved: the weights.
        classes: names of the classes of the data.

    Raises:
        UserError: another tensor is missing or of another shape.
    """
    shapes = saved.shapes
    taken, resized, fresh = [], [], []
    rows = class_tensors(saved.model) if classes and saved.model else ()
    fits = any(shapes.get(name, ())[:1] == (len(classes),) for name in rows)
    order, remark = _compare_classes(saved, classes) if fits else ((), "")
    other = bool(remark) and not order and saved.classes is not None
    for name, tensor in model.state_dict().items():
        if shapes.get(name) == tuple(tensor.shape) and not (other and name in rows):
            taken.append(name)
        elif name.startswith(HEADS):
            fresh.append(name)
        elif name in shapes and _resizable(model, name, saved):
            resized.append(name)
        else:
            has = f"has {name} of shape {list(shapes[name])}" if name in shapes else f"lacks {name}"
            raise UserError(
                f"train.init_from: {saved.place} {has}, the recipe's model has {list(tensor.shape)}: change the "
                "recipe's model section to that of these weights"
            )
    extra = next((name for name in shapes if name not in model.state_dict() and not name.startswith(HEADS)), None)
    if extra:
        raise UserError(
            f"train.init_from: {saved.place} has {extra}, which the recipe's model lacks: make the model section that "
            "of these weights"
        )
    return WeightPlan(tuple(taken), tuple(resized), tuple(fresh), order, remark)


def _compare_classes(saved: Saved, classes: Sequence[str]) -> tuple[tuple[int, ...], str]:
    """Return the row of each class in saved weights, if only the order differs, and a remark if anything does."""
    known = saved.classes
    if known is None:
        return (), "its head is taken, although the names of its classes are unknown"
    if tuple(classes) == known:
        return (), ""
    if sorted(classes) == sorted(known) and len(set(known)) == len(known):
        return tuple(known.index(name) for name in classes), "its classes are in another order: its head is reordered"
    return (), f"new head: its classes are {_some(known)}, those of the data {_some(classes)}"


def _some(classes: Sequence[str]) -> str:
    return f"{len(classes)} ({shown(', '.join(classes), 60)})"


def _resizable(model: nn.Module, name: str, saved: Saved) -> bool:
    """Return whether a tensor is a table of learned positions whose saved grid is known and has as many axes."""
    if saved.model is None or not name.endswith("positions.table"):
        return False
    old, new = _grid(_meta_model(saved.model), name), _grid(model, name)
    width = model.state_dict()[name].shape[1]
    return len(old) == len(new) and saved.tensors[name].shape[1] == width


def _meta_model(config: Config) -> nn.Module:
    with on_meta():
        return build_model(config, classes=1)


def _grid(model: nn.Module, name: str) -> tuple[int, ...]:
    return cast(Any, model.get_submodule(name.removesuffix(".table"))).grid


def load_weights(model: nn.Module, saved: Saved, classes: Sequence[str] = ()) -> WeightPlan:
    """Load saved weights into a model in place, by `plan_weights`; learned positions are interpolated."""
    start = plan_weights(model, saved, classes)
    values = {name: saved.tensors[name] for name in start.taken}
    if start.order:
        rows = set(class_tensors(cast(Config, saved.model))) & values.keys()
        values |= {name: values[name][list(start.order)] for name in rows}
    for name in start.resized:
        old = _grid(_meta_model(cast(Config, saved.model)), name)
        values[name] = resize_table(saved.tensors[name].float(), old, _grid(model, name))
    model.load_state_dict(values, strict=False)
    return start
