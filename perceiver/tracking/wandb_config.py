"""The settings of Weights & Biases, and what its process needs to know of a run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from perceiver.config import Config, UserError
from perceiver.tracking.redaction import flatten, redact

KEY = "WANDB_API_KEY"
"""The environment variable with the key; it is never in a recipe."""
REFUSED = "/\\#?%:"
"""Characters that W&B refuses in the name of a project."""


def _name(value: str) -> str:
    if not value.strip() or any(character in REFUSED or not character.isprintable() for character in value):
        raise ValueError(f"got {value!r}, wanted a name without {' '.join(REFUSED)}")
    return value


class WandbConfig(Config):
    """A run in Weights & Biases (recipe key `tracking.wandb`)."""

    project: Annotated[str, AfterValidator(_name)] | None = Field(
        default=None, max_length=128, description="project; default: WANDB_PROJECT, else the recipe's name"
    )
    entity: Annotated[str, AfterValidator(_name)] | None = Field(
        default=None, max_length=128, description="user or team; default: WANDB_ENTITY, else that of the key"
    )
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: write to wandb/ in the run's folder, without network, for `wandb sync`"
    )

    def check(self) -> None:
        """Raise a UserError if the mode needs a key that is not set."""
        if self.mode == "online" and not os.environ.get(KEY):
            raise UserError(
                f"tracking.wandb: {KEY} is not set: set it in the environment (on a cluster: where the nodes start), "
                "or set tracking.wandb.mode=offline"
            )

    def request(self, folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `perceiver.tracking.wandb_writer` is told, with secrets masked.

        Args:
            folder: the run's folder on a local disk.
            recipe: the recipe, as plain types.
        """
        params = {key: value for key, value in flatten(redact(recipe)).items() if not key.startswith("tracking.")}
        return {
            "folder": str(folder),
            "project": self.project or os.environ.get("WANDB_PROJECT") or str(recipe["name"]),
            "entity": self.entity or os.environ.get("WANDB_ENTITY"),
            "mode": self.mode,
            "config": params,
        }
