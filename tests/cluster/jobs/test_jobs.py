"""Jobs: the connection to a cluster, the entrypoint, and a run on a real cluster from start to end."""

import http.server
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest
import ray
import requests
import yaml

from cluster.jobs import entrypoint as job
from cluster.jobs import package, submit
from cluster.jobs.commands import Job, find_job, table
from cluster.jobs.config import Submission
from cluster.jobs.server import Access, connect
from cluster.recipe.placement import Node
from cluster.recipe.resources import ClusterConfig
from cluster.record.run_folder import RunFolder
from cluster.runtime.local import check_reachable, free_port
from cluster.runtime.local_cluster import running_cluster
from perceiver.config import UserError
from tests.cluster.recipes import write_recipe
from tests.faults.job import PACE
from tests.homes import share_kernels, write_names
from tune.config import build_search
from tune.search.submission import is_search, searching
from tune.search_file import read_search

pytestmark = pytest.mark.usefixtures("home")
PERCEIVER = [str(Path(sys.executable).with_name("perceiver"))]
POLL_S = 1.0


@pytest.fixture
def dashboard() -> Iterator[Any]:
    """Yield a server that responds as a dashboard does; ``answers`` maps a path to status and JSON."""
    answers: dict[str, tuple[int, Any]] = {
        "/api/authentication_mode": (200, {"authentication_mode": "disabled"}),
        "/api/version": (200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "x"}),
        "/api/jobs/": (200, []),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.headers.append(self.headers)  # type: ignore[attr-defined]
            status, body = answers.get(self.path.split("?")[0], (404, {}))
            blob = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(blob)))
            self.end_headers()
            self.wfile.write(blob)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.headers = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.answers, server.url = answers, f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    server.server_close()


def test_an_address_where_nothing_listens_is_refused() -> None:
    with pytest.raises(UserError, match=r"ray://\*\*\*@127.0.0.1:9 "):
        connect(Access("ray://me:hunter2@127.0.0.1:9"))
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 .*--address"):
        connect(Access("http://127.0.0.1:9"))
    with pytest.raises(UserError, match="--address ray://host: has no port"):
        connect(Access("ray://host"))
    with pytest.raises(UserError, match="--address ftp://host"):
        connect(Access("ftp://host"))
    with pytest.raises(UserError, match="perceiver cluster up"):
        connect(Access())


def test_a_server_that_is_silent_or_speaks_http_only_is_refused(
    dashboard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.runtime.local.SETTINGS_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"ray://{address} \(no answer in time\): set --address"):
            connect(Access(f"ray://{address}"))
        with pytest.raises(UserError, match=rf"{address} \(no answer in time\): check cluster.address"):
            check_reachable(address)
    with pytest.raises(UserError, match="no gRPC server"):
        check_reachable(dashboard.url.removeprefix("http://"))


@pytest.mark.parametrize("url", ["ray://head:10001", "http://head:8265"])
def test_a_driver_takes_no_url_as_its_cluster(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=f"cluster.address={url}.*perceiver submit"):
        ClusterConfig(address=url).resolved_address()
    monkeypatch.setenv("RAY_ADDRESS", url)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={url}"):
        ClusterConfig().resolved_address()


def test_another_version_of_ray_is_refused(dashboard: Any) -> None:
    dashboard.answers["/api/version"] = (200, {"version": "4", "ray_version": "2.9.9", "ray_commit": "x"})
    with pytest.raises(UserError, match=rf"Ray 2.9.9.*Ray {ray.__version__}.* ray==2.9.9"):
        connect(Access(dashboard.url))


def test_another_server_than_a_job_server_is_refused(dashboard: Any) -> None:
    dashboard.answers["/api/version"] = (404, {})
    with pytest.raises(UserError, match=dashboard.url):
        connect(Access(dashboard.url))


def test_headers_and_tls_settings_are_checked() -> None:
    with pytest.raises(UserError, match="--headers .*JSON object"):
        Access(headers="[1]").json_headers()
    assert Access(headers='{"X-Team": "vision"}').json_headers() == {"X-Team": "vision"}
    assert Access(verify="False").trust() is False and Access(verify=certifi.where()).trust() == certifi.where()
    with pytest.raises(UserError, match=r"^--verify ca.pem: No such file"):
        Access("https://127.0.0.1:9", verify="ca.pem").trust()
    with pytest.raises(UserError, match=r"^--verify .*test_jobs.py: .*PEM"):
        Access(verify=__file__).trust()


