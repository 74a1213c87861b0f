"""The version and the commit of a run's code."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from perceiver.tracking import code


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a working tree with one commit, as the current folder; the package is not in one."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "remote", "add", "origin", "https://me:hunter2@example.org/x.git")
    (tmp_path / "recipe.yaml").write_text("a: 1\n")
    git(tmp_path, "add", "recipe.yaml")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(code, "__file__", str(tmp_path.parent / "site" / "code.py"))
    code.code_facts.cache_clear()
    yield tmp_path
    code.code_facts.cache_clear()


def test_the_commit_of_the_current_folder_with_a_mark_of_changes(tree: Path) -> None:
    (tree / "untracked.txt").write_text("x")
    facts = code.code_facts()
    assert facts["commit"] == git(tree, "rev-parse", "HEAD") and facts["dirty"] is False and facts["version"]
    (tree / "recipe.yaml").write_text("a: 2\n")
    code.code_facts.cache_clear()
    tags = code.code_tags()
    assert tags["mlflow.source.git.commit"] == facts["commit"] and tags["perceiver.git.dirty"] == "true"
    assert tags["perceiver.version"] == facts["version"] and "hunter2" not in str(tags)


def test_a_monitor_that_the_tree_names_is_not_started(tree: Path) -> None:
    hook = tree / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tree / 'ran'}\n")
    hook.chmod(0o755)
    git(tree, "config", "core.fsmonitor", str(hook))
    assert code.code_facts()["dirty"] is False and not (tree / "ran").exists()


def test_without_git_or_a_tree_only_the_version_is_known(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tree))
    assert set(code.code_facts()) == {"version"}
