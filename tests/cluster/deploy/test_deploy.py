"""The files that start real clusters are valid by the schemas of their readers."""

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, example, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from jinja2 import DictLoader
from pydantic import ValidationError

from cluster.deploy.render import (
    KINDS,
    RecipeFile,
    environment,
    in_comment,
    in_yaml,
    read_recipe_file,
    render,
    write,
    yaml_text,
)
from cluster.deploy.settings import GcsFaultTolerance, Machine, Settings, read_settings
from cluster.jobs import entrypoint as job
from cluster.recipe.config import load_recipe
from cluster.run.metrics import FIGURES
from perceiver.config import UserError
from tests.cluster.deploy.api_types import Compose, check_kubernetes

ROOT = Path(__file__).parents[3]
RECIPE = str(ROOT / "recipes/train/quickstart.yaml")
SHARED = ("data.url=s3://bucket/digits", "output=s3://bucket/runs")
MORE = ("cluster.workers=16", "cluster.gpus_per_worker=1", "train.global_batch=128", "data.augment={shift: 1}")


def files(kind: str, source: RecipeFile, settings: Settings, say: Callable[[str], None] = print) -> dict[str, str]:
    return render(kind, source, settings, "deploy", say)


@pytest.fixture
def source() -> RecipeFile:
    return read_recipe_file(RECIPE, [*SHARED, *MORE])


@pytest.fixture
def settings() -> Settings:
    return read_settings(ROOT / "recipes/cluster/gpu.yaml")


