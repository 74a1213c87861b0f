"""Names from outside, through the real verbs: no control character, no line break, no secret, no formula, no HTML."""

import csv
import io
import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from cluster.doctor import checks
from cluster.run.console import RunConsole
from perceiver.cli import cli
from perceiver.config import UserError
from perceiver.report.run import run_report
from perceiver.storage import open_folder
from perceiver.tracking.printable import say
from pipelines.features import LabelFeature, TextFeature
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, Split, arrow_schema, save_manifest
from pipelines.shards.quarantine import Problem, write_problems
from tests.perceiver.report.pages import Page
from tests.perceiver.report.test_run import full
from tests.pipelines.raw import write

ESCAPES = (
    "\x1b[2J\x1b]0;title\x07 \u202etxt.exe\u2066 \x9b31m\r\nFAULT forged line [red]m[/red] [link=http://h]l[/link]"
)
SECRET = "s3://key:hunter2/x@bucket/place"
HARM = "<img src=x onerror=alert(1)>"


def controls(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in "\n\t"}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Return a prepared folder all of whose names are hostile."""
    features = {"text": TextFeature(), "label": LabelFeature()}
    rows = [{"key": f"k{ESCAPES}", "text": "", "label": 0}, {"key": "b", "text": "x", "label": 1}]
    rows.append({"key": "=1+1", "text": "x", "label": 7})
    folder = open_folder(str(tmp_path / "made"))
    with ShardWriter(folder, "train.arrow", arrow_schema(features), 2) as writer:
        writer.write(rows)
        info = writer.close()
    assert info is not None
    names = (f"one {ESCAPES}{HARM}", "=2+2")
    splits = {"train": Split(shards=(info,))}
    manifest = Manifest(
        name=f"data {HARM}", features=features, classes=names, splits=splits, rejected=1,
        licence=f"free {ESCAPES}", source=SECRET,
    )  # fmt: skip
    save_manifest(manifest, folder)
    write_problems(folder, [Problem("", -1, f"raw {ESCAPES}", f"why {ESCAPES}")])
    return tmp_path / "made"


@pytest.mark.parametrize("options", [[], ["--json"], ["--html"]])
def test_inspect_prints_no_control_characters(options: list[str], prepared: Path) -> None:
    page = prepared / "page.html"
    done = CliRunner().invoke(cli, ["inspect", str(prepared), *options, *([str(page)] if "--html" in options else [])])
    assert done.output and not controls(done.output) and "hunter2" not in done.output
    assert not any(line.lstrip().startswith("FAULT forged") for line in done.output.splitlines())
    if page.exists():
        text = page.read_text()
        assert not controls(text) and HARM not in text and "hunter2" not in text
        assert not Page(text).all("img") or all(image["src"] != "x" for image in Page(text).all("img"))


def test_prepare_prints_no_control_characters_and_keeps_no_login(tmp_path: Path) -> None:
    name = "src \x1b[2J\u202e\n"
    write(tmp_path / name, {f"a\x1b[31m\nb/{i}.txt": b"some text" for i in range(30)})
    done = CliRunner().invoke(cli, ["prepare", "text", str(tmp_path / name), str(tmp_path / "out\x1b[2J")])
    assert done.exit_code == 0 and not controls(done.output) and "FAULT" not in done.output
    place = "memory://me:hunter2@store/texts"
    fsspec.filesystem("memory").pipe_file(f"{place}/a.txt", b"a text")
    manifest = prepare("text", place, str(tmp_path / "out"), PrepareConfig(parallel="off"))
    assert manifest.source == "memory://***@store/texts"


def test_errors_of_the_command_are_one_line_without_secrets(capfd: pytest.CaptureFixture[str]) -> None:
    say(f"error: {UserError(f'data.url: got {SECRET!r}{ESCAPES}')}", err=True)
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and not controls(line) and "hunter2" not in line


@pytest.mark.parametrize("terminal", [True, False])
def test_the_console_of_a_run_prints_names_as_they_are(terminal: bool) -> None:
    sink = io.StringIO()
    console = Console(file=sink, force_terminal=terminal, highlight=False, soft_wrap=True, color_system=None)
    with RunConsole(console) as shown:
        shown.say(f"run {ESCAPES} {SECRET}")
        shown.show({"kind": "failure", "rank": 0, "failed": 0, "reason": ESCAPES})
    text = sink.getvalue()
    assert text.count("\n") == 2 and not controls(text) and "hunter2" not in text
    assert "[red]m[/red]" in text and "[link=http://h]l[/link]" in text


def test_the_report_of_a_run_shows_names_as_text() -> None:
    hostile = [f"{HARM}{ESCAPES}", "=1+cmd|' /C calc'!A0", "@SUM(A1)"]
    data = replace(full(50, 3), name=ESCAPES, class_names=hostile, facts={"from": SECRET, ESCAPES: HARM})
    files = run_report(data)
    page = files["index.html"].decode()
    assert not controls(page) and HARM not in page and "hunter2" not in page
    names = [row[0] for row in csv.reader(io.StringIO(files["per_class.csv"].decode()))][1:]
    assert len(names) == 3 and not [name for name in names if name.startswith(("=", "@"))]
    assert not controls("".join(names))


def test_the_doctor_prints_what_it_found_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", (lambda setup: (checks.OK, f"found {ESCAPES}", f"{SECRET} [bold]x"),))
    done = CliRunner().invoke(cli, ["doctor"])
    assert not controls(done.output) and "hunter2" not in done.output and "[bold]x" in done.output


def test_json_of_hostile_names_is_json(prepared: Path) -> None:
    done = CliRunner().invoke(cli, ["inspect", str(prepared), "--json"])
    assert json.loads(done.output)["name"].startswith("data ") and done.output.isascii()
