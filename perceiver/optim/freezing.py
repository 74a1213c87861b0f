"""Parameters that are not trained: they have no gradient and no optimizer state."""

from collections.abc import Sequence

from torch import nn

from perceiver.config import UserError, shown
from perceiver.optim.groups import matching

_SHOWN = 200


def freeze(module: nn.Module, patterns: Sequence[str]) -> int:
    """Exclude the parameters whose names match any pattern from training; return the number of their elements.

    A parameter that is used under several names is frozen if one of them matches.

    Args:
        module: the model.
        patterns: shell patterns over the names, such as `encoder.*`; `*` also matches dots.

    Raises:
        UserError: a pattern matches no parameter, or nothing would be left to train.
    """
    for pattern in patterns:
        for _, param in matching(module, pattern, f"train.freeze: {pattern!r}"):
            param.requires_grad_(False)
    if patterns and not any(param.requires_grad for param in module.parameters()):
        raise UserError(
            f"train.freeze: {shown(', '.join(map(repr, patterns)), _SHOWN)} freezes all parameters of the model; "
            "leave at least one to train, such as its head"
        )
    return sum(param.numel() for param in module.parameters() if not param.requires_grad)