@pytest.mark.parametrize("name", ["gpu.yaml", "cpu.yaml"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_renders_for_the_shipped_machines(kind: str, name: str, tmp_path: Path) -> None:
    machines = read_settings(ROOT / "recipes/cluster" / name)
    paths = write(files(kind, read_recipe_file(RECIPE, SHARED), machines), str(tmp_path))
    assert [path.name for path in paths] == list(KINDS[kind])
    for path in paths:
        if path.suffix == ".yaml":
            assert all(yaml.safe_load_all(path.read_text()))


def check_cluster_spec(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token", "secretName": "perceiver-token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = spec["workerGroupSpecs"]
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in [spec["headGroupSpec"], *groups]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert {source["secretRef"]["name"] for source in container["envFrom"]} == {
            "perceiver-storage",
            "perceiver-mlflow",
        }
        named = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == named
        shared = next(volume for volume in pod["volumes"] if volume["name"] == "shared-memory")
        assert shared["emptyDir"]["medium"] == "Memory" and re.fullmatch(r"\d+Gi", shared["emptyDir"]["sizeLimit"])


def test_the_kuberay_files_follow_the_apis_of_kuberay_and_kubernetes(source: RecipeFile, settings: Settings) -> None:
    selecting = settings.model_copy(update={"node_selector": {"zone": "a"}})
    rendered = files("kuberay", source, selecting)
    cluster = yaml.safe_load(rendered["raycluster.yaml"])
    recipe_map, job_ = yaml.safe_load_all(rendered["rayjob.yaml"])
    for document in (cluster, recipe_map, job_):
        check_kubernetes(document)
    check_cluster_spec(cluster["spec"])
    check_cluster_spec(job_["spec"]["rayClusterSpec"])
    train, data = cluster["spec"]["workerGroupSpecs"]
    assert train["replicas"] == 2 and train["labels"] == {"role": "train"} and data["labels"] == {"role": "data"}
    container = train["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "nvidia.com/gpu" not in data["template"]["spec"]["containers"][0]["resources"]["limits"]
    drain = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert "ray drain-node" in drain and subprocess.run(["bash", "-n", "-c", drain], check=False).returncode == 0
    assert train["template"]["spec"]["terminationGracePeriodSeconds"] > settings.drain_s
    assert yaml.safe_load(recipe_map["data"]["quickstart.yaml"])["name"] == "quickstart"
    mounted = {
        v["configMap"]["name"]
        for v in job_["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        if "configMap" in v
    }
    assert mounted == {recipe_map["metadata"]["name"]}


TOLERANCE = {
    "redis_address": "rediss://redis.db:6379",
    "secret_name": "redis-login",
    "login_entry": "word",
    "external_storage_namespace": "team-a",
}


def test_a_lost_head_reads_the_state_of_its_cluster_from_redis(source: RecipeFile, settings: Settings) -> None:
    """The driver has a pod of its own; a retry of a RayJob is a new cluster, without the old one's state."""
    tolerant = settings.model_copy(update={"gcs_fault_tolerance": GcsFaultTolerance.model_validate(TOLERANCE)})
    rendered = files("kuberay", source, tolerant)
    cluster, job_ = (list(yaml.safe_load_all(rendered[name]))[-1] for name in ("raycluster.yaml", "rayjob.yaml"))
    for document in (cluster, job_):
        check_kubernetes(document)
    secret = {"valueFrom": {"secretKeyRef": {"name": "redis-login", "key": "word"}}}
    options = {"redisAddress": "rediss://redis.db:6379", "redisPassword": secret}
    assert cluster["spec"]["gcsFaultToleranceOptions"] == {**options, "externalStorageNamespace": "team-a"}
    assert job_["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"] == options
    wanted = json.loads(job_["spec"]["entrypointResources"])
    for spec in (cluster["spec"], job_["spec"]["rayClusterSpec"]):
        check_cluster_spec(spec)
        (driver,) = (group for group in spec["workerGroupSpecs"] if "resources" in group)
        offered = {name: float(amount) for name, amount in driver["resources"].items()}
        assert offered.pop("CPU") == 0 and offered == wanted, "no worker or data task fits there"
    (words,) = (words for words in commands(rendered) if "perceiver" in words)
    assert json.loads(words[words.index("--entrypoint-resources") + 1]) == wanted
    assert "secret generic redis-login --from-literal=word=..." in rendered["raycluster.yaml"]
    assert "Redis" not in "".join(files("kuberay", source, settings).values()), "only if it is asked for"


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("redis_address", "redis", "HOST:PORT"),
        ("redis_address", "redis:70000", "HOST:PORT"),
        ("redis_address", "redis://me:hunter2hunter2@redis:6379", r"\*\*\*@redis:6379.*secret_name"),
        ("secret_name", "Hunter2!", "a Kubernetes name"),
        ("redis_password", "hunter2hunter2", "unknown key"),
        ("login_entry", "", "login_entry"),
        ("external_storage_namespace", "a/b", "a/b"),
    ],
)
def test_bad_settings_of_that_redis_are_refused(key: str, value: str, shown: str, tmp_path: Path) -> None:
    machines = tmp_path / "machines.yaml"
    tree = {"train": {"cpus": 4, "memory_gb": 8}, "gcs_fault_tolerance": {**TOLERANCE, key: value}}
    machines.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=rf"gcs_fault_tolerance\.{key}|unknown key") as refused:
        read_settings(machines)
    assert re.search(shown, str(refused.value)) and "hunter2" not in str(refused.value).lower()


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("spec", "rayversion", "2.60.0"),
        ("spec.authOptions", "mode", "none"),
        ("spec.workerGroupSpecs.0", "minReplicas", "1"),
        ("spec.workerGroupSpecs.0", "minReplicas", None),
        ("spec.workerGroupSpecs.0.template.spec", "gracePeriod", 30),
        ("spec.headGroupSpec.template.spec.containers.0", "name", None),
        ("spec.headGroupSpec.template.spec.containers.0.ports.0", "containerPort", "6379"),
        ("spec.headGroupSpec.template.spec.containers.0.resources.limits", "cpu", 4),
        ("spec.headGroupSpec.template.spec.containers.0", "working_dir", "/"),
    ],
)
def test_violations_of_those_apis_are_found(
    source: RecipeFile, settings: Settings, place: str, key: str, value: object
) -> None:
    """`check_kubernetes` refuses a wrong name, a wrong type and a missing field at any depth."""
    document = yaml.safe_load(files("kuberay", source, settings)["raycluster.yaml"])
    node: Any = document
    for part in place.split("."):
        node = node[int(part) if part.isdigit() else part]
    node[key] = value
    if value is None:
        del node[key]
    with pytest.raises((ValidationError, AssertionError)):
        check_kubernetes(document)


