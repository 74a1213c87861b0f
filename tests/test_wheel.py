"""The wheel in a bare environment, in an empty folder, outside the checkout.

The environment is a venv with the wheel alone, and a `.pth` file that adds the packages of the environment that runs
the tests. Python does not read the `.pth` files of a folder that is added that way, so that the editable installation
of the checkout there does not count.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.prepare import prepare
from tests.homes import write_names

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the files that git knows or does not ignore, without a network."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        source, target = ROOT / name, folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() or source.exists():
            shutil.copy2(source, target, follow_symlinks=False)
    return wheel_of(folder / "source")


def wheel_of(source: Path) -> Path:
    """Build the wheel of a project's folder, and delete that."""
    target = source.with_name(f"{source.name}-wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", target, source], check=True)
    shutil.rmtree(source)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of programs of the environment."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    shutil.copytree(ROOT / "tests/example_plugin", folder / "plugin")
    subprocess.run([*pip, build_wheel(folder), wheel_of(folder / "plugin")], check=True)
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run(programs: Path, folder: Path, *words: str, path: str = "") -> str:
    """Run a program of the environment in a folder, with a PYTHONPATH; return its output."""
    env = {**os.environ, "PYTHONPATH": path}
    command = [str(programs / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_contains_recipes_templates_and_types(programs: Path, tmp_path: Path) -> None:
    code = "import perceiver, cluster, pathlib; print(pathlib.Path(perceiver.__file__).parents[1])"
    site = Path(run(programs, tmp_path, "python", "-c", code).strip())
    assert not site.is_relative_to(ROOT) and site.is_relative_to(programs.parent)
    for name in ("train/quickstart.yaml", "papers/imagenet.yaml", "cluster/gpu.yaml", "tune/quickstart.yaml"):
        assert (site / "perceiver/recipes" / name).read_bytes() == (ROOT / "recipes" / name).read_bytes()
    assert (site / "perceiver/py.typed").is_file()
    assert list((site / "cluster/deploy/templates").glob("*.j2"))
    assert {path.name for path in site.iterdir() if path.is_dir() and "." not in path.name} - {"__pycache__"} == {
        "perceiver",
        "perceiver_example",
        "perceiver_train",
        "pipelines",
        "cluster",
        "tune",
    }


def test_from_an_empty_folder_to_predictions(programs: Path, tmp_path: Path) -> None:
    """With a task and a hook of another package, and among files that have the names of our packages.

    `perceiver init --quickstart` finds prepared data there, since tests do not download.
    """
    assert "permuted-imagenet" in run(programs, tmp_path, "perceiver", "reproduce", "--list")
    run(programs, tmp_path, "perceiver", "cluster", "render", "slurm", "recipes/train/quickstart.yaml", "-o", "deploy")
    assert list((tmp_path / "deploy").iterdir())
    write_digits(tmp_path)
    assert "perceiver train quickstart.yaml" in run(programs, tmp_path, "perceiver", "init", "--quickstart")
    assert json.loads((tmp_path / "quickstart.schema.json").read_text())["properties"]["base"]
    write_names(tmp_path, packages=True)
    path = str(write_names(tmp_path / "path", packages=False))
    log = tmp_path / "steps.txt"
    hooks = json.dumps([{"kind": "step_log", "file": str(log), "every": 1}])
    words = ["train.epochs=1", "train.global_batch=16", "model.latents=4", "task={kind: brier}", f"hooks={hooks}"]
    words += ["cluster.workers=1", "tracking.enabled=false"]
    run(programs, tmp_path, "perceiver", "train", "quickstart.yaml", *words, path=path)
    assert json.loads((tmp_path / "runs/quickstart-001/run.json").read_text())["status"] == "finished"
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["1", "2"]
    words = ["runs/quickstart-001", "data/digits", "--to", "predictions", "--workers", "1"]
    assert "32 samples written" in run(programs, tmp_path, "perceiver", "predict", *words, path=path)


def write_digits(folder: Path) -> None:
    """Prepare a few images of the size of the quickstart's."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("0", "1"):
            place = folder / "raw" / split / label
            place.mkdir(parents=True)
            for index in range(16):
                Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(place / f"{index}.png")
    prepare("image_folder", str(folder / "raw"), str(folder / "data/digits"))
