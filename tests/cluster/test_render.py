"""The files that start real clusters: valid by the loaders and fields of those who read them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.recipe import Recipe, load_recipe
from cluster.render import KINDS, render, write
from cluster.render.settings import Machine, Settings, read_settings
from perceiver.config import UserError

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes/train/quickstart.yaml")
# KubeRay API reference, ray.io/v1 (docs.ray.io/en/master/cluster/kubernetes/references/api.html), read for KubeRay 1.6.
CLUSTER_FIELDS = {
    "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling", "authOptions",
    "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs", "upgradeStrategy",
}  # fmt: skip
HEAD_FIELDS = {
    "template", "headService", "enableIngress", "resources", "labels", "rayStartParams", "serviceType",
}  # fmt: skip
GROUP_FIELDS = {
    "suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "resources", "labels",
    "rayStartParams", "template", "scaleStrategy", "numOfHosts",
}  # fmt: skip
JOB_FIELDS = {
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
    "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
    "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
    "shutdownAfterJobFinishes", "suspend",
}  # fmt: skip
AUTOSCALER_FIELDS = {
    "resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds", "upscalingMode", "version", "env",
    "envFrom", "volumeMounts",
}  # fmt: skip


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(RECIPE, ["cluster.workers=16", "cluster.gpus_per_worker=1", "train.global_batch=128"])


@pytest.fixture
def settings() -> Settings:
    return read_settings(ROOT / "recipes/cluster/gpu.yaml")


@pytest.mark.parametrize("name", ["gpu.yaml", "cpu.yaml"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_renders_for_the_machines_we_ship(kind: str, name: str, tmp_path: Path) -> None:
    files = write(
        render(kind, load_recipe(RECIPE), RECIPE, read_settings(ROOT / "recipes/cluster" / name)), str(tmp_path)
    )
    assert files
    for path in files:
        text = path.read_text()
        assert "@FOLDER@" not in text and "@ROOT@" not in text
        if path.suffix == ".yaml":
            assert all(yaml.safe_load_all(text))


def check_cluster_spec(spec: dict[str, Any]) -> None:
    assert set(spec) <= CLUSTER_FIELDS and {"headGroupSpec"} <= set(spec)
    assert spec["authOptions"] == {"mode": "token", "secretName": "perceiver-token"}
    assert set(spec["autoscalerOptions"]) <= AUTOSCALER_FIELDS
    assert set(spec["headGroupSpec"]) <= HEAD_FIELDS and spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = spec["workerGroupSpecs"]
    for group in groups:
        assert set(group) <= GROUP_FIELDS
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


def test_kuberay_has_only_fields_that_its_api_knows(recipe: Recipe, settings: Settings) -> None:
    files = render("kuberay", recipe, RECIPE, settings)
    cluster = yaml.safe_load(files["raycluster.yaml"])
    recipe_map, job = yaml.safe_load_all(files["rayjob.yaml"])
    assert cluster["apiVersion"] == job["apiVersion"] == "ray.io/v1"
    check_cluster_spec(cluster["spec"])
    check_cluster_spec(job["spec"]["rayClusterSpec"])
    assert set(job["spec"]) <= JOB_FIELDS
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
        for v in job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        if "configMap" in v
    }
    assert mounted == {recipe_map["metadata"]["name"]}
    assert "cluster.worker_labels.role=train data.task_labels.role=data" in job["spec"]["entrypoint"]


@pytest.mark.parametrize("kind", ["autoscaler-aws", "autoscaler-gcp"])
def test_rays_loader_takes_the_autoscaler_files(kind: str, recipe: Recipe, settings: Settings) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(render(kind, recipe, RECIPE, settings)["cluster.yaml"])
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert types["train-spot"]["priority"] > types["train"]["priority"]
    assert types["train-spot"]["labels"] == types["train"]["labels"] == {"role": "train"}
    spot, sure = str(types["train-spot"]["node_config"]), str(types["train"]["node_config"])
    assert ("spot" in spot or "preemptible" in spot) and "spot" not in sure and "preemptible" not in sure
    assert types["data"]["resources"] == {"CPU": 32} and "token" in str(config["file_mounts"])
    with pytest.raises(Exception, match="mistake"):
        validate_config(prepare_config({**config, "mistake": 1}))


def test_slurm_is_a_shell_script_that_saves_before_its_time_is_up(
    recipe: Recipe, settings: Settings, tmp_path: Path
) -> None:
    (path,) = write(render("slurm", recipe, RECIPE, settings), str(tmp_path))
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    text = path.read_text()
    head = text.split("set -euo")[0]
    for option in ("--nodes=2", "--gpus-per-node=8", "--cpus-per-task=96", "--requeue", "--signal=B:TERM@300"):
        assert f"#SBATCH {option}" in head
    assert "umask 077" in text and "RAY_AUTH_MODE=token" in text and "python -m cluster.job --run quickstart" in text


def test_images_are_pinned_and_publish_on_the_loopback_interface_only(recipe: Recipe, settings: Settings) -> None:
    files = render("compose", recipe, RECIPE, settings)
    assert "pip install -c constraints.txt" in files["Dockerfile"]
    assert files["Dockerfile.dockerignore"].splitlines()[1] == "*"
    compose = yaml.safe_load(files["compose.yaml"])
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    used = {name for service in compose["services"].values() for name in service.get("secrets", [])}
    assert used == set(compose["secrets"])
    assert not re.search(r"PASSWORD: (?!/run)", files["compose.yaml"])
    named = {n for service in compose["services"].values() for n in service.get("depends_on", {})}
    assert named <= set(compose["services"])


def test_a_recipe_that_the_machines_do_not_fit_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="a node of `train` has 8 and 0"):
        render("slurm", recipe, RECIPE, Settings(train=Machine(cpus=8, memory_gb=32)))
    with pytest.raises(UserError, match=r"fill 16 training nodes, the settings allow train.max = 4"):
        render("slurm", recipe, RECIPE, Settings(train=Machine(cpus=8, memory_gb=32, gpus=1, max=4)))
    with pytest.raises(UserError, match="no kind 'nomad': wanted one of kuberay"):
        render("nomad", recipe, RECIPE, Settings(train=Machine(cpus=8, memory_gb=32)))
