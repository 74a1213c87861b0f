"""Failures: which a restart cannot avoid."""

import pytest
from ray.exceptions import RayActorError

from cluster.record.failures import is_final


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (ValueError("x"), True),
        (KeyError("x"), True),
        (ImportError("x"), True),
        (ZeroDivisionError(), True),
        (ConnectionResetError(), False),
        (OSError(28, "no space"), False),
        (RuntimeError("[gloo] Connection closed by peer"), False),
        (MemoryError(), False),
        (RayActorError(error_msg="the actor died"), False),
    ],
)
def test_errors_of_values_and_code_are_final(error: Exception, final: bool) -> None:
    assert is_final(error) == final
