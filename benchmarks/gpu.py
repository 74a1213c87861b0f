"""Measurements on a GPU as independent jobs, in order of value, for a GPU that can be had only for minutes.

    python benchmarks/gpu.py --list                               # the jobs
    python benchmarks/gpu.py --out lines.jsonl --total 480        # all that the file has no result of, in 480 s
    python benchmarks/gpu.py --out lines.jsonl --job machine      # one of them
    python benchmarks/gpu.py --render lines.jsonl > record.md     # tables of what was measured, a list of what was not
    python benchmarks/gpu.py --out tiny.jsonl --tiny              # every job at a tiny size, also without a GPU

A job is a script that prints JSON objects, one per line. Each is appended at once to the file, with the job's name:
whatever ends a job, or this program, what was measured until then is kept. All other output goes to a log per job
next to the file. A job's last line has `done` (ok, failed, timeout or no time), exit code and seconds. A second call
with the same file runs the jobs that are not ok, first those that never started. A header precedes the lines of each
call: the GPU, the machine and the versions. The exit code is 0 if all jobs asked for are ok, otherwise 1, and 128 + the
signal after a signal.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic as clock
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 3.0  # between SIGTERM and SIGKILL
POLL_S = 0.1
DESCRIBE_S = 90.0
ERROR_LINES, ERROR_WIDTH = 8, 300
RESERVED = {"header", "job", "done"}
PLACE = re.compile(r"(?:(?<![\w/.~-])|(?<=-[IL])|(?<=file://))(?:/[^\s/'\"`<>|,;:()\[\]{}]+){2,}")


@dataclass(frozen=True)
class Job:
    """A script in this folder (or other arguments of Python, such as `-m module`) that prints JSON lines."""

    name: str
    argv: tuple[str, ...]
    limit: float
    """Seconds after which the job and the processes that it started are terminated."""
    measures: str
    needs: str = "cuda"
    """`cuda`, or `any`; with `--tiny` every job runs anywhere."""
    tiny: tuple[str, ...] = ("--tiny",)
    """Arguments that `--tiny` appends."""

    def command(self, tiny: bool) -> list[str]:
        """Return the arguments of Python."""
        first, *rest = self.argv
        script = f"benchmarks/{first}" if first.endswith(".py") and "/" not in first else first
        return [script, *rest, *(self.tiny if tiny else ())]


# In order of value: the first ones run first, and the last ones may find no time. A new job is one line.
JOBS = [
    Job("machine", ("gpu_machine.py",), 40, "speed of copies, matrix products (bf16, fp8, TF32, float32), all-reduce"),
    Job("step", ("gpu_step.py",), 150, "time and memory of training steps"),
    Job("kernel", ("gpu_kernel.py",), 60, "the kernel of separable attention"),
    Job("engine", ("gpu_engine.py",), 90, "optimizer steps through DeepSpeed"),
    Job("checks", ("gpu_checks.py",), 150, "results on the GPU against the CPU and against float64"),
    Job("rows", ("gpu_rows.py",), 200, "rows of the papers' models"),
    Job("run", ("gpu_run.py",), 180, "a training run from the command line"),
    Job("ingest", ("gpu_ingest.py",), 120, "data on the way to the GPU"),
    Job("plan", ("gpu_plan.py",), 90, "`perceiver plan --calibrate` of the quickstart, the step before and after"),
]


# The file


@dataclass
class Attempt:
    """One start of a job: the lines that it printed, and how it ended; no closing line if this program was killed."""

    machine: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    closing: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> str:
        return self.closing.get("done", "interrupted")


def number(text: str) -> float | str:
    """Return a finite number; others stay text, as JSON has none."""
    return value if math.isfinite(value := float(text)) else text


def json_object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a line is, None if it is something else."""
    try:
        found = json.loads(line, parse_float=number, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def without_places(value: Any) -> Any:
    """Return a JSON value with the paths in its strings relative to the repository, or cut to their last part."""
    if isinstance(value, str):
        return PLACE.sub(lambda found: "…/" + found[0].rsplit("/", 1)[1], value.replace(f"{ROOT}/", ""))
    if isinstance(value, list):
        return [without_places(each) for each in value]
    return {key: without_places(each) for key, each in value.items()} if isinstance(value, dict) else value


def append(out: BinaryIO, record: dict[str, Any]) -> None:
    """Append a line with one write, so that a signal never leaves half of it."""
    out.write(json.dumps(without_places(record)).encode() + b"\n")


def open_lines(path: Path) -> BinaryIO:
    """Open a file to append to, without the half-written line that it may end with."""
    out = path.open("a+b", buffering=0)
    out.seek(0)
    content, start = out.read(), b'{"header"'
    if not start.startswith(content[: len(start)]):
        out.close()
        sys.exit(f"{path} has other content than measurements of this program; give another --out")
    out.truncate(content.rfind(b"\n") + 1)
    return out


def read(path: Path) -> dict[str, list[Attempt]]:
    """Return the attempts of each job, in the order in which they ran."""
    found: dict[str, list[Attempt]] = {}
    machine: dict[str, Any] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        record = json_object(line) or {}
        if "header" in record:
            machine = record["header"]
        elif name := record.pop("job", None):
            of_job = found.setdefault(name, [])
            if not of_job or of_job[-1].machine is not machine:  # each call runs a job once at most
                of_job.append(Attempt(machine))
            if "done" in record:
                of_job[-1].closing = record
            else:
                of_job[-1].lines.append(record)
    return found


def best(attempts: list[Attempt]) -> Attempt:
    """Return the last attempt that is ok, otherwise the one with the most lines."""
    return max(reversed(attempts), key=lambda attempt: (attempt.done == "ok", len(attempt.lines)))


# The jobs' processes


class Stop:
    """Handles SIGINT, SIGTERM and SIGHUP: the running job is ended and no other starts. True once one came."""

    number = 0

    def __init__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.receive)

    def receive(self, number: int, _: object) -> None:
        self.number = number

    def __bool__(self) -> bool:
        return self.number > 0


