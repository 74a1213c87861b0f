"""Each check of `perceiver doctor` detects its problem."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.doctor import checks as doctor
from cluster.doctor.checks import FAIL, OK, WARN, Setup, examine, setup_of
from cluster.recipe import preflight
from cluster.recipe.config import build_recipe
from cluster.recipe.resources import ClusterConfig
from perceiver.config import UserError
from perceiver.tracking.runs import TrackingConfig


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_working_machine_has_no_failure_of_python_libraries_or_output(home: Path) -> None:
    findings = {finding.check: finding for finding in examine(Setup(output=str(home / "runs")))}
    assert findings["python"].state == findings["libraries"].state == findings["output"].state == OK
    assert not (home / "runs").exists()
    assert len(findings) == len(doctor.CHECKS)


def test_an_output_folder_that_cannot_be_written_fails(home: Path) -> None:
    (home / "file").write_text("")
    state, found, fix = doctor.check_output(Setup(output=str(home / "file" / "runs")))
    assert state == FAIL and "file" in found and "output=" in fix


def test_a_token_that_others_can_read_fails(home: Path) -> None:
    assert doctor.check_token(Setup())[0] == OK
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret-token")
    path.chmod(0o644)
    state, found, fix = doctor.check_token(Setup())
    assert state == FAIL and "0644" in found and fix == f"chmod 600 {path}" and "secret-token" not in found
    path.chmod(0o600)
    assert doctor.check_token(Setup())[0] == OK


def test_an_empty_token_fails(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.touch(0o600)
    assert doctor.check_token(Setup())[:2] == (FAIL, f"{path} is empty")
    monkeypatch.setenv("RAY_AUTH_TOKEN", " ")
    assert doctor.check_token(Setup())[:2] == (FAIL, "RAY_AUTH_TOKEN is empty")


def test_a_long_temporary_folder_is_a_warning_a_long_ray_tmpdir_a_failure(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = home / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    assert doctor.check_temporary_folder(Setup())[0] == WARN
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    assert doctor.check_temporary_folder(Setup())[0] == FAIL
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert doctor.check_temporary_folder(Setup())[:2] == (OK, "/tmp")


def test_folders_that_cannot_be_written_and_few_open_files_are_warnings(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.check_caches(Setup())[0] == doctor.check_open_files(Setup())[0] == OK
    (home / "file").touch()
    monkeypatch.setenv("PERCEIVER_CACHE", str(home / "file" / "cache"))
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 256))
    assert doctor.check_caches(Setup())[::2] == (WARN, "set PERCEIVER_CACHE to a place that can be written")
    assert doctor.check_open_files(Setup())[0] == WARN


@pytest.mark.parametrize(("required", "expected"), [(False, WARN), (True, FAIL)])
def test_an_mlflow_server_that_is_down_fails_only_if_it_is_required(required: bool, expected: str) -> None:
    """Nothing listens on port 9; the password is not shown."""
    for uri in ("http://user:hunter2@127.0.0.1:9", "postgresql://user:hunter2@127.0.0.1:9/db"):
        state, found, fix = doctor.check_tracking(Setup(tracking=TrackingConfig(uri=uri, required=required)))
        assert state == expected and "127.0.0.1:9" in found and "hunter2" not in found
        assert ("tracking.required=false" in fix) == required
    assert doctor.check_tracking(Setup(tracking=TrackingConfig(enabled=False, uri=uri, required=True)))[0] == OK


@pytest.mark.parametrize("uri", ["env:NO_SUCH_VARIABLE", "ftp://there"])
def test_a_tracking_uri_that_cannot_be_used_fails(uri: str) -> None:
    state, found, fix = doctor.check_tracking(Setup(tracking=TrackingConfig(uri=uri)))
    assert state == FAIL and uri in found + fix
    assert doctor.check_tracking(Setup(tracking=TrackingConfig(uri=uri), nodes=lambda: ""))[0] == WARN


@pytest.mark.parametrize(
    ("section", "fix"),
    [
        ({"workers": 64}, "set cluster.workers to at most 2"),
        ({"workers": 4, "gpus_per_worker": 1}, "cluster.workers to at most 1"),
        ({"workers": 1, "worker_resources": {"slot": 1}}, "cluster.worker_resources.slot"),
        ({"workers": 1, "worker_labels": {"role": "train"}}, "role=train"),
    ],
)
def test_workers_that_do_not_fit_on_this_machine_fail(
    tree: dict[str, Any], section: dict[str, Any], fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "machine_cpus", lambda: 8 if "gpus_per_worker" in section else 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    tree["data"]["executor"] = "inline"
    assert doctor.check_workers(setup_of(build_recipe(tree)))[0] == OK
    recipe = build_recipe({**tree, "cluster": section})
    state, found, told = doctor.check_workers(setup_of(recipe))
    assert state == FAIL and fix in f"{found}: {told}"
    assert doctor.check_workers(setup_of(recipe, nodes=lambda: ""))[0] == OK, "the cluster's nodes count then"


def test_data_that_is_missing_or_does_not_fit_fails(tree: dict[str, Any], tmp_path: Path) -> None:
    state, found, _ = doctor.check_recipe_and_data(setup_of(build_recipe(tree)))
    assert state == OK and "80 train" in found
    more = build_recipe({**tree, "cluster": {"workers": 2, "min_workers": 3}})
    assert doctor.check_recipe_and_data(setup_of(more))[2].startswith("set it to at most that")
    away = build_recipe({**tree, "data": {"url": str(tmp_path / "away")}})
    state, found, fix = doctor.check_recipe_and_data(setup_of(away))
    assert state == FAIL and "away does not exist" in found and "perceiver prepare" in fix


def test_an_object_store_larger_than_shared_memory_is_a_warning(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(Setup(shm=tmp_path, cluster=ClusterConfig(object_store_mb=80)))[0] == OK
    state, found, fix = doctor.check_shared_memory(Setup(shm=tmp_path, cluster=ClusterConfig(object_store_mb=10**8)))
    assert state == WARN and "cluster.object_store_mb = 100000000" in found and "--shm-size=100000100m" in fix


@pytest.mark.parametrize(("free", "store"), [(10_000, 800), (500, 450), (64, 800), (0, 800)])
def test_the_default_object_store_fits_into_shared_memory(
    free: int, store: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.recipe.resources.shared_memory_mb", lambda: free)
    assert ClusterConfig(workers=2).store_mb == store
    assert ClusterConfig(workers=2, object_store_mb=300).store_mb == 300


@pytest.mark.parametrize(("code", "expected"), [("pass", OK), ("raise RuntimeError('no ring')", FAIL)])
def test_nccl_is_checked_in_a_separate_process(code: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit status of the process decides; no GPU is needed here."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 27, 3))
    monkeypatch.setattr(doctor, "NCCL", code)
    state, found, _ = doctor.check_nccl(Setup())
    assert state == expected and found.startswith("NCCL 2.27.3") and ("no ring" in found) == (expected == FAIL)


def test_the_limits_of_a_container_are_checked(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000")
    (tmp_path / "memory.max").write_text(str(2**30))
    (tmp_path / "memory.current").write_text("0")
    setup = Setup(proc=tmp_path, shm=tmp_path / "none")
    state, found, _ = doctor.check_cpus(setup)
    assert state == WARN and found.startswith("0.5, the container's quota; ")
    assert doctor.check_memory(setup)[:2] == (FAIL, "1.0 GiB free")
    assert doctor.check_shared_memory(setup)[0] == WARN


def test_a_missing_library_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["no-such-library>=1", "numpy>=99", "x; extra == 'y'"]
    )
    state, found, _ = doctor.check_libraries(Setup())
    assert state == FAIL and "no-such-library is missing" in found and "wanted >=99" in found


def test_a_missing_gpu_and_a_cluster_that_does_not_answer_fail() -> None:
    import torch

    if not torch.cuda.is_available():
        assert doctor.check_gpu(Setup(cluster=ClusterConfig(gpus_per_worker=1)))[0] == FAIL

    def refuse() -> str:
        raise UserError("nothing answers at http://x (refused): check --address")

    assert doctor.check_cluster(Setup(nodes=refuse)) == (
        FAIL,
        "nothing answers at http://x (refused)",
        "check --address",
    )


def test_the_command_exits_with_1_after_a_failure(home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("x")
    token.chmod(0o604)
    words = [sys.executable, "-m", "perceiver", "doctor", "--json"]
    done = subprocess.run(
        words, cwd=home, env={**os.environ, "HOME": str(home)}, capture_output=True, text=True, check=False
    )
    rows = {row["check"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1 and rows["token"]["state"] == "fail", done.stderr
