"""The import contract, and what an import of the model must not import."""

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


def test_what_talks_to_a_cluster_does_not_import_ray_first() -> None:
    """Ray reads whether to send a token when it is imported; the job verbs ask the cluster before that."""
    code = "import sys, cluster.jobs.submit, cluster.jobs.commands, perceiver.cli; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_data_tasks_do_without_torch() -> None:
    """Importing torch would cost each of their processes two seconds and 200 MB."""
    modules = "pipelines.feed.samples, cluster.runtime.ray_internals"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; sys.exit('torch' in sys.modules)"], check=True)
