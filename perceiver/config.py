"""What every typed configuration shares: strictness, and the error a user sees."""

from pydantic import BaseModel, ConfigDict


class UserError(Exception):
    """A mistake in the user's input.

    The message is one line: what was got, what was wanted, the key or file, and the fix. The command line prints it
    without a traceback and exits with status 2.
    """


class Config(BaseModel):
    """Base of all configuration classes: unknown keys are errors, instances do not change, defaults are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
