"""What tests of a package with plug-ins need: the contract of each kind as a function (docs/plugins.md)."""

from perceiver.testing.contracts import (
    SMALL_MODEL,
    check_feature,
    check_hook,
    check_modality,
    check_model,
    check_source,
    check_task,
)

__all__ = [
    "SMALL_MODEL",
    "check_feature",
    "check_hook",
    "check_modality",
    "check_model",
    "check_source",
    "check_task",
]
