"""The base class of all configurations, and the error for invalid user input."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class UserError(Exception):
    """A mistake in the user's input.

    The message is one line: what was got, what was wanted, the key or file, and the fix. The command line prints it
    without a traceback and exits with status 2.
    """


class Config(BaseModel):
    """Base of all configuration classes: unknown keys are errors, instances do not change, defaults are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    retired: ClassVar[tuple[str, ...]] = ()
    """Keys without a meaning in this version that recipes of earlier runs and exports contain; they are ignored."""

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, given: Any) -> Any:
        if not cls.retired or not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if key not in cls.retired}
