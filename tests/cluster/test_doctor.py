"""Each check of the doctor finds what it is there for."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import doctor
from cluster.doctor import FAIL, OK, WARN, Patient, examine
from perceiver.config import UserError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_sound_machine_fails_nothing(home: Path) -> None:
    findings = {finding.check: finding for finding in examine(Patient(output=str(home / "runs")))}
    assert findings["python"].state == findings["libraries"].state == findings["output"].state == OK
    assert not (home / "runs").exists()
    assert len(findings) == len(doctor.CHECKS)


def test_a_place_that_cannot_be_written_fails(home: Path) -> None:
    (home / "file").write_text("")
    state, found, fix = doctor.check_output(Patient(output=str(home / "file" / "runs")))
    assert state == FAIL and "file" in found and "output=" in fix


def test_a_token_that_others_can_read_fails(home: Path) -> None:
    assert doctor.check_token(Patient())[0] == OK
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret-token")
    path.chmod(0o644)
    state, found, fix = doctor.check_token(Patient())
    assert state == FAIL and "0644" in found and fix == f"chmod 600 {path}" and "secret-token" not in found
    path.chmod(0o600)
    assert doctor.check_token(Patient())[0] == OK


def test_a_server_that_is_down_is_named_without_its_password() -> None:
    for uri in ("http://user:hunter2@127.0.0.1:9", "postgresql://user:hunter2@127.0.0.1:9/db"):
        state, found, _ = doctor.check_tracking(Patient(tracking=uri))
        assert state == WARN and "127.0.0.1:9" in found and "hunter2" not in found


def test_a_containers_limits_count(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000")
    (tmp_path / "memory.max").write_text(str(2**30))
    (tmp_path / "memory.current").write_text("0")
    patient = Patient(proc=tmp_path, shm=tmp_path / "none")
    assert doctor.check_cpus(patient)[:2] == (WARN, f"{doctor.machine_cpus()} seen, but the container may use 0.5")
    assert doctor.check_memory(patient)[:2] == (FAIL, "1.0 GiB free")
    assert doctor.check_shared_memory(patient)[0] == WARN


def test_a_missing_library_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["no-such-library>=1", "numpy>=99", "x; extra == 'y'"]
    )
    state, found, _ = doctor.check_libraries(Patient())
    assert state == FAIL and "no-such-library is missing" in found and "is not >=99" in found


def test_a_gpu_that_the_recipe_wants_and_a_cluster_that_does_not_answer() -> None:
    import torch

    if not torch.cuda.is_available():
        assert doctor.check_gpu(Patient(gpus_per_worker=1))[0] == FAIL

    def refuse() -> str:
        raise UserError("nothing answers at http://x (refused): check --address")

    assert doctor.check_cluster(Patient(nodes=refuse)) == (
        FAIL,
        "nothing answers at http://x (refused)",
        "check --address",
    )


def test_the_command_exits_by_what_it_finds(home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("x")
    token.chmod(0o604)
    words = [sys.executable, "-m", "perceiver.cli", "doctor", "--json"]
    done = subprocess.run(
        words, cwd=home, env={**os.environ, "HOME": str(home)}, capture_output=True, text=True, check=False
    )
    rows = {row["check"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1 and rows["token"]["state"] == "fail", done.stderr
