"""Options: every number has limits, and files to write and names of runs are checked before a command starts."""

import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from perceiver.cli import Verbs, cli
from perceiver.cli._types import LocalPath, Number, RunName
from perceiver.cli.submit import command as submit

NO_NUMBERS = ("nan", "inf", "-inf", "-1", "-1e30", "1e30", str(10**30), "9" * 5000, "", "true")
NUMERIC = (click.types.IntParamType, click.types.FloatParamType)


def options(command: click.Command, name: str) -> Iterator[tuple[str, click.Parameter]]:
    """Yield the parameters of a command and its subcommands."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for verb in command.list_commands(context):
            found = command.get_command(context, verb)
            assert found is not None
            yield from options(found, f"{name} {verb}")
        return
    for param in command.params:
        yield f"{name} {param.opts[0]}", param


OPTIONS = dict(options(cli, "perceiver"))
NUMBERS = {name: param for name, param in OPTIONS.items() if isinstance(param.type, NUMERIC)}


def test_all_numeric_options_are_found() -> None:
    assert {"perceiver plan --gpus", "perceiver predict --batch", "perceiver cluster up --nodes"} <= set(NUMBERS)
    assert len(NUMBERS) >= 16


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_numeric_option_refuses_what_cannot_be(name: str, value: str) -> None:
    with pytest.raises(click.BadParameter):
        NUMBERS[name].type.convert(value, None, None)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_numeric_option_has_both_limits(name: str) -> None:
    kind = NUMBERS[name].type
    assert isinstance(kind, Number | click.IntRange) and kind.min is not None and kind.max is not None
    assert kind.convert(str(kind.max), None, None) == kind.max


def test_every_name_of_a_run_is_checked() -> None:
    found = {name for name, param in OPTIONS.items() if name.endswith("--run") and isinstance(param.type, RunName)}
    assert found == {f"perceiver {verb} --run" for verb in ("train", "tune", "submit", "reproduce")}


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "/x", "a\n", "s3://x", "x" * 300])
def test_a_name_of_a_run_that_is_no_plain_name_is_refused(name: str) -> None:
    with pytest.raises(click.BadParameter):
        RunName().convert(name, None, None)


@pytest.mark.parametrize("text", ["", "reference://x", "s3://b/x", "file:///x", "a\0b", "/dev/full", "fifo", "folder"])
def test_a_page_is_written_to_regular_files_only(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("folder").mkdir()
    done = CliRunner().invoke(cli, ["inspect", "nowhere", "--html", text])
    assert done.exit_code == 2 and "--html" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "folder"], "nothing was written"


def test_a_folder_to_write_is_no_file_and_no_url(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for text in (str(tmp_path / "file"), "s3://b/x", "", "/dev/null"):
        with pytest.raises(click.BadParameter):
            LocalPath(folder=True).convert(text, None, None)
    assert LocalPath(folder=True).convert(str(tmp_path / "new"), None, None) == tmp_path / "new"


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}', '{"a": true}', '{"a": -1}', "[1]", '{"a": 1e400}'])
def test_resources_of_a_job_are_amounts(text: str) -> None:
    done = CliRunner().invoke(submit, ["recipes/train/quickstart.yaml", "--entrypoint-resources", text])
    assert "--entrypoint-resources" in str(done.exception)


def test_a_tilde_is_expanded_where_shells_leave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen: list[list[str]] = []
    group = Verbs("perceiver", result_callback=None)
    monkeypatch.setattr(click.Group, "parse_args", lambda self, ctx, args: seen.append(args) or [])
    group.parse_args(click.Context(group), ["train", "~/a.yaml", "output=~/x", "--to=~/y", "a=b=~", "x~", "s3://~/z"])
    assert seen == [
        ["train", f"{tmp_path}/a.yaml", f"output={tmp_path}/x", f"--to={tmp_path}/y", "a=b=~", "x~", "s3://~/z"]
    ]
