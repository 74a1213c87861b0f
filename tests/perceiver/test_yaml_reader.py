"""Reading YAML from outside: plain values, or one line with file, line and reason."""

from typing import Any

import pytest

from perceiver.config import UserError
from perceiver.yaml_reader import DEEPEST, LARGEST_BYTES, MOST_VALUES, parse_yaml

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, DEEPEST + 5))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1\nb: [1.5, yes, ~, x]", {"a": 1, "b": [1.5, True, None, "x"]}),
        (
            "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: *a}",
            {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 1, "y": 2}},
        ),
        ("a: &a [1]\nb: *a", {"a": [1], "b": [1]}),
        (
            "d: 2026-01-01\nt: 12:30:00\no: 010\nl: 1_000",
            {"d": "2026-01-01", "t": "12:30:00", "o": "010", "l": "1_000"},
        ),
        (b"\xef\xbb\xbfa: \xc3\xa4", {"a": "ä"}),
        ("a: 1\r\n", {"a": 1}),
        ("", None),
        ('{"a": [1, 2e+3]}', {"a": [1, "2e+3"]}),
    ],
)
def test_plain_values_are_read(text: str | bytes, value: Any) -> None:
    assert parse_yaml(text, "f.yaml") == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {a: 1}\nx: 1\ntrain: {b: 1}", ["line 3", "train", "line 1"]),
        ("a: {b: {c: 1, c: 2}}", ["line 1", "key c"]),
        ("[" * 5000, ["line 1", str(DEEPEST)]),
        ("{a: " * 5000, ["line 1", str(DEEPEST)]),
        ("- " * 5000 + "x", ["line 1", str(DEEPEST)]),
        (CHAIN, [str(DEEPEST)]),
        (BOMB, [f"{MOST_VALUES:,}"]),
        ("[" + "a," * 400_000 + "]", [f"{MOST_VALUES:,}"]),
        ("a: &a [*a]", ["line 1", "*a"]),
        ("&a {x: *a}", ["line 1", "*a"]),
        ("a: *b", ["line 1", "'b'"]),
        ("a: !!int x", ["line 1", "!!int"]),
        ("a: !!python/object/apply:os.system [x]", ["line 1", "!!python"]),
        ("a: !!binary aGk=", ["line 1", "!!binary"]),
        ("a: !own x", ["line 1", "!own"]),
        ("a: 1\n---\nb: 1", ["line 2", "document"]),
        ("1: x", ["line 1", "'1'"]),
        ("yes: x", ["line 1", "'yes'"]),
        ("? [a, b]\n: c", ["line 1", "sequence"]),
        ("a:\n\t- x", ["line 2", "\\t"]),
        ("a: \0", ["line 1", "U+0000"]),
        ('a: "\\0"', ["line 1", "U+0000"]),
        ('a: "\\ud800"', ["line 1", "U+D800"]),
        ("a: \x1b[31m", ["line 1", "U+001B"]),
        (b"a: 1\nb: \xff", ["line 2", "UTF-8"]),
        ("a: 1".encode("utf-16"), ["line 1", "UTF-8"]),
        ("#" * (LARGEST_BYTES + 1), [f"{LARGEST_BYTES:,}"]),
        ("a: [1", ["line 1"]),
    ],
)
def test_everything_else_is_refused_in_one_line(text: str | bytes, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "f.yaml")
    message = str(caught.value)
    assert message.startswith("f.yaml") and all(part in message for part in parts), message
    assert "\n" not in message and len(message) < 300
