"""Hooks that installed packages offer (recipe key `hooks`, entry points `perceiver.hooks`)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import BeforeValidator

from perceiver import registry
from perceiver.config import Config
from perceiver.train.loop import Hook


def _refuse(value: Any) -> Any:
    raise ValueError(f"no installed package offers hooks ({registry.group('hook')}): install one, or remove the key")


if TYPE_CHECKING:
    HookConfig = Config
elif _OFFERED := registry.offered("hook"):
    HookConfig = registry.union(_OFFERED)
else:
    HookConfig = Annotated[dict[str, Any], BeforeValidator(_refuse)]


def build_hooks(configs: Sequence[Config], rank: int, world: int) -> list[Hook]:
    """Build the hooks of a recipe on one worker; each is called after every step, on every rank."""
    return [cast(Any, config).build(rank=rank, world=world) for config in configs]