def commands(rendered: dict[str, str]) -> list[list[str]]:
    """Return the words of each training command in the files."""
    lines = [line.lstrip("# ") for text in rendered.values() for line in text.splitlines()]
    shown = [line for line in lines if "perceiver submit" in line]
    if "train.sbatch" in rendered:
        shown += [line.removesuffix(" &") for line in lines if line.startswith("python -P -m perceiver_train.module")]
    if "rayjob.yaml" in rendered:
        shown += [list(yaml.safe_load_all(rendered["rayjob.yaml"]))[1]["spec"]["entrypoint"]]
    return [shlex.split(line) for line in shown]


def applied(overrides: Sequence[str]) -> Any:
    recipe = load_recipe(RECIPE, overrides).model_dump(mode="json")
    recipe["cluster"] |= {"autoscaling": False, "worker_labels": {}}
    recipe["data"]["task_labels"] = {}
    return recipe


@pytest.mark.parametrize(("kind", "count"), [("kuberay", 2), ("autoscaler-aws", 1), ("slurm", 1), ("compose", 1)])
def test_every_command_trains_the_recipe_that_the_files_were_rendered_for(
    source: RecipeFile, settings: Settings, kind: str, count: int
) -> None:
    found = commands(files(kind, source, settings))
    assert len(found) == count
    for words in found:
        words = words[words.index("python" if "python" in words else "perceiver") :]
        if words[:2] == ["perceiver", "submit"]:
            file, overrides = words[2], words[3 : words.index("--address")]
            assert words[-2:] == ["--address", "http://127.0.0.1:8265"]
        else:
            assert words[:5] == ["python", "-P", "-m", "perceiver_train.module", "cluster.jobs.entrypoint"]
            given = job.arguments(words[5:])
            assert (given.run, given.output, given.verb) == ("quickstart", "s3://bucket/runs", "train")
            file, overrides = given.file, given.overrides
        assert file == ("/etc/perceiver/quickstart.yaml" if "python" in words and kind == "kuberay" else RECIPE)
        assert applied(overrides) == applied([*SHARED, *MORE])
        placed = {"cluster.worker_labels.role=train", "data.task_labels.role=data", "cluster.autoscaling=true"}
        assert placed.isdisjoint(overrides) if kind in ("slurm", "compose") else placed <= set(overrides)


@pytest.mark.parametrize("kind", ["kuberay", "slurm"])
def test_the_command_of_a_job_names_the_required_variables(kind: str, settings: Settings) -> None:
    named = ["tracking.uri=env:STORE", "data.storage_options.secret=$KEY"]
    rendered = files(kind, read_recipe_file(RECIPE, [*SHARED, *named]), settings)
    (words,) = (words for words in commands(rendered) if "python" in words)
    given = job.arguments(words[5:])
    assert given.needs == "KEY,STORE" and given.overrides[2:4] == named


