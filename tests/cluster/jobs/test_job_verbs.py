"""The job commands with a stand-in for Ray's client: exit codes, JSON, and following a log."""

import importlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import requests
from click.testing import CliRunner

from cluster.jobs import commands as jobs
from cluster.jobs.commands import find_job, table
from cluster.jobs.server import JobServer
from cluster.recipe.placement import Node
from perceiver.cli import cli
from perceiver.config import UserError
from tests.cluster.recipes import write_recipe

pytestmark = pytest.mark.usefixtures("home")


class Client:
    """A job server with one job: each request returns the next of the ``states``, then the last one again."""

    def __init__(self, *states: str, log: str = "one\ntwo\n", pushed: Sequence[str | Exception] = ()) -> None:
        self.states, self.log, self.pushed, self.stopped = list(states), log, pushed, False

    def list_jobs(self) -> list[Any]:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        times = {"start_time": 1000, "end_time": None if state in ("PENDING", "RUNNING") else 62000}
        metadata = {"perceiver.run": "a", "perceiver.recipe": "a.yaml"}
        code = 1 if state == "FAILED" else None
        return [
            SimpleNamespace(
                submission_id="a-1", status=state, message="", metadata=metadata, driver_exit_code=code, **times
            )
        ]

    def get_job_logs(self, name: str) -> str:
        return self.log

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for text in self.pushed:
            if isinstance(text, Exception):
                raise text
            yield text

    def stop_job(self, name: str) -> None:
        self.stopped = True
        self.log += "stopped after step 3, checkpoint saved\n"

    def submit_job(self, **given: Any) -> str:
        return "a-1"


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command against a `Client` and returns exit code and output."""
    monkeypatch.setattr(jobs, "POLL_S", 0)
    monkeypatch.setattr(jobs, "POLL_LOG_S", 0)

    def run(client: Client, *words: str) -> tuple[int, str]:
        module = importlib.import_module(f"perceiver.cli.{words[0]}")
        server = JobServer("http://me:hunter2@head", client)
        monkeypatch.setattr(server, "nodes", lambda: [Node("10.9.8.7", {"CPU": 8})])
        monkeypatch.setattr(module, "reach", lambda *access: server)
        done = CliRunner().invoke(cli, words, standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        assert "hunter2" not in done.output
        return done.return_value, done.output

    return run


Verb = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    ("pushed", "states"),
    [
        (["one\ntwo\n"], ["RUNNING", "SUCCEEDED"]),
        (["one\n"], ["RUNNING", "RUNNING", "SUCCEEDED"]),
        ([aiohttp.ClientError("no websocket here")], ["PENDING", "RUNNING", "SUCCEEDED"]),
        (["on", RuntimeError("closed with 1006")], ["RUNNING", "SUCCEEDED"]),
    ],
    ids=["websocket", "closed by a proxy", "refused by a proxy", "broken"],
)
def test_a_log_is_shown_completely_and_once(pushed: list[str | Exception], states: list[str], verb: Verb) -> None:
    assert verb(Client(*states, pushed=pushed), "logs", "-f", "a-1") == (0, "one\ntwo\n")


def test_the_head_of_a_followed_job_may_start_again(verb: Verb) -> None:
    """The server does not answer for a while; the log goes on where it was."""
    client = Client("RUNNING", "RUNNING", "RUNNING", "SUCCEEDED", pushed=["one\n"])
    answers = iter([requests.ConnectionError("gone"), RuntimeError("500 starting"), *[client.log] * 2])

    def answer(name: str) -> str:
        if isinstance(found := next(answers), Exception):
            raise found
        return found

    client.get_job_logs = answer  # type: ignore[method-assign]
    code, said = verb(client, "logs", "-f", "a-1")
    first, note, last = said.splitlines()
    assert (code, first, last) == (0, "one", "two") and "(gone); waiting up to 120 s" in note


def test_a_job_server_that_stops_answering_while_a_log_is_followed_is_one_line(
    verb: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "ANSWER_WAIT_S", 0)
    client = Client("RUNNING")
    client.get_job_logs = lambda name: (_ for _ in ()).throw(requests.ConnectionError("gone"))  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"http://\*\*\*@head .*\(gone\)"):
        verb(client, "logs", "-f", "a")


@pytest.mark.parametrize(("end", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("STOPPED", 130)])
def test_exit_codes_are_those_of_the_job(end: str, code: int, verb: Verb, tree: dict[str, Any], tmp_path: Path) -> None:
    assert verb(Client("RUNNING", end), "logs", "-f", "a")[0] == code
    assert verb(Client(end), "logs", "a")[0] == 0
    lines = table([find_job(JobServer("http://head", Client(end)), "a")])
    assert verb(Client(end), "status", "a") == (code, "\n".join(lines) + "\ntwo\n")
    with pytest.raises(UserError, match=rf"a-1 .*{end}"):
        verb(Client(end), "stop", "a")
    tree |= {"output": "s3://bucket/runs", "tracking": {"enabled": False}}
    tree["data"]["url"] = "s3://bucket/data"
    recipe = str(write_recipe(tmp_path, tree))
    submitted, said = verb(Client("SUCCEEDED", "RUNNING", end), "submit", recipe, "--run", "b")
    assert submitted == code and "at http://***@head" in said and said.endswith(f"two\njob a-1 {end}\n")
    submitted, said = verb(Client("RUNNING"), "submit", recipe, "--run", "b", "--no-wait", "--json")
    assert submitted == 0 and json.loads(said)["status"] == "RUNNING"


def test_the_status_of_a_running_job_is_success(verb: Verb) -> None:
    assert verb(Client("RUNNING"), "status", "a")[0] == 0
    code, said = verb(Client("RUNNING"), "status", "a", "--json")
    assert code == 0 and json.loads(said)["name"] == "a-1"
    code, said = verb(Client("RUNNING", "FAILED"), "logs", "-f", "a", "--json")
    assert code == 1 and json.loads(said)["log"] == "one\ntwo\n" and json.loads(said)["status"] == "FAILED"


def test_stop_reports_whether_the_job_saved_a_checkpoint(verb: Verb) -> None:
    client = Client("RUNNING", "STOPPED")
    code, said = verb(client, "stop", "a")
    assert (
        code == 0
        and client.stopped
        and "checkpoint saved\njob a-1 STOPPED\n" in said
        and "perceiver submit a.yaml" in said
    )
    killed = Client("RUNNING", "STOPPED")
    killed.stop_job = lambda name: None  # type: ignore[method-assign]
    code, said = verb(killed, "stop", "a", "--json")
    assert code == 1 and json.loads(said)["saved"] is False
    assert verb(Client("PENDING", "STOPPED"), "stop", "a")[0] == 0
