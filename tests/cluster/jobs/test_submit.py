"""The package of a job, and the checks before it is submitted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.jobs import package, submit
from cluster.jobs import paths as job_paths
from cluster.jobs.commands import Job
from cluster.jobs.config import Submission
from cluster.jobs.paths import tracking_note
from cluster.jobs.server import JobServer
from cluster.recipe import placement
from cluster.recipe.config import build_recipe
from cluster.recipe.file import apply_override
from cluster.recipe.placement import Node
from cluster.runtime.local_cluster import LocalCluster
from perceiver.config import UserError
from tests.cluster.recipes import write_recipe

pytestmark = pytest.mark.usefixtures("home")


def test_the_package_contains_our_sources_and_the_recipe_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("recipes/a.yaml", "data/big", "secret.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("name: a")
    target = tmp_path / "package"
    target.mkdir()
    package.build_package(target, ["recipes/a.yaml"])
    assert {path.name for path in target.iterdir()} == {"recipes"}
    sources = package.copy_sources(tmp_path / "sources")
    assert (sources / "perceiver/kernels/separable.cpp").is_file() and not list(sources.rglob("__pycache__"))


def test_a_job_imports_our_sources_and_keeps_files_of_the_same_names(tmp_path: Path) -> None:
    """As on a cluster: our sources come first on PYTHONPATH, the working directory is the current folder."""
    names = ["perceiver/__init__.py", "pipelines.py", "cluster.py", "tune/__init__.py"]
    mine = write_folder(tmp_path / "mine", *names)
    target = tmp_path / "package"
    target.mkdir()
    package.build_package(target, [], str(mine))
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*.py")) == sorted(names)
    sources = package.copy_sources(tmp_path / "sources")
    path = os.pathsep.join([str(sources.parent), str(target)])
    command = [sys.executable, "-P", "-m", "perceiver_train.module", "cluster.jobs.entrypoint", "--help"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--run" in done.stdout, done.stderr


def test_a_package_that_is_too_large_names_its_largest_files(tmp_path: Path) -> None:
    for name, size in (("small", 10), ("weights.bin", 3000), ("movie.mp4", 2000), ("b", 400)):
        (tmp_path / name).write_bytes(b"x" * size)
    with pytest.raises(UserError, match=r"largest: weights.bin .*, movie.mp4 .*, b "):
        package.check_size(tmp_path, limit=4000)


def test_dependencies_are_pinned_to_what_is_installed_here() -> None:
    lines = package.locked_requirements()
    assert all("==" in line and "+" not in line for line in lines)
    names = {line.split("==")[0] for line in lines}
    assert {"torch", "deepspeed", "mlflow", "pydantic", "s3fs"} <= names and not {"ray", "pytest"} & names


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"secrets": ["A=hunter2"]}, "--secret A"),
        ({"metadata_json": '{"api_token": "hunter2"}'}, "--metadata-json: api_token"),
        ({"runtime_env_json": '{"env_vars": {"AWS_SECRET_ACCESS_KEY": "hunter2"}}'}, "AWS_SECRET_ACCESS_KEY"),
        ({"runtime_env_json": "[]"}, "--runtime-env-json"),
        ({"runtime_env_json": '{"config":' + "[" * 100_000}, "^--runtime-env-json is not valid JSON"),
        ({"runtime_env_json": '{"env_vars": {}, "env_vars": {"A": "hunter2"}}'}, "^--runtime-env-json .*twice"),
        ({"runtime_env_json": '{"env_vars": {"CREDS": "hunter2"}}'}, "env-json: CREDS"),
        ({"runtime_env_json": '{"env_vars": {"WANDB_KEY": "hunter2"}}'}, "env-json: WANDB_KEY"),
        ({"metadata_json": '{"a":' * 100_000}, "^--metadata-json is not a JSON object"),
        ({"env": ["NOT_SET_ANYWHERE"]}, "--env NOT_SET_ANYWHERE"),
        ({"env": ["MY_TOKEN"]}, "^--env MY_TOKEN looks like a secret"),
        ({"runtime_env_json": '{"pip": ["--extra-index-url https://u:hunter2@h"]}'}, r"-json: pip\.packages\.0"),
        ({"runtime_env_json": '{"pip": "needs.txt"}'}, r"-json: pip\.packages\.0"),
        ({"runtime_env_json": '{"py_modules": ["https://u:hunter2@h/x.zip"]}'}, r"py_modules\.0"),
        ({"runtime_env_json": '{"working_dir": "https://u:hunter2@h/x.zip"}'}, "-json: working_dir = .*h/x.zip"),
        ({"working_dir": "s3://u:hunter2@h/x.zip"}, "^--working-dir = s3://.*h/x.zip"),
        ({"working_dir": ".", "runtime_env_json": '{"working_dir": "."}'}, "--working-dir and working_dir"),
        ({"runtime_env_json": '{"env_vars": {"A": 1}}'}, "^--runtime-env-json: .*Dict"),
        ({"runtime_env_json": '{"pip": 5}'}, "^--runtime-env-json: .*str or List"),
        ({"overrides": ["tracking.uri=https://u:hunter2@h", "tracking.uri=env:X"]}, r"override of tracking\.uri"),
    ],
)
def test_secrets_are_not_uploaded(
    options: dict[str, Any], line: str, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs.txt").write_text("--index-url https://u:hunter2@h\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_TOKEN", "hunter2")
    wanted = Submission(recipe="x.yaml", **options)
    with pytest.raises(UserError, match=line) as caught:
        submit.check_secrets(tree, wanted, submit.build_runtime_env(build_recipe(tree), wanted))
    assert "hunter2" not in str(caught.value)


def test_a_secret_in_the_recipe_is_refused_and_a_reference_is_needed_on_the_cluster(tree: dict[str, Any]) -> None:
    wanted = Submission(recipe="x.yaml", secrets=["OTHER"])
    tree["tracking"] = {"uri": "https://user:hunter2@mlflow"}
    with pytest.raises(UserError, match=r"tracking\.uri .*secret"):
        submit.check_secrets(tree, wanted, {})
    tree["tracking"] = {}
    tree["data"]["mixture"] = [{"url": "https://user:hunter2@h/d"}]
    with pytest.raises(UserError, match=r"data\.mixture\.0\.url .*secret"):
        submit.check_secrets(tree, wanted, {})
    tree["data"]["mixture"] = []
    tree["tracking"] = {"uri": "env:MLFLOW_URI", "tags": {"list": ["$IN_A_LIST"]}}
    tree["data"]["storage_options"] = {"secret": "$STORE_SECRET"}
    submit.check_secrets(tree, wanted, {})
    assert submit.needed(tree, wanted) == ["IN_A_LIST", "MLFLOW_URI", "OTHER", "STORE_SECRET"]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.yaml", "tracking: {uri: 'https://u:hunter2@h'}", "a.yaml: tracking.uri .*secret"),
        ("a.yaml", "x: 1\n# was https://u:hunter2@h", "a.yaml: line 2 .*secret"),
        ("a.json", '{"monitor": [{"api_key": "hunter2"}]}', "a.json: monitor.0.api_key .*secret"),
    ],
)
def test_a_secret_in_an_uploaded_file_is_refused_even_if_it_is_overridden(
    name: str, text: str, line: str, tmp_path: Path
) -> None:
    fine, bad = tmp_path / "fine.yaml", tmp_path / name
    fine.write_text("# Basic settings. Bearer of news\ntracking: {uri: env:X}\n")
    bad.write_text(text)
    with pytest.raises(UserError, match=line) as caught:
        submit.check_secret_files([str(fine), str(bad)])
    assert "hunter2" not in str(caught.value)


FAR = [Node("10.9.8.7", {"CPU": 8})]


def test_paths_that_other_machines_do_not_see_are_refused(tree: dict[str, Any]) -> None:
    tree["data"]["url"], tree["output"] = "s3://bucket/data", "/mnt/shared/runs"
    (note,) = submit.check_paths(build_recipe(tree), False, "http://head:8265")
    assert note == "note: output = /mnt/shared/runs must be the same storage on every node"
    tree["output"] = "runs"
    with pytest.raises(UserError, match="output = runs .*http://head"):
        list(submit.check_paths(build_recipe(tree), False, "http://head:8265"))
    assert not list(submit.check_paths(build_recipe(tree), True, "http://head:8265"))


@pytest.mark.parametrize(
    ("key", "value", "outcome"),
    [
        ("train.init_from", "runs/a", "refused"),
        ("train.init_from", "/mnt/a", "noted"),
        ("tracking.artifact_root", "artifacts", "refused"),
        ("tracking.uri", "sqlite:///x.db", "refused"),
        ("tracking.uri", "file:uri.txt", "refused"),
        ("deepspeed.config", "ds.json", "accepted"),
        ("deepspeed.config", "../out.json", "refused"),
        ("output", "file:///mnt/runs", "noted"),
    ],
)
def test_every_path_of_a_recipe_is_checked(
    key: str, value: str, outcome: str, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    for file in ("here/ds.json", "out.json"):
        (tmp_path / file).write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    tree["data"]["url"], tree["output"] = "s3://bucket/data", "s3://bucket/runs"
    apply_override(tree, f"{key}={value}")
    if outcome == "refused":
        with pytest.raises(UserError, match=f"{key} = {value} "):
            list(submit.check_paths(build_recipe(tree), False, "http://head:8265"))
    else:
        notes = list(submit.check_paths(build_recipe(tree), False, "http://head:8265"))
        assert [f"{key} = {value} " in note for note in notes] == [True] * (outcome == "noted")


def test_a_cluster_is_here_only_if_it_is_the_one_that_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a tunnel, nodes of another machine have loopback addresses, too."""
    nodes = [Node("127.0.0.2", {}), Node("127.0.0.3", {})]
    url = "http://127.0.0.1:8265"
    assert not submit.is_here(FAR, url) and not submit.is_here(nodes, url)
    described = [{"ip": node.name, "options": []} for node in nodes]
    local = LocalCluster("x", "127.0.0.2:6379", url, "/tmp/x", described)
    monkeypatch.setattr(job_paths, "running_cluster", lambda: local)
    assert submit.is_here(nodes, url) and submit.is_here(nodes, "http://localhost:8265")
    assert not submit.is_here(nodes, "http://127.0.0.1:9265") and not submit.is_here([*nodes, *FAR], url)