def test_the_contents_of_a_deepspeed_file_are_sent_to_pods(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    source = read_recipe_file(RECIPE, [*SHARED, "deepspeed.config=ds.json"])
    (words,) = (words for words in commands(files("kuberay", source, settings)) if "python" in words)
    config = load_recipe(RECIPE, job.arguments(words[5:]).overrides).deepspeed.config
    assert config == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("kind", ["kuberay", "autoscaler-aws", "autoscaler-gcp"])
def test_local_folders_are_refused_for_remote_clusters(kind: str, settings: Settings) -> None:
    for overrides, key in ((SHARED[1:], "data.url"), (SHARED[:1], "output")):
        with pytest.raises(UserError, match=rf"{key} = .*\.yaml"):
            files(kind, read_recipe_file(RECIPE, overrides), settings)
    said: list[str] = []
    files(kind, read_recipe_file(RECIPE, ["data.url=/mnt/digits", "output=/mnt/runs"]), settings, said.append)
    assert len(said) == 2 and "data.url = /mnt/digits " in said[0]


def test_compose_moves_local_paths_to_its_store(settings: Settings) -> None:
    (words,) = commands(files("compose", read_recipe_file(RECIPE, ["output=s3://other/runs"]), settings))
    assert "data.url=s3://perceiver/data" in words and "output=s3://perceiver/runs" not in words


def test_a_secret_value_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="storage_options.secret"):
        read_recipe_file(RECIPE, ["data.storage_options.secret=hunter2hunter2"])
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(Path(RECIPE).read_text().replace("url: data/digits", "url: s3://me:hunter2hunter2@host/digits"))
    machines = tmp_path / "machines.yaml"
    machines.write_text("train: {cpus: 4, memory_gb: 8}\nslurm: {setup: export HF_TOKEN=hunter2hunter2}\n")
    with pytest.raises(UserError, match=r"machines\.yaml: slurm\.setup .*secret"):
        read_settings(machines)
    with pytest.raises(UserError, match=r"mine\.yaml: data\.url .*secret"):
        files("kuberay", read_recipe_file(str(recipe), SHARED), settings)


@pytest.mark.parametrize("kind", ["autoscaler-aws", "autoscaler-gcp"])
def test_the_autoscaler_files_follow_rays_schema(kind: str, source: RecipeFile, settings: Settings) -> None:
    schema = json.loads((resources.files("ray") / "autoscaler" / "ray-schema.json").read_text())
    text = files(kind, source, settings)["cluster.yaml"]
    config = yaml.safe_load(text)
    jsonschema.validate(config, schema)
    assert "push it to a registry" in text and "as `image:` into the file" in text
    types = config["available_node_types"]
    assert types["train-spot"]["priority"] > types["train"]["priority"]
    assert types["train-spot"]["labels"] == types["train"]["labels"] == {"role": "train"}
    spot, sure = str(types["train-spot"]["node_config"]), str(types["train"]["node_config"])
    assert ("spot" in spot or "preemptible" in spot) and "spot" not in sure and "preemptible" not in sure
    assert types["data"]["resources"] == {"CPU": 32} and "token" in str(config["file_mounts"])
    with pytest.raises(jsonschema.ValidationError, match="mistake"):
        jsonschema.validate({**config, "mistake": 1}, schema)


def test_slurm_is_a_shell_script_that_saves_before_its_time_limit(
    source: RecipeFile, settings: Settings, tmp_path: Path
) -> None:
    (path,) = write(files("slurm", source, settings), str(tmp_path))
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    text = path.read_text()
    head = text.split("set -euo")[0]
    for option in ("--nodes=2", "--gpus-per-node=8", "--cpus-per-task=96", "--requeue", "--signal=B:TERM@300"):
        assert f"#SBATCH {option}" in head
    assert "umask 077" in text and "RAY_AUTH_MODE=token" in text
    steps = re.findall(r"^ *srun (.*?) ray start", text.replace("\\\n", ""), re.MULTILINE)
    assert len(steps) == 2 and all('--cpus-per-task="$SLURM_CPUS_PER_TASK"' in step for step in steps)


def test_images_are_pinned_and_ports_are_on_the_loopback_interface_only(source: RecipeFile, settings: Settings) -> None:
    rendered = files("compose", source, settings)
    assert "pip install -c constraints.txt" in rendered["Dockerfile"]
    assert rendered["Dockerfile.dockerignore"].splitlines()[1] == "*"
    compose = Compose.model_validate(yaml.safe_load(rendered["compose.yaml"]))
    services = compose.services
    ports = [port for service in services.values() for port in service.ports]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    assert {name for service in services.values() for name in service.secrets} == set(compose.secrets)
    assert not re.search(r"PASSWORD: (?!/run)", rendered["compose.yaml"])
    for service in services.values():
        for name, wanted in service.depends_on.items():
            assert wanted["condition"] != "service_healthy" or services[name].healthcheck
    mounted = [mount for service in services.values() for mount in service.volumes]
    assert sorted(mounted) == ["postgres:/var/lib/postgresql/data", "s3:/data"]
    assert {mount.partition(":")[0] for mount in mounted} == set(compose.volumes)
    ours = {service.image for service in services.values() if service.build} | {services["node"].image}
    taken = {service.image for service in services.values()} - ours
    assert len(taken) == 3 and not any(image.endswith(":latest") or ":" not in image for image in taken)
    compose_tree = yaml.safe_load(rendered["compose.yaml"])
    for key, value in (("volume", []), ("ports", [8265]), ("restart", "sometimes")):
        with pytest.raises(ValidationError):
            Compose.model_validate(compose_tree | {"services": {"s3": {**compose_tree["services"]["s3"], key: value}}})


