"""Files and folders of a user's that have the names of our packages do not disturb any command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from perceiver.config import UserError
from perceiver.environment import check_names
from perceiver_train import PACKAGES, pin
from tests.homes import write_names
from tests.installed import write_metadata


def perceiver(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a folder."""
    command = [str(Path(sys.executable).with_name("perceiver")), *words]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=550, check=False)


@pytest.mark.parametrize("packages", [True, False])
def test_the_command_finds_its_packages(tmp_path: Path, packages: bool) -> None:
    place = str(write_names(tmp_path / "mine", packages))
    done = perceiver(Path(place), "train", "missing.yaml", PYTHONPATH=place)
    assert done.returncode == 2 and done.stderr.startswith("error: no recipe file missing.yaml"), done.stderr


def test_a_worker_is_pinned_before_its_path_is_extended(tmp_path: Path) -> None:
    """As Ray does it: the hook first, then the driver's folder at the front of the path."""
    code = "import sys, perceiver_train; perceiver_train.pin(); sys.path.insert(0, sys.argv[1]); sys.path_hooks"
    code += "; import cluster.run.worker, tune.search.trial, pipelines.feed.samples, perceiver.factory; print('ours')"
    place = str(write_names(tmp_path, packages=False))
    command = [sys.executable, "-P", "-c", code, place]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": place}, capture_output=True, text=True, check=False)
    assert done.stdout == "ours\n", done.stderr


def test_plug_ins_are_those_of_the_path_before_the_drivers_folders(tmp_path: Path) -> None:
    write_metadata(tmp_path, "evil", "1.0", "[perceiver.tasks]\nevil = evil:Config\n")
    (tmp_path / "evil.py").write_text("print('evil')")
    code = "import sys, perceiver_train; perceiver_train.pin(); sys.path.insert(0, sys.argv[1])"
    code += "; from perceiver import registry; print('evil' in registry.offered('task'))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_another_module_that_is_imported_already_is_named(tmp_path: Path) -> None:
    (tmp_path / "cluster.py").write_text("")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import cluster, perceiver_train; perceiver_train.main()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.fullmatch(rf"error: cluster is imported from {tmp_path}/cluster.py, wanted .*\n", done.stderr)
    assert done.returncode == 1


def test_pinning_twice_changes_nothing() -> None:
    before = {name: sys.modules.get(name) for name in PACKAGES}
    pin()
    assert all(sys.modules[name] is module for name, module in before.items() if module is not None)


def test_another_distribution_with_one_of_the_names_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "site-packages"
    (place / "perceiver").mkdir(parents=True)
    (place / "perceiver_io-1.0.dist-info").mkdir()
    (place / "perceiver_io-1.0.dist-info/RECORD").write_text("perceiver/__init__.py,,\n")
    (place / "perceiver_train-0.1.0.dist-info").mkdir()
    (place / "perceiver_train-0.1.0.dist-info/RECORD").write_text("perceiver/__init__.py,,\n")
    assert check_names() == ""
    monkeypatch.setattr(sys, "path", [*sys.path, str(place)])
    assert f"perceiver_io owns perceiver in {place}" in check_names()
    monkeypatch.setattr("perceiver_train.__file__", str(place / "perceiver_train/__init__.py"))
    with pytest.raises(UserError, match="perceiver_io and perceiver-train both own perceiver in"):
        check_names()