def session(leader: int) -> Iterator[int]:
    """Yield the processes of a session: Ray's workers have process groups of their own in it."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[3]) == leader:
                yield int(stat.parent.name)


def end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process and its group; kill what is left of its session after the grace time, or without it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # nothing is left of the group
        os.killpg(process.pid, signal.SIGKILL)
    for member in session(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    process.wait()


def follow(process: subprocess.Popen[bytes], limit: float, stop: Stop) -> Iterator[bytes | None]:
    """Yield the lines of a process's stdout until it has ended; None where it must end: at its limit, on a signal."""
    assert process.stdout
    streams, rest, deadline = [process.stdout], b"", clock() + limit
    while True:
        ended = process.poll() is not None  # before the read: what was written until then is read
        if select.select(streams, [], [], 0 if ended else POLL_S)[0]:
            chunk = os.read(process.stdout.fileno(), 2**20)
            *whole, rest = (rest + chunk).split(b"\n")
            yield from whole
            streams = streams if chunk else []
        elif ended:
            break
        if stop or clock() >= deadline:
            if ended:  # a process that left the session could keep the pipe open for ever
                break
            yield None
    yield rest


def last_lines(log: BinaryIO, start: int) -> str:
    """Return the last lines of a log, from a position on, without the name of this host (NCCL's lines have it)."""
    log.seek(max(start, log.seek(0, os.SEEK_END) - 8192))
    text = re.sub(rf"\b{re.escape(platform.node())}\b", "HOST", log.read().decode(errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(line[:ERROR_WIDTH] for line in lines[-ERROR_LINES:])


def run_job(job: Job, out: BinaryIO, log: BinaryIO, limit: float, tiny: bool, stop: Stop) -> dict[str, Any]:
    """Run a job, append its lines and its closing line, and return the latter."""
    started, log_start, timed_out = clock(), log.seek(0, os.SEEK_END), False
    closing: dict[str, Any] = {"job": job.name, "done": "failed", "rc": None, "seconds": 0.0}
    process = subprocess.Popen(
        [sys.executable, *job.command(tiny)],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
    )
    try:
        for line in follow(process, limit, stop):
            if line is None:
                timed_out = not stop
                end(process)
            elif (found := json_object(line)) is not None:
                append(out, {"job": job.name, **{f"{k}_" if k in RESERVED else k: v for k, v in found.items()}})
            elif line:
                log.write(line + b"\n")
        done = "timeout" if timed_out else "failed" if stop or process.returncode else "ok"
        closing |= {"done": done, "rc": process.returncode}
        if done != "ok":
            closing["error"] = f"received signal {stop.number}" if stop else last_lines(log, log_start)
    finally:
        end(process)
        if process.stdout:
            process.stdout.close()
        closing["seconds"] = round(clock() - started, 1)
        append(out, closing)
    return closing


def environment() -> dict[str, str]:
    """Return the environment of the processes: unbuffered output, our packages even where not installed."""
    places = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(places)}


def describe() -> dict[str, Any]:
    """Return what the figures depend on: GPU, versions, cores and memory."""
    import torch

    from perceiver.tracking.code import code_facts

    found: dict[str, Any] = {"gpu": None, "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    if found["gpus"]:
        device = torch.cuda.get_device_properties(0)
        found |= {"gpu": device.name, "gpu_gib": round(device.total_memory / 2**30)}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": None}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    limits = Path("/sys/fs/cgroup")  # of a container
    if (limits / "memory.max").exists() and (text := (limits / "memory.max").read_text().strip()).isdigit():
        memory = min(memory, int(text))
    if (limits / "cpu.max").exists() and (words := (limits / "cpu.max").read_text().split())[0].isdigit():
        cores = min(cores, math.ceil(int(words[0]) / int(words[1])))
    found |= {"python": platform.python_version(), "cores": cores, "memory_gib": round(memory / 2**30)}
    return found | {key: code_facts()[key] for key in ("commit", "dirty") if key in code_facts()}


def machine() -> dict[str, Any]:
    """Return `describe()` of a separate process, so that this one uses no memory of the GPU."""
    command = [sys.executable, __file__, "--describe"]
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=DESCRIBE_S)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {DESCRIBE_S:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:ERROR_WIDTH]}
    return json.loads(done.stdout.splitlines()[-1])


