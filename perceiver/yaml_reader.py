"""The only reader of YAML from outside: text to plain values, with every surprise refused in one line.

Recipes, searches, tables, settings and command-line overrides may come from somebody else. Accepted are mappings with
texts as keys, sequences, and plain scalars. Dates, octal and base-60 numbers are texts, so that a number's key refuses
them by name.
"""

import re
from typing import Any

import yaml

from perceiver.config import UserError, shown

LARGEST_BYTES = 1_000_000
DEEPEST = 30
MOST_VALUES = 20_000
"""Values in a document, aliases expanded."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LAYOUT = str.maketrans("", "", "\t\n\r")
_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"


def parse_yaml(data: str | bytes, source: str) -> Any:
    """Return the value of a YAML document.

    Args:
        data: the document.
        source: its file or override, for messages.

    Raises:
        UserError: the document is too large or too deep, is not valid YAML, repeats a key, or uses a tag.
    """
    if len(data) > LARGEST_BYTES:
        raise UserError(f"{source} has {len(data):,} bytes, wanted at most {LARGEST_BYTES:,}")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1 if isinstance(data, bytes) else 1
        raise UserError(f"{source}, line {line}: not valid YAML: byte {error.start} is not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "cannot be parsed"
        problem = f"{error.context} {problem}" if problem.startswith("but") else problem
        line = f", line {mark.line + 1}" if mark else ""
        kind = "" if isinstance(error, _Refused) else "not valid YAML: "
        raise UserError(f"{source}{line}: {kind}{shown(problem, 200)}") from None
    except yaml.YAMLError as error:
        position = getattr(error, "position", 0)
        line = text[:position].count("\n") + 1 if isinstance(position, int) else 1
        character = f"U+{getattr(error, 'character', 0):04X}"
        raise UserError(f"{source}, line {line}: not valid YAML: the character {character} is not allowed") from None


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that is refused."""


class _Loader(yaml.SafeLoader):
    """Loads plain values; counts the values and their depth with aliases expanded, so that no document grows."""

    yaml_implicit_resolvers: dict[Any, Any] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._deepest = self._count = 0
        self._shapes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        before, deepest = self._count, self._deepest
        self._count, self._depth = self._count + 1, self._depth + 1
        self._deepest = self._depth
        self._check(event.start_mark)
        alias = isinstance(event, yaml.AliasEvent)
        if not alias and getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _Refused(problem=f"the tag {tag} is not supported: remove it", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        if alias:
            if id(node) not in self._shapes:
                raise _Refused(problem=f"*{event.anchor} contains itself", problem_mark=event.start_mark)
            size, height = self._shapes[id(node)]
            self._count, self._deepest = self._count + size, self._depth + height
            self._check(event.start_mark)
        else:
            self._shapes[id(node)] = (self._count - before, self._deepest - self._depth)
        self._depth, self._deepest = self._depth - 1, max(deepest, self._deepest)
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if found := _CONTROL.search(node.value.translate(_LAYOUT)):
            problem = f"the character U+{ord(found[0]):04X} is not allowed in text"
            raise _Refused(problem=problem, problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TEXT, _MERGE):
                named = repr(shown(key.value)) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise _Refused(problem=f"the key {named} is not a text: quote it", problem_mark=key.start_mark)
            if key.value in lines:
                problem = f"the key {shown(key.value)} is given twice, first in line {lines[key.value]}: remove one"
                raise _Refused(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node

    def _check(self, mark: Any) -> None:
        if self._deepest > DEEPEST:
            raise _Refused(problem=f"nested deeper than {DEEPEST} levels", problem_mark=mark)
        if self._count > MOST_VALUES:
            raise _Refused(problem=f"more than {MOST_VALUES:,} values, aliases expanded", problem_mark=mark)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]{0,39})\Z"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"),
    [*"-+0123456789."],
)
