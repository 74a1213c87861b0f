"""`python -m tests.contracts`: what the sources must keep to and import-linter cannot say; exit code 1 if they do not.

Private names of other libraries stand in `ray_internals.py` and `deepspeed_internals.py` alone; triton, the C++
extension and one oneDNN operator in `perceiver/kernels/` aside. Other modules, tests and benchmarks too, read no
underscore attribute but their own. No import cycle, imports in functions and under `TYPE_CHECKING` included. No folder
of more than 16 modules, apart from those with one module for each thing.
"""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

OURS = ("perceiver", "perceiver_train", "pipelines", "cluster", "tune")
USERS = ("tests", "benchmarks")
LIBRARIES = {"ray", "deepspeed", "torch", "optuna", "fsspec", "mlflow", "pyarrow", "transformers", "pydantic"}
ALLOWED = re.compile(
    r"(ray_internals|deepspeed_internals)\.py$|^perceiver/kernels/(extension|dense|separable_triton)\.py$"
)
PUBLIC_BY_USE = re.compile(r"^torch\._foreach_\w+$|^torch\.utils\._(python_dispatch|pytree)\b")
"""Names with an underscore that torch's own documentation tells users to call."""
PUBLIC_ATTRIBUTES = {"_exit", "_getframe", "_current_frames", "_replace", "_asdict", "_label_trainable_num_channels"}
"""Attributes that are documented: of os, sys and named tuples, and a key of transformers' configuration files."""
LARGE = {"pipelines/sources", "perceiver/cli", "perceiver/tasks", "perceiver/modalities", "perceiver/baselines"}
MOST = 16


def private(name: str) -> bool:
    """Return whether a dotted name is a private one of another library."""
    first, *rest = name.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in rest)
    return first in LIBRARIES and hidden and not PUBLIC_BY_USE.search(name)


def dotted(node: ast.AST) -> str:
    """Return the dotted name that an expression spells, empty if it is none."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of each import, attribute and string that looks like a dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, dotted(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            yield node.lineno, node.value


def foreign(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of each underscore attribute of an object that this module does not define."""
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)]
    mine = [isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") for node in attributes]
    own |= {node.attr for node, here in zip(attributes, mine, strict=True) if here}
    for node, here in zip(attributes, mine, strict=True):
        shown = ast.unparse(node)
        if not here and node.attr not in own | PUBLIC_ATTRIBUTES and not PUBLIC_BY_USE.search(shown):
            yield node.lineno, shown


def overrides(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of each method that overrides a private one of its base class and calls it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            inner = node.func.value
            is_super = isinstance(inner, ast.Call) and dotted(inner.func) == "super"
            if is_super and re.match(r"_[^_]", node.func.attr):
                yield node.lineno, f"super().{node.func.attr}"


def imported(tree: ast.AST, modules: dict[str, Path]) -> set[str]:
    """Return our modules that one imports; a package counts only where it has more than a docstring."""
    wanted = {name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in (a.name for a in node.names)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            wanted |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in wanted if name in modules and modules[name].name != "__init__.py"}


def problems(root: Path) -> Iterator[str]:
    """Yield one line for each place that breaks a contract."""
    files = [path for top in OURS for path in sorted((root / top).rglob("*.py"))]
    modules = {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in files}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = imported(ast.parse(path.read_text(encoding="utf-8")), modules) - {name}
    for path in (*files, *(path for top in USERS for path in sorted((root / top).rglob("*.py")))):
        tree, place = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(root).as_posix()
        if not ALLOWED.search(place):
            found = {(line, what) for line, what in names(tree) if private(what)}
            found |= {*overrides(tree), *foreign(tree)}
            yield from (f"{place}:{line}: private name {what}" for line, what in sorted(found))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "import cycle: " + " -> ".join(error.args[1])
    for folder in sorted({path.parent for path in files}):
        count = sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        if count > MOST and folder.relative_to(root).as_posix() not in LARGE:
            yield f"{folder.relative_to(root)}/ has {count} modules; wanted at most {MOST}"


if __name__ == "__main__":
    broken = list(problems(Path(__file__).parents[1]))
    print("\n".join(broken) or "contracts kept")
    sys.exit(bool(broken))
