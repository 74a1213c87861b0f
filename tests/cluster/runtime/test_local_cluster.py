"""Placement of workers and data tasks on nodes, and a local cluster of several nodes."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from cluster.recipe.config import build_recipe
from cluster.recipe.placement import DataNeed, Node, check_task_memory, place
from cluster.recipe.preflight import data_need
from cluster.recipe.resources import ClusterConfig
from cluster.runtime import local_cluster
from cluster.runtime.local import writing_processes
from cluster.runtime.local_cluster import LocalCluster, NodeGroup, NodesConfig, equivalent, read_nodes
from perceiver.config import UserError
from tests.cluster.recipes import small_tree

ROOT = Path(__file__).parents[3]
TRAIN, FEED = {"role": "train"}, {"role": "data"}
SOME = DataNeed(cpus=1.5, cpus_per_task=0.25)


def node(name: str, cpus: float, gpus: float = 0, **labels: str) -> Node:
    return Node(name, {"CPU": cpus, "GPU": gpus}, labels)


def test_a_worker_reserves_one_cpu_if_there_is_room() -> None:
    assert place(ClusterConfig(workers=2), [node("a", 8), node("b", 8)], SOME) == 1.0


def test_the_inline_executor_needs_no_cpus_for_data_tasks(tmp_path: Path) -> None:
    data = {"url": str(tmp_path), "executor": "inline", "cpus_per_task": 9, "tasks": 50}
    need = data_need(build_recipe({**small_tree(tmp_path, str(tmp_path)), "data": data}))
    assert need.tasks == 0 and place(ClusterConfig(workers=4), [node("a", 4)], need) == 1


def test_a_share_fits_each_node_and_not_only_their_sum() -> None:
    """Three nodes of one CPU: two workers of 0.75 leave 1.5 for data; a share of the sum (2.25) would fit nowhere."""
    share = place(ClusterConfig(workers=2), [node("a", 1), node("b", 1), node("c", 1)], SOME)
    assert share == pytest.approx(0.75)


def test_separate_data_nodes_leave_the_training_nodes_to_the_workers() -> None:
    there = [node("a", 1, role="train"), node("b", 1, role="train"), node("c", 2, role="data")]
    config = ClusterConfig(workers=2, worker_labels=TRAIN, cpus_per_worker=1)
    assert place(config, there, DataNeed(1.5, 0.25, FEED)) == 1
    with pytest.raises(UserError, match=r"1\.5 CPUs.*cluster\.workers = 2"):
        place(config, there[:2], DataNeed(1.5, 0.25))


@pytest.mark.parametrize(
    ("config", "data", "line"),
    [
        (ClusterConfig(workers=4, gpus_per_worker=1), SOME, r"cluster.workers = 4 .*need 4 GPU.* 2 nodes with 2 GPU"),
        (ClusterConfig(workers=1, cpus_per_worker=16), SOME, r"lower cluster.cpus_per_worker"),
        (ClusterConfig(workers=1, worker_resources={"slot": 1}), SOME, r"cluster.worker_resources.slot"),
        (ClusterConfig(worker_labels=TRAIN), SOME, r"cluster.worker_labels .*role=train.*: a none; b none"),
        (ClusterConfig(), DataNeed(1.5, 0.25, FEED), r"data.task_labels .*role=data"),
        (ClusterConfig(), DataNeed(9, 9), r"data.cpus_per_task = 9.* 4 CPUs"),
        (ClusterConfig(), DataNeed(40, 0.25), r"40 CPUs"),
    ],
)
def test_what_does_not_fit_is_named(config: ClusterConfig, data: DataNeed, line: str) -> None:
    with pytest.raises(UserError, match=line):
        place(config, [node("a", 4, 1), node("b", 4, 1)], data)


def test_data_tasks_that_reserve_more_memory_than_there_is_are_refused() -> None:
    nodes = [Node("a", {"CPU": 4, "memory": 2e9}, FEED), Node("b", {"CPU": 4, "memory": 2e9}, FEED)]
    check_task_memory(nodes, DataNeed(1.5, 0.25, FEED, memory_per_task=600_000_000))
    check_task_memory(nodes, SOME)
    with pytest.raises(UserError, match=r"6 data tasks.*data.task_memory = 900000000 .*4\.0 GB.*2 nodes.*room for 4"):
        check_task_memory(nodes, DataNeed(1.5, 0.25, FEED, memory_per_task=900_000_000))


def test_an_autoscaling_cluster_may_lack_resources() -> None:
    config = ClusterConfig(workers=64, gpus_per_worker=1, autoscaling=True)
    assert place(config, [node("head", 0)], DataNeed(96, 0.25)) == 1.0


def test_groups_become_nodes_with_their_resources_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "nodes.yaml"
    path.write_text(
        "nodes:\n- {cpus: 0}\n- {count: 2, cpus: 1, gpus: 1, resources: {slot: 1}, labels: {role: train}}\n"
    )
    planned = local_cluster.plan_cluster(read_nodes(path))
    assert [n["ip"] for n in planned.nodes] == ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    assert planned.nodes[2]["options"][-3:] == ["--num-gpus=1", '--resources={"slot": 1.0}', "--labels=role=train"]
    lines = list(equivalent(planned))
    assert len(lines) == 3 and "--num-gpus=1" in lines[1] and "object-store" not in "".join(lines)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nodes: []", "nodes"),
        ("node: 3", "node"),
        ("nodes: [{cpus: x}]", "cpus"),
        ("dashboard_port: 70000", "dashboard_port = 70000"),
    ],
)
def test_a_mistake_in_a_file_of_nodes_names_the_key(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "nodes.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=line):
        read_nodes(path)


def test_another_port_replaces_one_that_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        planned = local_cluster.plan_cluster(NodesConfig(nodes=(NodeGroup(),), dashboard_port=port))
        assert not planned.dashboard.endswith(f":{port}")


def test_there_is_no_cluster_without_a_live_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_cluster.running_cluster() is None and local_cluster.down() == 0
    state = local_cluster.state_file()
    state.parent.mkdir()
    gone = {"name": "gone", "address": "127.0.0.2:1", "dashboard": "", "folder": "/nowhere/perceiver-gone"}
    state.write_text(json.dumps({**gone, "nodes": [{"ip": "127.0.0.2", "options": []}]}))
    assert LocalCluster("gone", "", "", "", []).processes() == []
    assert local_cluster.running_cluster() is None and local_cluster.down() == 0 and not state.exists()


@pytest.mark.parametrize(
    "change", [{"nodes": []}, {"nodes": [{}]}, {"nodes": 5}, {"folder": None}, {"folder": "FOREIGN"}, {"name": 2}]
)
def test_a_damaged_state_file_counts_as_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Its folder is deleted with the cluster, so it must be one that the cluster has made."""
    monkeypatch.setenv("PERCEIVER_CACHE", str(tmp_path))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    tree: dict[str, Any] = {"name": "a", "address": "", "dashboard": "", "folder": "/nowhere/perceiver-a"}
    tree["nodes"] = [{"ip": "127.0.0.2", "options": []}]
    tree |= {key: str(foreign) if value == "FOREIGN" else value for key, value in change.items()}
    local_cluster.state_file().write_text(json.dumps(tree))
    assert local_cluster.running_cluster() is None and local_cluster.down() == 0 and foreign.exists()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Remove cluster and token; let the start of a node succeed without a process, except for 127.0.0.3."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))

    def came_up(cluster: LocalCluster, node: dict[str, Any], log: Path) -> bool:
        log.write_text("RuntimeError: no room\n")
        return node["ip"] != "127.0.0.3"

    monkeypatch.setattr(local_cluster, "run_start", came_up)
    return tmp_path