def test_a_store_on_the_disk_of_one_node_is_noted(tree: dict[str, Any]) -> None:
    tree["output"] = "s3://bucket/runs"
    assert "--secret MLFLOW_TRACKING_URI" in tracking_note(build_recipe(tree), False, ())
    assert not tracking_note(build_recipe(tree), False, ["MLFLOW_TRACKING_URI"])
    assert not tracking_note(build_recipe(tree), True, ())
    tree["tracking"] = {"uri": "env:X"}
    assert not tracking_note(build_recipe(tree), False, ())


# -- a folder of the user's --------------------------------------------------------------------------------------------


def write_folder(folder: Path, *names: str) -> Path:
    """Write small files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def test_a_folder_is_uploaded_without_ignored_and_secret_files(tmp_path: Path) -> None:
    mine = write_folder(
        tmp_path / "mine",
        "a.py",
        "big.bin",
        "sub/b.txt",
        "sub/c.log",
        ".env",
        "keys/server.pem",
        "id_rsa.pub",
        "data/x",
        "skip.me",
    )
    (mine / ".gitignore").write_text("*.bin\ncluster/\n*.yaml\n")
    (mine / "sub" / ".rayignore").write_text("*.log\n")
    target = tmp_path / "package"
    target.mkdir()
    recipe = write_folder(tmp_path, "r.yaml") / "r.yaml"
    left = package.build_package(target, [str(recipe)], str(mine), ["/skip.me"])
    assert left == [".env", "id_rsa.pub", "keys/server.pem"]
    there = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert there == {"a.py", "sub/b.txt", "r.yaml"}


def test_a_folder_is_measured_before_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = write_folder(tmp_path / "mine", "a", "b")
    (mine / "movie.mp4").write_bytes(b"x" * 5000)
    monkeypatch.setattr(package, "LIMIT_BYTES", 4000)
    (tmp_path / "package").mkdir()
    with pytest.raises(UserError, match="largest: movie.mp4"):
        package.build_package(tmp_path / "package", [], str(mine))
    assert not list((tmp_path / "package").iterdir())


def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    mine = write_folder(tmp_path / "mine", "a")
    (mine / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"mine/gone .*link.*\.rayignore"):
        package.travelling(mine)
    assert package.travelling(mine, ["gone"]) == ([mine / "a"], [])


@pytest.mark.parametrize(
    "name",
    [".ENV", ".envrc", ".env.local", "CA.PEM", ".pgpass", ".vault-token", ".dockercfg", ".databrickscfg", ".s3cfg"]
    + [".docker/config.json", ".gnupg/x", ".AWS/credentials", ".azure/x", ".config/gcloud/x.db", ".kube/config"]
    + ["kubeconfig", "credentials-prod.json", "secrets.yaml", "Secrets.yml", ".netrc", ".npmrc", ".pypirc", ".htpasswd"]
    + [".git-credentials", ".boto", "a.p12", "a.PFX", "a.jks", "a.kdbx", "id_rsa", "ID_ED25519", "id_github"],
)
def test_secret_files_are_found_in_any_case_and_through_links(name: str, tmp_path: Path) -> None:
    mine = write_folder(tmp_path / "mine", "a.py", "id_map.json", "id_tools/b.py", "config/gcloud.py", f"sub/{name}")
    (mine / "harmless.txt").symlink_to(mine / "sub" / name)
    (mine / "visible").symlink_to((mine / "sub" / name).parent)
    kept, left = package.travelling(mine)
    names = {str(file.relative_to(mine)) for file in kept}
    assert names == {"a.py", "id_map.json", "id_tools/b.py", "config/gcloud.py"}
    assert "harmless.txt" in left and any(f"sub/{name}".startswith(place) for place in left if place != "harmless.txt")


def test_a_folder_is_uploaded_by_its_own_name_and_by_that_of_a_link(tmp_path: Path) -> None:
    mine = write_folder(tmp_path / "mine", "b/x.py", "b/c/y.py")
    (mine / "a").symlink_to("b")
    (mine / "b/c/loop").symlink_to("../../b")
    kept, left = package.travelling(mine)
    assert {str(file.relative_to(mine)) for file in kept} == {"a/x.py", "a/c/y.py", "b/x.py", "b/c/y.py"} and not left


def test_links_that_multiply_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MOST_FOLDERS", 100)
    mine = write_folder(tmp_path / "mine", *(f"d{number}/x" for number in range(9)))
    for number in range(8):
        for name in "ab":
            (mine / f"d{number}/{name}").symlink_to(f"../d{number + 1}")
    with pytest.raises(UserError, match="more than 100 folders"):
        package.travelling(mine)


def test_links_that_leave_the_folder_are_left_out_and_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "other", "x/deep.txt", "y.txt")
    mine = write_folder(tmp_path / "mine", "a.py", "sub/b.py", ".git/config")
    (mine / "out").symlink_to(tmp_path / "other")
    (mine / "sub/y").symlink_to("../../other/y.txt")
    (mine / "inside").symlink_to("a.py")
    (mine / "repository").symlink_to(".git")
    kept, left = package.travelling(mine)
    assert {str(file.relative_to(mine)) for file in kept} == {"a.py", "sub/b.py", "inside"}
    assert left == ["out", "repository", "sub/y"]


@pytest.mark.parametrize("name", [".ssh", ".AWS", ".config/gcloud/configurations"])
def test_a_folder_of_secrets_is_refused(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / name, "config")
    (tmp_path / "link").symlink_to(tmp_path / name)
    for folder in (tmp_path / name, tmp_path / "link"):
        with pytest.raises(UserError, match="--working-dir .* may contain secrets"):
            package.travelling(folder)


# -- names, the driver's resources, what is submitted ------------------------------------------------------------------


def test_names_in_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job("a-1", "STOPPED", run="a", output="runs"), Job("b-1", "RUNNING", run="b", output="runs")]
    monkeypatch.setattr(submit, "list_jobs", lambda server: jobs)
    server: Any = None
    assert submit.free_name(server, Submission(recipe="x"), "a", "runs") == "a-2"
    with pytest.raises(UserError, match=r"run 'b' .*b-1 \(RUNNING\)"):
        submit.free_name(server, Submission(recipe="x"), "b", "runs")
    with pytest.raises(UserError, match="--submission-id a-1 .*STOPPED"):
        submit.free_name(server, Submission(recipe="x", submission_id="a-1"), "a", "runs")


ONE = [Node("a", {"CPU": 2})]


@pytest.mark.parametrize(
    ("nodes", "options", "line"),
    [
        (ONE, {"entrypoint_num_cpus": 0.5}, None),
        (ONE, {"entrypoint_num_cpus": 2}, "2 CPU .*data.cpus_per_task = 0.25"),
        (ONE, {"entrypoint_num_cpus": 3}, "3 CPU .*none of the 1 nodes"),
        (ONE, {"entrypoint_num_gpus": 1}, "1 GPU"),
        (ONE, {"entrypoint_resources": {"storage": 1}}, "1 storage"),
        ([*ONE, Node("b", {"CPU": 2})], {"entrypoint_num_cpus": 2}, None),
    ],
)
def test_resources_of_the_driver_are_not_available_to_the_workers(
    nodes: list[Node], options: dict[str, Any], line: str | None, tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["cluster"]["workers"] = 1
    tree["data"]["tasks"] = 1
    wanted = Submission(recipe=str(write_recipe(tmp_path, tree)), **options)
    if line is None:
        submit.check_entrypoint(nodes, submit.training(wanted), wanted)
        return
    with pytest.raises(UserError, match=line):
        submit.check_entrypoint(nodes, submit.training(wanted), wanted)


def test_the_driver_subtracts_its_own_resources_from_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"NodeID": i, "NodeManagerAddress": i, "Resources": {"CPU": 2.0}, "Alive": True} for i in ("a", "b")]
    monkeypatch.setattr(ray, "nodes", lambda: rows)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "b"))
    assert [node.resources["CPU"] for node in placement.connected_nodes()] == [2, 2]
    monkeypatch.setenv(placement.RESERVED, '{"CPU": 1.5}')
    assert [node.resources["CPU"] for node in placement.connected_nodes()] == [2, 0.5]


class FakeClient:
    """A stand-in for Ray's job client that records what is submitted."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.files: set[str] = set()

    def list_jobs(self) -> list[Any]:
        return []

    def submit_job(self, **given: Any) -> str:
        self.given = given
        folder, (sources,) = Path(given["runtime_env"]["working_dir"]), map(Path, given["runtime_env"]["py_modules"])
        self.files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        self.files |= {str(path.relative_to(sources.parent)) for path in sources.rglob("entrypoint.py")}
        return given["submission_id"]