def test_a_recipe_that_does_not_fit_on_the_machines_is_refused(source: RecipeFile) -> None:
    with pytest.raises(UserError, match="cluster.gpus_per_worker"):
        files("slurm", source, Settings(train=Machine(cpus=8, memory_gb=32)))
    with pytest.raises(UserError, match=r"16 training nodes.*train\.max = 4"):
        files("slurm", source, Settings(train=Machine(cpus=8, memory_gb=32, gpus=1, max=4)))
    with pytest.raises(UserError, match="'nomad'.*kuberay"):
        files("nomad", source, Settings(train=Machine(cpus=8, memory_gb=32)))


def test_the_dashboard_shows_every_figure(source: RecipeFile, settings: Settings) -> None:
    dashboard = json.loads(files("grafana", source, settings)["grafana-perceiver.json"])
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = [re.search(r"ray_(\w+)\{run=~", expr) for expr in asked]
    assert [found and found[1] for found in named] == [figure.name for figure in FIGURES]
    assert 'time() - ray_perceiver_checkpoint_timestamp_seconds{run=~"$run"}' in asked
    assert {target["legendFormat"] for panel in dashboard["panels"] for target in panel["targets"]} == {"{{run}}"}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


# Characters that end a line, a quote, a comment or a value in some syntax, and any others.
HOSTILE = st.text(
    st.one_of(st.sampled_from("'\"`$\\#:{}[]%&!|>-~ \t\n\r\x85\u2028"), st.characters(codec="utf-8")),
    min_size=1,
    max_size=30,
)
"""Text that a recipe can contain: pydantic refuses lone surrogates."""
BREAKS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


@given(HOSTILE, st.dictionaries(HOSTILE, HOSTILE, max_size=3))
@example("a\n\n", {})
@example(" leading\nand trailing \n", {"...": "---"})
def test_an_inserted_string_stays_one_value(text: str, labels: dict[str, str]) -> None:
    assert yaml.safe_load(f"a: [{in_yaml(text)}, {in_yaml(labels)}]\nb: 1") == {"a": [text, labels], "b": 1}
    block = yaml_text(text).replace("\n", "\n  ")
    assert yaml.safe_load(f"data:\n  file: {block}\nb: 1") == {"data": {"file": text}, "b": 1}
    assert not BREAKS.search(in_comment(text))


