"""Models need torch, numpy and pydantic alone; what needs more names the extra."""

import subprocess
import sys

import pytest

from perceiver_train.extras import lacks

CORE = """
import importlib.metadata, re, sys

def closure(names):
    found = set()
    while names:
        name = re.split(r"[^A-Za-z0-9._-]", names.pop())[0].lower().replace("_", "-")
        if name not in found:
            found.add(name)
            try:
                needs = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                needs = []
            names += [need for need in needs if "extra ==" not in need]
    return found

core = closure(["torch", "numpy", "pydantic"])
tops = importlib.metadata.packages_distributions()
blocked = {top for top, owners in tops.items() if not core & {owner.lower().replace("_", "-") for owner in owners}}
blocked -= {"perceiver", "perceiver_train", "pipelines", "cluster", "tune"}

class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

assert {"ray", "yaml", "click", "safetensors", "pyarrow", "packaging"} <= blocked
sys.meta_path.insert(0, Blocked)
"""


def run_core(code: str) -> subprocess.CompletedProcess[str]:
    """Run code where nothing but the core's dependencies can be imported."""
    return subprocess.run([sys.executable, "-c", CORE + code], capture_output=True, text=True, timeout=120, check=False)


def test_a_model_needs_the_core_alone() -> None:
    done = run_core("import perceiver; print(type(perceiver.create_model('perceiver_digits')).__name__)")
    assert done.stdout == "Perceiver\n", done.stderr


@pytest.mark.parametrize(
    "code", ["import perceiver; perceiver.load_model('x')", "import perceiver_train; perceiver_train.main()"]
)
def test_what_needs_more_names_the_extra(code: str) -> None:
    done = run_core(code)
    last = done.stderr.splitlines()[-1]
    assert done.returncode and last.endswith("is not installed: pip install 'perceiver-train[train]'"), done.stderr


def test_the_extra_of_a_module() -> None:
    assert lacks("x", ModuleNotFoundError(name="onnx.helper")).endswith("'perceiver-train[onnx]'")
    assert lacks("x", ModuleNotFoundError(name="perceiver.nothing")) == ""
