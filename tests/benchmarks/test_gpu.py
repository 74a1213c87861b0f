"""The runner of GPU measurements (`benchmarks/gpu.py`): what its file has after jobs that end in every way."""

import argparse
import contextlib
import importlib.util
import json
import os
import runpy
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
MACHINE = {"gpu": None, "torch": "2.11.0", "cores": 2, "memory_gib": 4, "python": "3.12.3"}


def load() -> ModuleType:
    """Return `benchmarks/gpu.py` as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location("gpu_runner", FOLDER / "gpu.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_runner"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu = load()


@pytest.fixture(autouse=True)
def runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the description of the machine (it imports torch) and restore the signals' handlers."""
    monkeypatch.setattr(gpu, "machine", lambda: dict(MACHINE))
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for each, handler in handlers.items():
        signal.signal(each, handler)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "lines.jsonl"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that replaces the list of jobs by programs: name=code."""

    def replace(needs: str = "any", limit: float = 60, **programs: str) -> None:
        found = [gpu.Job(name, ("-IS", "-c", code), limit, "a test", needs, ()) for name, code in programs.items()]
        monkeypatch.setattr(gpu, "JOBS", found)

    return replace


def records(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, each of which must be JSON without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = out.read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def states(out: Path) -> list[tuple[str, str]]:
    return [(line["job"], line["done"]) for line in records(out) if "done" in line]


def ended(pid: int) -> bool:
    """Return whether a process has ended, or ends within ten seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 10)[0])
    finally:
        os.close(descriptor)


def test_each_job_that_ends_in_its_own_way_leaves_its_lines(out: Path, jobs: Callable[..., None]) -> None:
    jobs(
        good='print(\'{"ms": 1.5, "job": "x", "header": 1}\'); print("a word")',
        bad='print(\'{"ms": 2}\'); print("on the way"); import sys; sys.exit("the reason")',
        garbage='import os; os.write(1, b\'[1]\\n\\xff\\x00{\\n{"a": NaN, "b": 1e999}\\n\\n{"half": \')',
        last="print('{\"no\": \"newline\"}', end='')",
    )
    assert gpu.main(["--out", str(out)]) == 1
    header, *lines = records(out)
    assert header["header"]["torch"] == "2.11.0" and header["header"]["date"] and header["header"]["tiny"] is False
    assert states(out) == [("good", "ok"), ("bad", "failed"), ("garbage", "ok"), ("last", "ok")]
    assert lines[0] == {"job": "good", "ms": 1.5, "job_": "x", "header_": 1}
    assert lines[2] == {"job": "bad", "ms": 2}
    assert lines[3]["rc"] == 1 and "the reason" in lines[3]["error"] and lines[3]["seconds"] >= 0
    assert lines[4] == {"job": "garbage", "a": "NaN", "b": "1e999"}
    assert lines[6] == {"job": "last", "no": "newline"}
    assert (out.parent / "lines.good.log").read_text() == "a word\n"
    assert "the reason" in (out.parent / "lines.bad.log").read_text()


HANGS = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
child = os.fork()
if child == 0:
    os.write(1, b'{"child": %d}\\n' % os.getpid())
    open(UP, "w").close()
while True:
    signal.pause()
"""


def test_a_job_at_its_limit_is_killed_with_its_children(
    out: Path, jobs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    up = out.parent / "up"
    jobs(hangs=HANGS.replace("UP", repr(str(up))), after="print('{\"here\": 1}')")
    monkeypatch.setattr(gpu, "clock", lambda: 100.0 * up.exists())  # the limit passes when the child runs
    monkeypatch.setattr(gpu, "GRACE_S", 0.1)
    assert gpu.main(["--out", str(out)]) == 1
    assert states(out) == [("hangs", "timeout"), ("after", "ok")]
    _, line, closing, *_ = records(out)
    assert closing["rc"] == -signal.SIGKILL
    assert ended(line["child"])


LEAVES = """
import os, signal
ready, write = os.pipe()
child = os.fork()
if child:
    os.read(ready, 1)
    print('{"child": %d}' % child)