def test_what_is_submitted(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag of `ray job submit` reaches its client, our metadata last; the folder of the JSON is packed."""
    mine = write_folder(tmp_path / "mine", "helper.py", ".env")
    tree["data"]["url"], tree["output"] = "s3://bucket/data", "s3://bucket/runs"
    monkeypatch.chdir(tmp_path)
    wanted = Submission(
        recipe=write_recipe(tmp_path, tree).name,
        submission_id="mine-7",
        runtime_env_json=json.dumps({"working_dir": str(mine), "env_vars": {"A": "1"}, "excludes": ["/none"]}),
        metadata_json='{"team": "vision", "perceiver.run": "forged"}',
        entrypoint_num_cpus=1,
        entrypoint_num_gpus=0,
        entrypoint_resources={"slot": 2},
    )
    client, said = FakeClient(), []
    server = JobServer("https://u:hunter2@head", client)
    monkeypatch.setattr(server, "nodes", lambda: [Node("10.9.8.7", {"CPU": 8, "slot": 2})])
    assert submit.submit(server, wanted, submit.training(wanted), said.append) == "mine-7"
    given = client.given
    assert given["metadata"]["team"] == "vision" and given["metadata"]["perceiver.run"] == "small"
    assert given["entrypoint_num_cpus"] == 1 and given["entrypoint_resources"] == {"slot": 2}
    assert '--reserved \'{"CPU": 1, "slot": 2}\'' in given["entrypoint"]
    assert given["runtime_env"]["env_vars"]["A"] == "1" and "excludes" not in given["runtime_env"]
    assert client.files == {"helper.py", "small.yaml", "perceiver_train/cluster/jobs/entrypoint.py"}
    assert [line.split(":")[1].split()[0] for line in said] == ["no", ".env"]


def test_only_keys_that_are_paths_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("private.json", "private.yaml", "ds.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    tree = {
        "name": "private.yaml",
        "tracking": {"tags": {"note": "private.json"}, "experiment": "private.yaml"},
        "data": {"url": "private.json", "storage_options": {"config": "private.json"}},
        "deepspeed": {"config": "ds.json"},
    }
    assert package.named_files(tree) == ["ds.json"]
    assert package.named_files({**tree, "deepspeed": {"config": {"file": "private.json"}}}) == []


@pytest.mark.parametrize("file", ["../out.json", "sub/../../out.json", "link.json", "away/out.json", "{here}/ds.json"])
def test_a_file_outside_the_current_folder_is_not_uploaded(
    file: str, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = write_folder(tmp_path / "here", "sub/x")
    for name in ("out.json", "here/ds.json"):
        (tmp_path / name).write_text("{}")
    (here / "link.json").symlink_to(tmp_path / "out.json")
    (here / "away").symlink_to(tmp_path)
    monkeypatch.chdir(here)
    file = file.format(here=here)
    tree["data"]["url"], tree["output"], tree["deepspeed"] = "s3://b/data", "s3://b/runs", {"config": file}
    assert package.named_files(tree) == []
    if not file.startswith("/"):
        with pytest.raises(UserError, match=f"deepspeed.config = {file} is a path on this machine"):
            list(submit.check_paths(build_recipe(tree), False, "http://head:8265"))


@pytest.mark.parametrize("text", ["root:x:0:0", "[1]", "3", "[" * 100_000, '{"a": ' * 300 + "1" + "}" * 300])
def test_a_named_file_that_is_not_a_json_object_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^deepspeed.config = ds\.json .*JSON") as caught:
        package.named_files({"deepspeed": {"config": "ds.json"}})
    assert "root" not in str(caught.value) and "\n" not in str(caught.value)
