"""Parameters with a learning rate and a weight decay of their own: `optim.groups` and `optim.layer_decay`."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field
from torch import nn

from perceiver.config import Config, Real, UserError, shown

NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_SHOWN = 200


class GroupConfig(Config):
    """Parameters with settings of their own (recipe key `optim.groups`)."""

    match: str = Field(
        min_length=1, max_length=1000, description="Pattern of the parameters' names, such as `blocks.*`."
    )
    lr_factor: Real = Field(default=1.0, gt=0, le=1e6, description="Multiplies optim.lr for these parameters.")
    weight_decay: Real | None = Field(
        default=None, ge=0, le=100, description="Of these parameters; null: optim.weight_decay. Not biases and norms."
    )


def param_groups(
    module: nn.Module, weight_decay: float, groups: Sequence[GroupConfig] = (), layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of one learning rate and one weight decay; none is empty.

    Biases and norm layers are not decayed; latents, position encodings and embeddings are, as in the papers' code. The
    order of groups depends on the model and the settings only.

    Args:
        module: the model, frozen parts included.
        weight_decay: of parameters of which no group sets it.
        groups: `optim.groups`.
        layer_decay: `optim.layer_decay`.

    Returns:
        Groups for torch's optimizers, with `lr_factor` in addition: the factor of the learning rate.

    Raises:
        UserError: a pattern matches nothing, only frozen parameters, or those of another pattern, or a group's weight
            decay applies to none; or the model does not name its layers, for `layer_decay`.
    """
    exempt = {
        id(param)
        for layer in module.modules()
        for name, param in layer.named_parameters(recurse=False)
        if isinstance(layer, NORMS) or name.endswith("bias")
    }
    settings = _matched(module, groups, exempt)
    factors = _layer_factors(module, layer_decay) if layer_decay is not None else {}
    trainable = [param for param in module.parameters() if param.requires_grad]
    # ZeRO places a group's tensors one after the other: those that would displace the others by less than 16 bytes are
    # the last ones, because compiled layers need aligned weights.
    trainable.sort(key=lambda param: (id(param) in exempt, param.numel() % 8 != 0))
    found: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for param in trainable:
        group = settings.get(id(param))
        factor = factors.get(id(param), 1.0) * (group.lr_factor if group else 1.0)
        decay = weight_decay if group is None or group.weight_decay is None else group.weight_decay
        fixed = id(param) in exempt
        found.setdefault((fixed, factor, 0.0 if fixed else decay), []).append(param)
    return [
        {"params": params, "weight_decay": decay, "lr_factor": factor} for (_, factor, decay), params in found.items()
    ]


def _matched(module: nn.Module, groups: Sequence[GroupConfig], exempt: set[int]) -> dict[int, GroupConfig]:
    """Return the group of each parameter that has one, by the parameter's id."""
    found: dict[int, GroupConfig] = {}
    for group in groups:
        what = f"optim.groups: match = {shown(repr(group.match), _SHOWN)}"
        matched = matching(module, group.match, what)
        if not any(param.requires_grad for _, param in matched):
            raise UserError(f"{what} matches only parameters that train.freeze excludes: remove it from one of the two")
        if group.weight_decay and all(id(param) in exempt for _, param in matched):
            raise UserError(
                f"{what} has weight_decay = {group.weight_decay:g}, but matches only biases and norms, which are not "
                "decayed: remove weight_decay there"
            )
        for name, param in matched:
            other = found.setdefault(id(param), group)
            if other is not group:
                raise UserError(
                    f"{what} and match = {shown(repr(other.match), _SHOWN)} both match {name}: a parameter belongs to "
                    "one group; narrow one of the patterns"
                )
    return found


def _layer_factors(module: nn.Module, decay: float) -> dict[int, float]:
    """Return the factor of the learning rate of each parameter, by its id.

    What follows the last layer has 1, and each layer before it `decay` times the factor of the next.
    """
    names = list(getattr(module, "layer_names", list)())
    if not names:
        raise UserError(
            f"optim.layer_decay = {decay:g}, but a model of type {type(module).__name__} does not name its layers: "
            "give optim.groups with an lr_factor for each part instead"
        )
    return {id(param): decay ** (len(names) + 1 - depth) for param, depth in _depths(module, names)}


def _depths(module: nn.Module, names: Sequence[str]) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield each parameter with its depth: 0 before the layers, 1 for the first of them, one more after the last."""
    before = 0
    for name, param in module.named_parameters():
        layer = next((number for number, prefix in enumerate(names, 1) if name.startswith(f"{prefix}.")), None)
        yield param, before if layer is None else layer
        if layer is not None:
            before = len(names) + 1


def matching(module: nn.Module, pattern: str, what: str) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters whose names match a shell pattern; one of several names appears under each that matches.

    Raises:
        UserError: there is none; `what` names the key and the pattern.
    """
    named = module.named_parameters(remove_duplicate=False)
    if found := [(name, param) for name, param in named if fnmatchcase(name, pattern)]:
        return found
    parts = list(dict.fromkeys(name.split(".")[0] for name, _ in module.named_parameters()))
    raise UserError(
        f"{what} matches no parameter of the model; its parts are {shown(', '.join(parts), _SHOWN)}: write a pattern "
        f"such as '{parts[0]}.*'"
    )