def run(jobs: list[Job], path: Path, total: float, least: float, tiny: bool) -> int:
    """Run the jobs that are not ok, those that never started first; return the exit code."""
    deadline, stop = clock() + total, Stop()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lines(path) as out:
        known = read(path)
        if any(attempt.machine.get("tiny", False) != tiny for attempts in known.values() for attempt in attempts):
            sys.exit(f"{path} was measured {'without' if tiny else 'with'} --tiny; give another --out")
        states = {name: {attempt.done for attempt in attempts} for name, attempts in known.items()}
        pending = [job for job in jobs if "ok" not in states.get(job.name, set())]
        pending.sort(key=lambda job: not states.get(job.name, set()) <= {"no time"})
        if not pending:
            return 0
        head = {**machine(), "tiny": tiny, "date": datetime.now(UTC).date().isoformat()}
        append(out, {"header": head})
        all_ok = True
        for job in pending:
            if stop:
                return 128 + stop.number
            left = deadline - clock() - GRACE_S
            closing: dict[str, Any] = {"job": job.name, "done": "no time", "rc": None, "seconds": 0.0}
            if job.needs == "cuda" and not tiny and "gpu" in head and not head["gpu"]:
                closing |= {"done": "failed", "error": "needs a GPU"}
                append(out, closing)
            elif left < least:
                append(out, closing)
            else:
                with path.with_name(f"{path.stem}.{job.name}.log").open("a+b", buffering=0) as log:
                    closing = run_job(job, out, log, min(job.limit, left), tiny, stop)
            all_ok = all_ok and closing["done"] == "ok"
            print(f"{job.name}: {closing['done']}, {closing['seconds']:.0f} s", flush=True)
    return 128 + stop.number if stop else 0 if all_ok else 1


# The record