def shell_words(script: str, *names: str) -> list[str]:
    """Run a script with stand-ins for these commands that print their arguments; return those of all calls."""
    spies = "".join(f'{name}() {{ printf "%s\\0" {name} "$@"; }}\n' for name in names)
    done = subprocess.run(["bash", "-ec", spies + script], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


@limits(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HOSTILE.filter(lambda text: "\0" not in text), HOSTILE.filter(lambda text: "\0" not in text))
@example("'; touch /tmp/x; echo '$(id)", "x\nkind: Pod #")
def test_no_string_can_inject_code(source: RecipeFile, settings: Settings, one: str, two: str) -> None:
    """Overrides, file names and settings arrive unchanged in YAML and in shells; comments stay comments."""
    evil = RecipeFile(source.recipe, f"recipes/{one}.yaml", (f"name={two}",), ("KEY",))
    machines = settings.model_copy(
        update={
            "image": one,
            "namespace": two,
            "env_secrets": (one, two),
            "node_selector": {one: two},
            "services": settings.services.model_copy(update={"bucket": two, "s3": one}),
            "slurm": settings.slurm.model_copy(update={"partition": one, "account": two, "setup": "true"}),
            "aws": settings.aws.model_copy(update={"region": one, "instance_profile": two}),
        }
    )
    cluster = yaml.safe_load(files("autoscaler-aws", evil, machines)["cluster.yaml"])
    assert (cluster["provider"]["region"], cluster["docker"]["image"]) == (one, one)
    assert cluster["available_node_types"]["train"]["node_config"]["IamInstanceProfile"] == {"Name": two}

    compose = yaml.safe_load(render("compose", evil, machines, f"a {one}")["compose.yaml"])["services"]
    assert compose["s3"]["image"] == one.replace("$", "$$")
    assert compose["head"]["build"]["dockerfile"] == f"a {one}".rstrip("/").replace("$", "$$") + "/Dockerfile"
    line = compose["bucket"]["entrypoint"][-1].replace("$$", "$").replace("$(cat /run/secrets/s3_password)", "key")
    assert shell_words(line, "mc")[-3:] == ["mb", "--ignore-existing", f"store/{two}"]
    line = compose["mlflow"]["command"][-1].replace("$$", "$").replace("; exec mlflow", "; mlflow")
    words = shell_words(re.sub(r"\$\(cat [^)]*\)", "key", line, count=2), "mlflow")
    assert words[words.index("--artifacts-destination") + 1] == f"s3://{two}/mlflow"

    script = files("slurm", evil, machines)["train.sbatch"]
    head, _, body = script.partition("set -euo pipefail\n")
    assert all(line.startswith("#") for line in head.split("\n")[:-1]) and "\r" not in head
    command = body.partition("queued again.\n")[2].partition(" &\ndriver=$!")[0]
    assert shell_words(command, "python")[-3:] == ["train", f"recipes/{one}.yaml", f"name={two}"]
    assert subprocess.run(["bash", "-n"], input=script.encode(), check=False).returncode == 0

    dockerfile = files("docker", evil, machines)["Dockerfile"]
    assert len(dockerfile.split("\n")) == len(files("docker", source, settings)["Dockerfile"].split("\n"))


def test_a_pod_gets_every_string_unchanged(settings: Settings, tmp_path: Path) -> None:
    """The recipe's file, its name, an override and a label, each with characters special to YAML or a shell."""
    file = tmp_path / "it's $HOME: #1.yaml"
    file.write_text("# a comment: 'x'\n\n" + Path(RECIPE).read_text() + "\n\n")
    overrides = [*SHARED, "cluster.worker_labels={\"a: 'b'\": 'no # comment'}"]
    rendered = files("kuberay", read_recipe_file(str(file), overrides), settings)
    recipe_map, job_ = yaml.safe_load_all(rendered["rayjob.yaml"])
    assert recipe_map["data"] == {file.name: file.read_text()}
    words = shlex.split(job_["spec"]["entrypoint"])
    assert words[words.index("train") + 1 :][: 1 + len(overrides)] == [f"/etc/perceiver/{file.name}", *overrides]
    (train, _) = job_["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert train["labels"] == {"a: 'b'": "no # comment"}


def test_a_template_that_inserts_without_a_filter_is_refused(
    source: RecipeFile, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        environment(), "loader", DictLoader({"train.sbatch.j2": "#SBATCH --job-name={{ recipe.name }}"})
    )
    with pytest.raises(TypeError, match="without a filter"):
        files("slurm", source, settings)


def test_the_mlflow_image_is_next_to_the_image_in_a_registry_with_a_port(
    source: RecipeFile, settings: Settings
) -> None:
    for image, mlflow in (
        ("host:5000/team/train", "host:5000/team/train-mlflow:latest"),
        ("host:5000/train:1.2", "host:5000/train-mlflow:1.2"),
    ):
        rendered = files("compose", source, settings.model_copy(update={"image": image}))["compose.yaml"]
        assert mlflow in {service.get("image") for service in yaml.safe_load(rendered)["services"].values()}
