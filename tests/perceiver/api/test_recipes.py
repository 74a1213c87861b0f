"""Overrides of the Python interface as `KEY=VALUE`; errors that show no secrets."""

import pickle
import warnings
from typing import Any

import pytest

import perceiver
from cluster.recipe.file import apply_override
from perceiver.api.models import warn
from perceiver.api.recipes import words
from perceiver.config import UserError


@pytest.mark.parametrize(
    "value",
    [
        1e-05,
        [1e-05, -3e20, 1.5e-07, 0.25, 12, 1e16],
        {"a": {"b": [2e-08]}, "c": '1e-05, \\" 2e-05'},
        "\U0001f600 Grüße 1e5",
        "a\ufeffb",
        {"schlüssel": [None, True, ""]},
    ],
)
def test_a_value_is_the_same_after_yaml(value: Any) -> None:
    tree: dict[str, Any] = {}
    (override,) = words({"x.y": value})
    apply_override(tree, override)
    assert tree == {"x": {"y": value}} and type(tree["x"]["y"]) is type(value)


def test_a_line_separator_is_refused_not_changed() -> None:
    with pytest.raises(UserError, match=r"U\+0085 is not allowed"):
        apply_override({}, *words({"x": "a\x85b"}))


def test_errors_and_warnings_show_no_secret() -> None:
    with pytest.raises(perceiver.UserError) as found:
        perceiver.load_model("nothing://user:pw-12345@host/run")
    error = UserError("a password=pw-12345 b")
    failed = perceiver.RunError("http://user:pw-12345@host/run: failed", perceiver.Run("x"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("http://user:pw-12345@host/run")
    for text in (str(found.value), repr(error), str(pickle.loads(pickle.dumps(error))), str(failed), *map(str, caught)):
        assert "pw-12345" not in text and "***" in text