def rounded(value: Any) -> str:
    """Return a cell's text: floats with three significant digits, whole numbers as they are."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        if value and not 1e-4 <= abs(value) < 1e15:
            return f"{value:.2e}"
        digits = 2 - math.floor(math.log10(abs(value))) if value else 0
        value = round(value, digits)
        return f"{value:,.{max(0, digits)}f}" if abs(value) >= 1000 else f"{value:.3g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|")


def tables(lines: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines as Markdown: one table per value of `table`, its columns in order of first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(str(line.get("table", "")), []).append({k: v for k, v in line.items() if k != "table"})
    for name, rows in groups.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        yield from ([f"{name}:", ""] if name else [])
        yield "| " + " | ".join(rounded(column.replace("_", " ")) for column in columns) + " |"
        yield "|---" * len(columns) + "|"
        yield from ("| " + " | ".join(rounded(row.get(column)) for column in columns) + " |" for row in rows)
        yield ""


def machine_text(found: dict[str, Any]) -> str:
    """Return a header as a sentence."""
    if "error" in found:
        return f"not known ({found['error']})"
    gpu = f"{found['gpus']} x {found['gpu']} ({found.get('gpu_gib')} GiB)" if found.get("gpu") else "no GPU"
    parts = [gpu, f"{found.get('cores')} CPU cores", f"{found.get('memory_gib')} GiB"]
    parts += [f"torch {found.get('torch')} with {'CUDA ' + found['cuda'] if found.get('cuda') else 'no CUDA'}"]
    parts += [f"Triton {found.get('triton') or 'not installed'}", f"Python {found.get('python')}"]
    if "commit" in found:
        parts.append(f"commit {found['commit'][:10]}{' with changes' if found.get('dirty') else ''}")
    return ", ".join(parts)


def ending(closing: dict[str, Any]) -> str:
    """Return how an attempt ended, with the last line of its error."""
    code = "" if closing.get("rc") is None else f", exit code {closing['rc']}"
    error = (closing.get("error") or "").strip().splitlines()[-1:]
    return f"{closing.get('done', 'interrupted')}{code}" + "".join(f": {rounded(line)}" for line in error)


def render(path: Path) -> str:
    """Return a file of lines as Markdown."""
    known = read(path)
    shown = {name: best(attempts) for name, attempts in known.items()}
    dates = sorted({attempt.machine.get("date", "") for attempt in shown.values()})
    texts = list(dict.fromkeys(machine_text(attempt.machine) for attempt in shown.values()))
    result = [f"# Measurements on a GPU ({', '.join(dates)})", ""]
    result += [f"Machine{f' {i}' * (len(texts) > 1)}: {text}.\n" for i, text in enumerate(texts, 1)]
    if any(attempt.machine.get("tiny") for attempt in shown.values()):
        result += ["**Tiny sizes: a test of the programs, no measurement.**", ""]
    jobs = {job.name: job for job in JOBS}
    order = [*(name for name in jobs if name in shown), *(name for name in shown if name not in jobs)]
    for name in (name for name in order if shown[name].lines):
        attempt = shown[name]
        result += [f"## {name}", ""]
        if job := jobs.get(name):
            command = " ".join(["python", *job.command(attempt.machine.get("tiny", False))])
            result += [f"`{command}`: {job.measures}.", ""]
        if len(texts) > 1:
            result += [f"On machine {texts.index(machine_text(attempt.machine)) + 1}.", ""]
        if attempt.done != "ok":
            result += [f"Incomplete ({attempt.done} after {attempt.closing.get('seconds', '?')} s).", ""]
        result += tables(attempt.lines)
    missing = [f"- `{name}`: {ending(shown[name].closing)}" for name in order if shown[name].done != "ok"]
    missing += [f"- `{name}`: not started" for name in jobs if name not in shown]
    result += ["## Failed or missing", "", *missing, ""] if missing else []
    return "\n".join(result)


def main(words: list[str] | None = None) -> int:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FILE", help="file that the lines are appended to")
    what.add_argument("--render", type=Path, metavar="FILE", help="print a file's lines as Markdown")
    what.add_argument("--list", action="store_true", help="print the jobs")
    what.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--job", choices=[job.name for job in JOBS], action="append", help="all by default")
    parser.add_argument("--total", type=float, default=math.inf, metavar="S", help="seconds for all jobs together")
    parser.add_argument("--least", type=float, default=15, metavar="S", help="seconds left below which no job starts")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU where there is no GPU")
    given = parser.parse_args(words)
    if given.describe:
        print(json.dumps(describe()))
    elif given.list:
        for job in JOBS:
            command = " ".join(["python", *job.command(given.tiny)])
            print(f"{job.name:8} {job.limit:4.0f} s  {job.needs:4}  {command:32} {job.measures}")
    elif given.render:
        print(render(given.render), end="")
    else:
        jobs = [job for job in JOBS if given.job is None or job.name in given.job]
        return run(jobs, given.out, given.total, given.least, given.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
