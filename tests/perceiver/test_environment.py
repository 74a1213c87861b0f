"""Unsupported versions are one line before a command begins; the oldest set is the lower bounds of pyproject.toml."""

import importlib.metadata
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from perceiver.cli import cli
from perceiver.config import UserError
from perceiver.environment import ENGINES, check_versions

ROOT = Path(__file__).parents[2]


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: versions[name] if name in versions else installed(name)
    )


def test_what_is_installed_is_supported() -> None:
    check_versions()


@pytest.mark.parametrize(
    ("name", "version"), [(name, "0.1") for name in ENGINES] + [(name, "99.0") for name in ENGINES]
)
def test_an_unsupported_library_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    install(monkeypatch, **{name: version})
    with pytest.raises(UserError) as error:
        check_versions()
    text = str(error.value)
    assert "\n" not in text and f"{name} {version}, wanted >=" in text and f"pip install '{name}" in text


def test_a_version_of_a_build_or_before_a_release_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch="2.9.0a0+git1234", ray="2.59.0.dev0")
    check_versions()


def test_a_missing_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["ray[data]<3,>=2.54"])

    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    with pytest.raises(
        UserError, match=re.escape("ray is missing, wanted >=2.54,<3: pip install 'ray[data]>=2.54,<3'")
    ):
        check_versions()


def test_a_core_installation_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ray="", mlflow="")
    with pytest.raises(UserError, match=r"ray is missing.*: pip install 'perceiver-train\[train\]'$"):
        check_versions()


def test_an_unsupported_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.9")
    with pytest.raises(UserError, match=r"Python 3\.10\.9, wanted >=3\.11"):
        check_versions()


def test_nothing_is_asked_where_our_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", nothing)
    check_versions()


def test_verbs_refuse_help_and_the_doctor_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ray="2.9.9")
    for verb in ("train", "prepare", "status"):
        assert isinstance(CliRunner().invoke(cli, [verb, "x"]).exception, UserError)
        assert CliRunner().invoke(cli, [verb, "--help"]).exit_code == 0
    assert "no-such" in str(CliRunner().invoke(cli, ["doctor", "no-such.yaml"]).exception)


def test_the_check_imports_no_library() -> None:
    code = "import sys; from perceiver.environment import check_versions; check_versions(); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(ENGINES) & set(result.stdout.split())


def test_the_oldest_set_is_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    needs = [
        *project["dependencies"],
        *optional["train"],
        *optional["s3"],
        *optional["models"],
        *optional["onnx"],
        *optional["wandb"],
        *optional["notebook"],
    ]
    bounds = sorted(
        f"{need.name}=={one.version}"
        for need in map(Requirement, needs)
        for one in need.specifier
        if one.operator == ">="
    )
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    assert sorted(line for line in lines if "==" in line) == bounds
