"""The command line: help with an example for each verb, one line and exit code 2 for a mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from perceiver.cli import cli

VERBS = sorted(path.stem for path in Path("perceiver/cli").glob("[a-z]*.py"))


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example(verb: str) -> None:
    result = CliRunner().invoke(cli, [verb, "--help"])
    assert result.exit_code == 0, result.output
    assert "Example" in result.output and f"perceiver {verb}" in result.output


def test_the_command_lists_its_verbs() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    assert all(verb in result.output for verb in VERBS) and "Example: perceiver train" in result.output


def perceiver(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("perceiver")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("trian", "x"), "'trian'; did you mean train?"),
        (("train", "recipes/train/quickstart.yaml", "optim.lrr=1"), "unknown key optim.lrr; did you mean optim.lr?"),
        (("train", "recipes/train/quickstart.yaml", "cluster.min_workers=3"), "cluster.min_workers = 3"),
        (("prepare", "digitz", "x"), "did you mean 'digits'?"),
        (("prepare", "digits", "a", "b", "c"), "wanted [SRC] DST"),
        (("train",), "argument 'RECIPE': see perceiver train --help"),
        (("train", "--job", "x"), "'--job'"),
        (("plan", "x", "--nodes=password=hunter2\x1b[0m"), "'password=***' is not"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], wanted: str) -> None:
    result = perceiver(*arguments)
    assert result.returncode == 2, result.stderr
    assert wanted in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
