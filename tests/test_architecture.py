"""The import contract, and what importing the model must not drag in."""

import subprocess
import sys
from pathlib import Path


def test_imports_run_one_way() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_model_needs_torch_alone() -> None:
    code = (
        "import sys, perceiver.factory\n"
        "heavy = {'ray', 'deepspeed', 'mlflow', 'pyarrow', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
