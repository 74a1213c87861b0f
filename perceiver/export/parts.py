"""Initial weights of a model's parts from several runs: `train.init_from: {front: RUN, ...}`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from perceiver.config import UserError
from perceiver.export.weights import Saved, WeightPlan, load_weights, open_weights, plan_weights


def plan_parts(model: nn.Module, places: Mapping[str, str], classes: Sequence[str] = ()) -> dict[str, WeightPlan]:
    """Plan the initialization of a model's parts, by their names.

    Args:
        model: to initialize.
        places: a place of weights, as for `open_weights`, for each part: the dotted name of a module. The weights are
            those of a model with such a part, or else of a model that is this part, whose head may be missing here.
        classes: names of the classes of the data.

    Raises:
        UserError: there is no such part, two overlap, or a tensor of a part is not in its weights, of another shape or
            of other classes; the message names part, file and tensor.
    """
    return {part: _plan(module, saved, part, classes) for part, (module, saved) in _parts(model, places).items()}


def load_parts(model: nn.Module, places: Mapping[str, str], classes: Sequence[str] = ()) -> None:
    """Load the weights of a model's parts in place, by `plan_parts`."""
    for part, (module, saved) in _parts(model, places).items():
        _plan(module, saved, part, classes)
        load_weights(module, saved, classes)


def _parts(model: nn.Module, places: Mapping[str, str]) -> dict[str, tuple[nn.Module, Saved]]:
    """Return each part and its weights, by names that begin in the part."""
    modules = {name: module for name, module in model.named_modules() if name and module.state_dict()}
    for part in places:
        if part not in modules:
            first = sorted({name.split(".")[0] for name in modules})
            raise UserError(f"train.init_from.{part}: the model has no part {part!r}; wanted one as {', '.join(first)}")
        if inner := next((other for other in places if other.startswith(f"{part}.")), None):
            raise UserError(f"train.init_from: got {part} and {inner}, which is a part of it; wanted one of them")
    return {
        part: (modules[part], _of_module(modules[part], open_weights(place), part)) for part, place in places.items()
    }


def _of_module(module: nn.Module, saved: Saved, part: str) -> Saved:
    """Return the weights of a part; its method `published`, if it has one, maps the names of published weights."""
    saved = _of_part(saved, part)
    rename = getattr(module, "published", None)
    return replace(saved, tensors=rename(saved.tensors), model=None) if rename else saved


def _of_part(saved: Saved, part: str) -> Saved:
    """Return the weights of a part of the saved model, if it has a part of that name, or of the end of it; else all.

    A part `detector.model` is `model` in the weights of a detector alone.
    """
    names = part.split(".")
    for start in range(len(names)):
        prefix = ".".join(names[start:]) + "."
        tensors = {name.removeprefix(prefix): t for name, t in saved.tensors.items() if name.startswith(prefix)}
        if tensors:
            return replace(saved, tensors=tensors, model=None)
    return saved


def _plan(module: nn.Module, saved: Saved, part: str, classes: Sequence[str]) -> WeightPlan:
    try:
        plan = plan_weights(module, saved, classes)
    except UserError as error:
        raise UserError(str(error).replace("train.init_from:", f"train.init_from.{part}:", 1)) from None
    if plan.fresh:
        why = plan.remark or "it is missing there, or of another shape"
        raise UserError(
            f"train.init_from.{part}: {saved.place} gives no {plan.fresh[0]} ({why}): wanted all tensors of a part; "
            "use weights of the same model and classes"
        )
    return plan
