"""Ends of a real run on this machine: one line, an exit code, no process left; while it runs it listens on loopback."""

import ipaddress
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.recipes import write_recipe

START_S, END_S = 200, 120


class Run:
    """A `perceiver train` of many steps in a separate session, which is past its first step.

    Attributes:
        root: the process of the command.
        processes: all processes of the run.
    """

    def __init__(self, recipe: Path, log: Path) -> None:
        self.log, command = log, [sys.executable, "-m", "perceiver", "train", str(recipe)]
        # Neither a home folder nor a working proxy is needed.
        strange = {"HOME": str(recipe / "none"), "PERCEIVER_CACHE": "", "http_proxy": "http://127.0.0.1:9"}
        with log.open("w") as sink:
            self.command = subprocess.Popen(
                command, stdout=sink, stderr=sink, start_new_session=True, env=os.environ | strange
            )
        self.root = psutil.Process(self.command.pid)
        self.processes: list[psutil.Process] = []

    def wait_for(self, text: str) -> None:
        """Wait until the command has printed a text."""
        with self.log.open() as lines:
            for _ in range(START_S * 5):
                if text in lines.read():
                    break
                assert self.command.poll() is None, self.log.read_text()
                try:
                    self.command.wait(0.2)
                except subprocess.TimeoutExpired:
                    lines.seek(0)
        self.processes = [self.root, *self.root.children(recursive=True)]

    def named(self, name: str) -> psutil.Process:
        """Return the process of a name."""
        return next(each for each in self.processes if each.name() == name)

    def end(self) -> tuple[int, str]:
        """Wait for the end; return exit code and output. All processes must have ended."""
        code = self.command.wait(END_S)
        _, alive = psutil.wait_procs(self.processes, 30)
        assert not alive, f"{alive}\n{self.log.read_text()}"
        return code, self.log.read_text()


@pytest.fixture
def run(tmp_path: Path, tree: dict[str, Any]) -> Iterator[Callable[[], Run]]:
    tree |= {"cluster": {"workers": 1}, "tracking": {"enabled": False}}
    tree["train"] = {"steps": 100_000, "global_batch": 16, "log_every": 1}
    started: list[Run] = []

    def start() -> Run:
        started.append(Run(write_recipe(tmp_path, tree), tmp_path / "output.txt"))
        started[0].wait_for("step 1/")
        return started[0]

    yield start
    for one in started:
        for process in one.processes:
            if process.is_running():
                process.kill()


@pytest.mark.slow
def test_sigterm_to_every_process_saves_a_checkpoint(run: Callable[[], Run], tmp_path: Path) -> None:
    """As Slurm's time limit, systemd and GNU timeout send it. Before that, everything listens on loopback only."""
    started = run()
    for process in started.processes:
        for each in process.net_connections("inet") if process.is_running() else ():
            if each.status == psutil.CONN_LISTEN:
                assert ipaddress.ip_address(each.laddr.ip.removeprefix("::ffff:")).is_loopback, (
                    process.name(),
                    each.laddr,
                )
    # Otherwise Ray Train would ask whichever instance has its dashboard at the default port about this run.
    assert started.named("raylet").environ()["RAY_API_SERVER_ADDRESS"].endswith(":9")
    for process in started.processes:
        process.send_signal(signal.SIGTERM)
    code, text = started.end()
    folder = tmp_path / "runs" / "small-001"
    assert code == 130 and "--resume --run small-001" in text and "Traceback" not in text
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    claim = json.loads((folder / "lease" / "00000001.json").read_text())
    assert list((folder / "checkpoints").glob("step-*/manifest.json")) and claim["released"]
    assert "step 1/100000" in (folder / "logs" / "driver.log").read_text()


@pytest.mark.slow
def test_a_lost_process_of_ray_is_named(run: Callable[[], Run], tmp_path: Path) -> None:
    """The raylet; `make faults` kills the other one, gcs_server."""
    started = run()
    started.named("raylet").kill()
    code, text = started.end()
    (error,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert code == 1 and "raylet" in error and error.endswith("--resume --run small-001")
    assert "[20" not in text and "Raylet" not in text, "no log of Ray"
    assert json.loads((tmp_path / "runs" / "small-001" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["import", "work"])
def test_a_signal_while_a_command_starts(number: signal.Signals, moment: str) -> None:
    """Libraries turn a KeyboardInterrupt in their imports into other errors, so the process ends at once there."""
    code = (
        "import os, sys, perceiver.__main__ as program\n"
        "class Hooked:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'perceiver.cli.models' and {moment == 'import'}: os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Hooked())\n"
        f"import click; shown = click.echo; click.echo = lambda *a, **k: os.kill(os.getpid(), {int(number)})\n"
        "sys.argv = ['perceiver', 'models', '--json']; program.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (130, "stopped")