def test_headers_reach_the_cluster(dashboard: Any) -> None:
    connect(Access(dashboard.url, headers='{"X-Team": "vision"}'))
    assert dashboard.headers and all(headers["X-Team"] == "vision" for headers in dashboard.headers)


def test_the_login_of_an_address_is_not_shown(dashboard: Any) -> None:
    place = dashboard.url.removeprefix("http://")
    server = connect(Access(f"http://me:hunter2@{place}"))
    assert server.url == f"http://***@{place}"
    dashboard.answers["/api/version"] = (200, {"version": "4", "ray_version": "2.9.9", "ray_commit": "x"})
    with pytest.raises(UserError, match=r"^http://\*\*\*@.* runs Ray 2.9.9") as caught:
        connect(Access(f"http://me:hunter2@{place}"))
    assert "hunter2" not in str(caught.value)
    dashboard.answers["/api/version"] = (404, {})
    with pytest.raises(UserError, match=r"http://\*\*\*@"):
        connect(Access(f"http://me:hunter2@{place}"))


def test_a_cluster_without_token_is_sent_none(dashboard: Any) -> None:
    server = connect(Access(dashboard.url))
    assert server.url == dashboard.url and os.environ["RAY_AUTH_MODE"] == "disabled"


def test_a_cluster_that_requires_a_token_is_refused_if_there_is_none(dashboard: Any) -> None:
    dashboard.answers["/api/authentication_mode"] = (200, {"authentication_mode": "token"})
    with pytest.raises(UserError, match="token.*RAY_AUTH_TOKEN_PATH"):
        connect(Access(dashboard.url))