else:
    os.setpgid(0, 0)  # as Ray's workers do
    os.write(write, b"x")
    signal.pause()
"""


def test_a_child_that_a_job_leaves_is_ended(out: Path, jobs: Callable[..., None]) -> None:
    jobs(leaves=LEAVES)
    assert gpu.main(["--out", str(out)]) == 0
    assert ended(records(out)[1]["child"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_job_and_leaves_a_file_to_go_on_with(
    number: signal.Signals, out: Path, jobs: Callable[..., None]
) -> None:
    hangs = "import os, signal; print('{\"pid\": %d}' % os.getpid(), flush=True)"
    jobs(hangs=f"{hangs}; os.kill(os.getppid(), {int(number)}); signal.pause()", after="")
    assert gpu.main(["--out", str(out)]) == 128 + number
    assert states(out) == [("hangs", "failed")]
    assert ended(records(out)[1]["pid"])
    jobs(hangs="", after="")
    assert gpu.main(["--out", str(out)]) == 0
    assert states(out)[1:] == [("after", "ok"), ("hangs", "ok")]  # what never ran first


def test_a_second_call_runs_what_is_missing_after_a_cut_line(out: Path, jobs: Callable[..., None]) -> None:
    jobs(first="print('{\"ms\": 1}')", second="import sys; sys.exit(1)", third="print('{\"ms\": 3}')")
    assert gpu.main(["--out", str(out), "--job", "first", "--job", "second"]) == 1
    with out.open("a") as stream:
        stream.write('{"job": "third", "done": "ok", "rc": 0')
    assert gpu.main(["--out", str(out)]) == 1
    assert states(out) == [("first", "ok"), ("second", "failed"), ("third", "ok"), ("second", "failed")]
    jobs(first="never", second="print('{\"ms\": 2}')", third="never")
    assert gpu.main(["--out", str(out)]) == 0
    before = out.read_bytes()
    assert gpu.main(["--out", str(out)]) == 0 and out.read_bytes() == before


def test_a_cut_header_is_replaced_and_another_file_is_refused(out: Path, jobs: Callable[..., None]) -> None:
    jobs(first="")
    out.write_text('{"hea')
    assert gpu.main(["--out", str(out)]) == 0 and len(records(out)) == 2
    with pytest.raises(SystemExit, match="--tiny"):
        gpu.main(["--out", str(out), "--tiny"])
    out.write_text("# notes\nwithout end")
    with pytest.raises(SystemExit, match="other content"):
        gpu.main(["--out", str(out)])
    assert out.read_text() == "# notes\nwithout end"


def test_the_total_cuts_a_limit_and_starts_no_job_at_the_end(
    out: Path, jobs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    up = out.parent / "up"
    jobs(limit=1000, hangs=HANGS.replace("UP", repr(str(up))), after="")
    monkeypatch.setattr(gpu, "GRACE_S", 0.1)
    monkeypatch.setattr(gpu, "clock", lambda: 100.0 * up.exists())
    assert gpu.main(["--out", str(out), "--total", "90"]) == 1
    assert states(out) == [("hangs", "timeout"), ("after", "no time")]
    assert gpu.main(["--out", str(out), "--job", "after"]) == 0
    assert states(out)[2:] == [("after", "ok")]


def test_a_job_that_needs_a_gpu_fails_without_one_unless_it_is_tiny(out: Path, jobs: Callable[..., None]) -> None:
    jobs(needs="cuda", first="")
    assert gpu.main(["--out", str(out)]) == 1
    assert records(out)[1]["error"] == "needs a GPU"
    assert gpu.main(["--out", str(out.with_name("tiny.jsonl")), "--tiny"]) == 0


def test_the_lines_have_no_paths_outside_the_repository(out: Path, jobs: Callable[..., None]) -> None:
    text = f"{gpu.ROOT}/benchmarks/step.py, /home/some/x.bin, -I/opt/cuda/include, file:///srv/a/b.py, 3 samples/s/GPU"
    jobs(shown=f"import json, sys; print(json.dumps({{'note': [{text!r}]}})); sys.exit({text!r})")
    gpu.main(["--out", str(out)])
    _, line, closing = records(out)
    wanted = "benchmarks/step.py, …/x.bin, -I…/include, file://…/b.py, 3 samples/s/GPU"
    assert line["note"] == [wanted] and closing["error"] == wanted
    jobs(shown="import os, sys; sys.exit(os.uname().nodename + ':1 NCCL WARN')")
    gpu.main(["--out", str(out)])
    assert records(out)[-1]["error"] == "HOST:1 NCCL WARN"


def test_render_shows_tables_and_what_is_missing(
    out: Path, jobs: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"batch": 65536, "ms": 12.3456, "table": "one"},
        {"batch": 8, "note": "a | b", "table": "one", "ok": True},
        {"ms": 0.000012345, "table": "two"},
        {"ms": 12345.6, "list": [1, 2], "table": "two"},
    ]
    jobs(
        shown=f"import json\nfor line in {lines}:\n    print(json.dumps(line))",
        cut="print('{\"x\": 1}'); raise ValueError('why')",
        never="",
    )
    gpu.main(["--out", str(out), "--job", "shown", "--job", "cut"])
    capsys.readouterr()
    assert gpu.main(["--render", str(out)]) == 0
    text = capsys.readouterr().out
    assert "2 CPU cores" in text and "torch 2.11.0" in text and "Python 3.12.3" in text
    one = "one:\n\n| batch | ms | note | ok |\n|---|---|---|---|\n| 65,536 | 12.3 |  |  |\n| 8 |  | a \\| b | yes |\n"
    assert one in text
    assert "two:\n\n| ms | list |\n|---|---|\n| 1.23e-05 |  |\n| 12,300 | [1, 2] |\n" in text
    assert text.index("## shown") < text.index("## cut") < text.index("Incomplete") < text.index("## Failed or missing")
    assert "- `cut`: failed, exit code 1: ValueError: why\n- `never`: not started\n" in text


def test_a_later_attempt_replaces_an_incomplete_one(out: Path, jobs: Callable[..., None]) -> None:
    jobs(first='print(\'{"ms": 1}\\n{"ms": 2}\'); raise SystemExit(1)')
    gpu.main(["--out", str(out)])
    jobs(first="print('{\"ms\": 3}')")
    gpu.main(["--out", str(out)])
    text = gpu.render(out)
    assert "| 3 |" in text and "| 1 |" not in text and "Failed" not in text


def test_the_machine_is_described() -> None:
    found = gpu.describe()
    assert {"gpu", "torch", "cuda", "triton", "python", "cores", "memory_gib"} <= set(found)
    assert found["cores"] >= 1 and found["memory_gib"] >= 1
    assert os.uname().nodename not in json.dumps(found)


def test_the_list_of_jobs_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [job.name for job in gpu.JOBS]


class Parsed(Exception):
    """Raised where a script has read its arguments."""


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("job", [job for job in gpu.JOBS if (FOLDER / job.argv[0]).exists()], ids=lambda job: job.name)
def test_a_job_accepts_its_arguments(job: Any, tiny: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *given: Any, **options: Any) -> None:
        parse(self, *given, **options)
        raise Parsed

    before = set(sys.modules)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", job.command(tiny))
    monkeypatch.syspath_prepend(FOLDER)
    with pytest.raises(Parsed):
        runpy.run_path(str(FOLDER / job.argv[0]), run_name="__main__")
    for name in set(sys.modules) - before:  # modules of this folder have names that others could have
        with contextlib.suppress(AttributeError, TypeError):
            if Path(sys.modules[name].__file__ or "").parent == FOLDER:
                del sys.modules[name]


def test_names_of_jobs_are_unique() -> None:
    names = [job.name for job in gpu.JOBS]
    assert len(set(names)) == len(names)