def nodes_config(count: int, cpus: int = 1) -> NodesConfig:
    return NodesConfig(nodes=(NodeGroup(count=count, cpus=cpus),))


def test_a_failed_head_leaves_nothing_running_for_the_next_attempt(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store left by the first attempt would make the second one fail, and so would a port in use."""
    stores: list[subprocess.Popen[bytes]] = []
    taken: list[socket.socket] = []

    def came_up(cluster: LocalCluster, node: dict[str, Any], log: Path) -> bool:
        assert all(store.poll() is not None for store in stores), "the store of the previous attempt is still running"
        log.write_text("ValueError: it is already occupied\n")
        taken.append(socket.create_server(("127.0.0.1", int(cluster.dashboard.rpartition(":")[2]))))
        store = subprocess.Popen(
            ["sh", "-c", "echo up; exec sleep 60"],
            env={**os.environ, local_cluster.MARK: cluster.name},
            stdout=subprocess.PIPE,
        )
        assert store.stdout is not None and store.stdout.readline() == b"up\n", "now its environment is visible"
        stores.append(store)
        return len(stores) == 2

    monkeypatch.setattr(local_cluster, "run_start", came_up)
    try:
        cluster = local_cluster.up(nodes_config(1), lambda line: None)
        assert len(stores) == 2 and stores[1].poll() is None
        assert LocalCluster(**json.loads(local_cluster.state_file().read_text())) == cluster
        local_cluster.down()
        stores.clear()
        monkeypatch.setattr(local_cluster, "run_start", lambda *asked: came_up(*asked) and False)
        with pytest.raises(UserError, match=r"127\.0\.0\.2.*ValueError: it is"):
            local_cluster.up(nodes_config(1), lambda line: None)
        assert len(stores) == local_cluster.TRIES and not local_cluster.state_file().exists()
    finally:
        for store in stores:
            store.kill()
            store.wait()
        for port in taken:
            port.close()


@pytest.fixture
def running(here: Path, monkeypatch: pytest.MonkeyPatch) -> LocalCluster:
    """Return a cluster of four nodes, of which 127.0.0.3 and 127.0.0.5 have died."""
    cluster = local_cluster.plan_cluster(nodes_config(4))
    monkeypatch.setattr(local_cluster, "running_cluster", lambda: cluster)
    monkeypatch.setattr(LocalCluster, "raylets", lambda self: {"127.0.0.2": 1, "127.0.0.4": 2})
    monkeypatch.setattr(local_cluster, "down", lambda: pytest.fail("the live nodes were stopped"))
    return cluster


def test_a_new_cluster_is_stopped_if_a_node_fails(here: Path) -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.3.*RuntimeError: no room"):
        local_cluster.up(nodes_config(3), lambda line: None)
    assert not local_cluster.state_file().exists() and not list(here.glob("perceiver-*"))


def test_a_dead_node_that_does_not_restart_leaves_the_others_alone(running: LocalCluster) -> None:
    said: list[str] = []
    with pytest.raises(UserError, match=r"127\.0\.0\.3 \(RuntimeError: no room\).* 3 "):
        local_cluster.up(None, said.append)
    assert [line.split(" (")[0] for line in said] == ["node 127.0.0.5 is up"]


@pytest.mark.parametrize("other", [nodes_config(5), nodes_config(4, cpus=2), NodesConfig()])
def test_other_nodes_than_the_running_ones_are_refused(running: LocalCluster, other: NodesConfig) -> None:
    with pytest.raises(UserError, match=f"{running.name} .*4 nodes .*wanted {sum(g.count for g in other.nodes)}"):
        local_cluster.up(other, lambda line: pytest.fail(line))
    with pytest.raises(UserError, match="perceiver cluster down"):
        local_cluster.up(other)


def test_starting_the_running_nodes_again_returns_the_same_cluster(
    running: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_cluster, "run_start", lambda *_: True)
    assert local_cluster.up(nodes_config(4), lambda line: None) is running


@pytest.mark.parametrize("mode", ["disabled", "token", None])
def test_a_token_is_created_whatever_the_authentication_mode_is(
    here: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    if mode is None:
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    else:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    cluster = local_cluster.up(nodes_config(1), lambda line: None)
    token = here / "token"
    assert len(token.read_text()) == 64 and token.stat().st_mode & 0o777 == 0o600
    assert local_cluster.node_environment(cluster)["RAY_AUTH_MODE"] == "token"


def test_the_recipe_of_mixed_nodes_gives_the_documented_options() -> None:
    head, first, second, data = local_cluster.plan_cluster(read_nodes(ROOT / "recipes/cluster/mixed.yaml")).nodes
    assert "--num-cpus=0" in head["options"] and "--labels=role=data" in data["options"]
    assert {"--num-gpus=1", "--labels=role=train"} < set(first["options"]) and first["options"] == second["options"]
    assert "--num-gpus" not in str(head["options"] + data["options"])


def test_processes_are_found_by_the_files_that_they_write(tmp_path: Path) -> None:
    """A process that only reads a log is not terminated."""
    (tmp_path / "log").touch()
    code = "import sys; file = open(sys.argv[1], sys.argv[2]); print(flush=True); input()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "log", mode], **pipes) for mode in "ra"]
    try:
        for each in started:
            assert each.stdout and each.stdout.readline()
        assert [each.pid for each in writing_processes(str(tmp_path))] == [started[1].pid]
        assert writing_processes(str(tmp_path / "l")) == []
    finally:
        for each in started:
            each.communicate()