def test_the_token_is_sent_to_a_cluster_that_asks_for_one_though_ray_was_imported_before(
    dashboard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard.answers["/api/authentication_mode"] = (200, {"authentication_mode": "token"})
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    connect(Access(dashboard.url))
    assert dashboard.headers[-1]["Authorization"] == "Bearer secret"
    connect(Access(dashboard.url, headers='{"authorization": "mine"}'))
    assert dashboard.headers[-1].get_all("Authorization") == ["mine"]


def test_an_existing_run_is_resumed_and_missing_variables_are_named(tmp_path: Path, tree: dict[str, Any]) -> None:
    wanted = Submission(recipe=str(write_recipe(tmp_path, tree)), overrides=["optim.lr=0.1"])
    words = job_words(submit.entrypoint(wanted, submit.training(wanted), "mine", str(tmp_path)))
    assert words[:6] == ["--run", "mine", "--output", tree["output"], "--folder", str(tmp_path)]
    assert words[6:] == ["train", wanted.recipe, "optim.lr=0.1"]
    assert job.command(job.arguments(words))[-3:] == ["optim.lr=0.1", "--run", "mine"]
    (Path(tree["output"]) / "mine").mkdir(parents=True)
    (Path(tree["output"]) / "mine" / "run.json").write_text('{"name": "mine"}')
    assert job.command(job.arguments(words))[-1] == "--resume"
    with pytest.raises(UserError, match="NOT_SET_ANYWHERE"):
        job.command(job.arguments(["--needs", "NOT_SET_ANYWHERE", *words]))


def job_words(entrypoint: str) -> list[str]:
    """Return the arguments that the job's command passes to `cluster.jobs.entrypoint`."""
    start = "exec python -P -m perceiver_train.module cluster.jobs.entrypoint "
    assert entrypoint.startswith(start)
    return shlex.split(entrypoint.removeprefix(start))


# -- searches ----------------------------------------------------------------------------------------------------------


def write_search(folder: Path, tree: dict[str, Any], name: str = "hunt.yaml") -> str:
    """Write ``train/small.yaml`` and a search over it in ``tune/``; return the search file."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    (folder / "tune").mkdir(exist_ok=True)
    write_recipe(folder / "train", tree)
    space = {"optim.lr": {"kind": "uniform", "low": 0.01, "high": 0.1}}
    search = {"name": "hunt", "recipe": "../train/small.yaml", "space": space, "trials": 2}
    (folder / "tune" / name).write_text(yaml.safe_dump(search))
    return str(folder / "tune" / name)


@pytest.mark.parametrize("outside", [False, True])
def test_a_search_and_its_recipe_find_each_other_in_the_package(
    outside: bool, tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if they are outside the current folder, so that the package keeps only their names."""
    here, there, target = tmp_path / "here", tmp_path / "there", tmp_path / "package"
    here.mkdir()
    target.mkdir()
    monkeypatch.chdir(here)
    path = write_search(there if outside else here, tree)
    assert is_search(path) and not is_search(path.replace("tune/hunt", "train/small"))
    wanted = Submission(recipe=path, overrides=["trials=3", "train.epochs=7", "tracking.uri=env:MLFLOW_URI"])
    work = searching(wanted)
    assert (work.verb, work.name, work.recipe.train.epochs) == ("tune", "hunt", 7)
    words = job_words(submit.entrypoint(wanted, work, "hunt", None))
    assert words[words.index("--needs") + 1] == "MLFLOW_URI"
    package.build_package(target, work.files)
    monkeypatch.chdir(target)
    monkeypatch.setenv("MLFLOW_URI", "sqlite:///x")
    command = job.command(job.arguments(words))
    assert command[3] == "tune" and command[-2:] == ["--run", "hunt"]
    search = build_search(*read_search(command[4], command[5:-2]), command[4])
    assert search.config.trials == 3 and search.recipe == work.recipe


def test_an_existing_search_is_resumed(tmp_path: Path, tree: dict[str, Any]) -> None:
    wanted = Submission(recipe=write_search(tmp_path, tree))
    words = job_words(submit.entrypoint(wanted, searching(wanted), "hunt", str(tmp_path)))
    (Path(tree["output"]) / "hunt").mkdir(parents=True)
    (Path(tree["output"]) / "hunt" / "run.json").write_text('{"search": "hunt"}')
    assert job.command(job.arguments(words))[3:] == ["tune", wanted.recipe, "--run", "hunt", "--resume"]


def test_a_search_that_does_not_fit_on_a_cluster_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    path = write_search(tmp_path, tree)
    with pytest.raises(UserError, match=r"cluster\.workers = 2.* 1 CPUs"):
        searching(Submission(recipe=path)).fits([Node("a", {"CPU": 1})])
    with pytest.raises(UserError, match=r"concurrency = 2 .* 1\.5 CPUs"):
        searching(Submission(recipe=path, overrides=["concurrency=2"])).fits([Node("a", {"CPU": 3})])
    searching(Submission(recipe=path)).fits([Node("a", {"CPU": 2}), Node("b", {"CPU": 2})])


def test_files_with_the_same_path_in_the_package_are_refused(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = searching(Submission(recipe=write_search(tmp_path, tree, "small.yaml")))
    for name in ("elsewhere", "package"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"train/small.yaml .*same path"):
        package.build_package(tmp_path / "package", work.files)


def test_an_unknown_job_is_refused_with_the_existing_jobs(dashboard: Any) -> None:
    with pytest.raises(UserError, match=r"'x' at .*jobs: none"):
        find_job(connect(Access(dashboard.url)), "x")
    assert table([Job("a-1", "FAILED", run="a", began=1.0, ended=62.0)])[1].split()[-1] == "0:01:01"
    ended = (Job("a", "SUCCEEDED", exit_code=0), Job("a", "FAILED", exit_code=2), Job("a", "STOPPED"))
    assert [job.code() for job in ended] == [0, 2, 130]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (type("NoCredentialsError", (Exception,), {})("Unable to locate"), "s3:.*Unable to locate"),
        (ImportError("Install s3fs to access S3"), r"Install s3fs .*perceiver-train\[s3\]"),
        (UserError("s3://u:hunter2@bucket/a/run.json is not valid JSON"), r"run\.json .*--run"),
        (ValueError("Protocol not known: s4"), r"bucket/a .*Protocol not known"),
    ],
)
def test_an_output_that_a_job_cannot_read_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def facts(self: RunFolder) -> None:
        raise error

    monkeypatch.setattr(RunFolder, "facts", facts)
    assert job.main(["--run", "a", "--output", "s3://u:hunter2@bucket", "train", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and re.search(line, said) and "hunter2" not in said


# -- a real cluster ----------------------------------------------------------------------------------------------------


def perceiver(folder: Path, *words: str, code: int | None = 0, **env: str) -> str:
    """Run a command as a user does; return its output."""
    done = subprocess.run(
        [*PERCEIVER, *words],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "COLUMNS": "200", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert code is None or done.returncode == code, f"{shlex.join(words)}: {done.returncode}\n{done.stdout}"
    assert "Traceback" not in done.stdout
    return done.stdout


NODES = """
nodes:
- {cpus: 0, labels: {role: head}}
- {cpus: 1, resources: {slot: 1}, labels: {role: train}}
- {cpus: 1, labels: {role: data}}
object_store_mb: 100
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_submit_stop_and_submit_again_on_three_nodes(home: Path, tree: dict[str, Any]) -> None:
    """One run, two jobs; workers and data tasks on the nodes that their labels name."""
    tree["tracking"] = {"enabled": False}
    tree["cluster"] = {"workers": 1, "worker_labels": {"role": "train"}, "worker_resources": {"slot": 1}}
    tree["data"] |= {"task_labels": {"role": "data"}, "tasks": 1}
    tree["train"] |= {"epochs": 4000, "checkpoint_every": 10, "eval_every": 1000}
    recipe = str(write_recipe(home, tree))
    ports = f"port: {free_port('127.0.0.2')}\ndashboard_port: {free_port('127.0.0.1')}\n"
    (home / "nodes.yaml").write_text(NODES + ports)
    write_names(share_kernels(home), packages=True)  # the current folder of the driver
    mine = str(write_names(home / "mine", packages=False))
    try:
        shown = perceiver(home, "cluster", "up", "nodes.yaml", **PACE)  # leaves the processor to the commands below
        assert "ray start --address=HEAD" in shown and (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
        perceiver(home, "submit", recipe, "--run", "life", "--no-wait", "--working-dir", mine)
        placed = wait_for_tasks(home)
        assert len(ask(home, "/api/train/v2/runs/v1")["train_runs"]) == 1
        assert placed["RayTrainWorker"] == {"127.0.0.3"} and placed["MapBatches(produce)"] == {"127.0.0.4"}
        assert "being trained by the job life-1" in perceiver(home, "submit", recipe, "--run", "life", code=2)
        assert "the token is not this cluster's" in perceiver(home, "jobs", code=2, RAY_AUTH_TOKEN="f" * 64)
        stopped = perceiver(home, "stop", "life")
        assert "job life-1 STOPPED" in stopped
        assert "checkpoint saved" in stopped and f": perceiver submit {recipe} --run life" in stopped
        step = json.loads((home / "runs/life/run.json").read_text())["step"]
        followed = perceiver(home, "submit", recipe, "--run", "life", f"train.epochs={step / 5 + 2}")
        assert f"resumed at step {step}" in followed
        assert "job life-2 SUCCEEDED" in followed
        assert [json.loads(line)["status"] for line in perceiver(home, "jobs", "--json").splitlines()] == [
            "STOPPED",
            "SUCCEEDED",
        ]
        perceiver(home, "status", "life-1", code=130)
        cluster = running_cluster()
        assert cluster is not None
        processes, folder = cluster.processes(), Path(cluster.folder)
    finally:
        down = perceiver(home, "cluster", "down")
    assert "processes" in down and not folder.exists()
    assert not [process for process in processes if process.is_running() and process.status() != "zombie"]
    facts = json.loads((home / "runs/life/run.json").read_text())
    assert facts["status"] == "finished" and facts["step"] == step + 10


def wait_for_tasks(home: Path) -> dict[str, set[str]]:
    """Wait until the run has a checkpoint; return the nodes of its workers (actors) and data tasks, by name."""
    while not list((home / "runs/life/checkpoints").glob("step-*/manifest.json")):
        (life,) = ask(home, "/api/jobs/")
        assert life["status"] in ("PENDING", "RUNNING"), perceiver(home, "logs", "life-1")
        time.sleep(POLL_S)
    address = {row["node_id"]: row["node_ip"] for row in rows(home, "nodes")}
    found: dict[str, set[str]] = {}
    tasks = rows(home, "tasks", "&filter_keys=type&filter_predicates=%3D&filter_values=NORMAL_TASK")
    actors = [{**row, "name": row["class_name"]} for row in rows(home, "actors")]
    for row in tasks + actors:
        if row.get("node_id") in address:
            found.setdefault(str(row["name"]), set()).add(address[row["node_id"]])
    return found


def rows(home: Path, what: str, more: str = "") -> list[dict[str, Any]]:
    """Return a list of Ray's state API."""
    return ask(home, f"/api/v0/{what}?limit=10000&detail=1{more}")["data"]["result"]["result"]


def ask(home: Path, path: str) -> Any:
    """Return a response of the dashboard; without Ray, which reads its token once per process."""
    cluster = running_cluster()
    assert cluster is not None
    token = (home / ".ray/auth_token").read_text().strip()
    answer = requests.get(cluster.dashboard + path, timeout=30, headers={"Authorization": f"Bearer {token}"})
    answer.raise_for_status()
    return answer.json()
