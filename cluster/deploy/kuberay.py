"""Kubernetes: a RayCluster that stays, and a RayJob that brings its own and retries.

Fields as in KubeRay's API reference for ray.io/v1 (docs.ray.io, KubeRay CRD API reference; ray-operator/apis/ray/v1 of
the KubeRay repository): `authOptions.secretName` needs KubeRay 1.6.0 (`authOptions` 1.5.1, `labels` of a group 1.5).
"""

import json
import math
from pathlib import Path
from typing import Any

import ray

from cluster.deploy.settings import IMAGE_NOTE, Machine, Settings, labels, train_nodes
from cluster.deploy.source import Source, growing_overrides, job_command, submit_command
from cluster.deploy.yaml_text import as_yaml
from cluster.jobs.secrets import check_files
from cluster.recipe.config import Recipe
from perceiver.train.engine.deepspeed_config import read_config

RECIPE_FOLDER = "/etc/perceiver"

DRAIN = (
    "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod is ending' "
    "--deadline-remaining-seconds {s}; n=0; "
    "while pgrep -f ray::RayTrainWorker >/dev/null && [ $n -lt {s} ]; do sleep 1; n=$((n+1)); done"
)
"""What a pod does before it ends: tell Ray, then wait until no worker trains there any more, or the time is up."""

HEADER = """
{what} for the recipe {recipe}, rendered by `perceiver cluster render kuberay`.
Needs the KubeRay operator 1.6.0 or newer. Not tried on a cluster: fields and types were checked against KubeRay's API
reference and the models of Kubernetes' Python client.

Once: {image}
Once, before the first use (the values stay in the cluster, never in a file of yours):
  kubectl -n {namespace} create secret generic {token} --from-literal=auth_token="$(openssl rand -hex 32)"
{secrets}
Then:
  kubectl -n {namespace} apply -f {file}
{then}
"""


def render(kind: str, source: Source, settings: Settings) -> dict[str, str]:
    """Return ``raycluster.yaml`` and ``rayjob.yaml``."""
    recipe = source.recipe
    name = recipe.name.lower().replace("_", "-").replace(".", "-")
    service = f"kubectl -n {settings.namespace} port-forward service/{name}-head-svc 8265:8265"
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "namespace": settings.namespace},
        "spec": cluster_spec(recipe, settings, None),
    }
    then = f"  {service} &\n  {submit_command(source, growing_overrides(source, settings))}"
    job_then = f"  kubectl -n {settings.namespace} get rayjob {name} -w"
    return {
        "raycluster.yaml": as_yaml(_header("A cluster", "raycluster.yaml", source.file, settings, then), cluster),
        "rayjob.yaml": as_yaml(
            _header("One run with a cluster of its own", "rayjob.yaml", source.file, settings, job_then),
            _recipe_map(name, source.file, settings),
            _job(name, source, settings),
        ),
    }


def cluster_spec(recipe: Recipe, settings: Settings, recipe_map: str | None) -> dict[str, Any]:
    """Return the spec of a RayCluster; with the config map of a recipe, its pods see it in a folder."""
    found = labels(recipe, settings)
    wanted = train_nodes(recipe, settings)
    groups = [_group("train", settings.train, wanted, found["train"], settings, recipe_map)]
    if settings.data is not None:
        groups.append(_group("data", settings.data, settings.data.min, found["data"], settings, recipe_map))
    return {
        "rayVersion": ray.__version__,
        "authOptions": {"mode": "token", "secretName": settings.token_secret},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": settings.idle_minutes * 60},
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            # A head without CPUs runs the control plane and the driver, and nothing that could crowd them out.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod("head", settings.head, settings, recipe_map),
        },
        "workerGroupSpecs": groups,
    }


def _group(
    name: str, machine: Machine, wanted: int, marks: dict[str, str], settings: Settings, recipe_map: str | None
) -> dict[str, Any]:
    group: dict[str, Any] = {
        "groupName": name,
        "replicas": max(wanted, machine.min),
        "minReplicas": machine.min,
        "maxReplicas": machine.max,
        "idleTimeoutSeconds": settings.idle_minutes * 60,
        "rayStartParams": {},
        "template": _pod(name, machine, settings, recipe_map),
    }
    if marks:
        group["labels"] = dict(marks)
    return group


def _pod(role: str, machine: Machine, settings: Settings, recipe_map: str | None) -> dict[str, Any]:
    """Return a pod template: requests equal limits, shared memory of its own size, secrets as environment."""
    amount = {"cpu": str(machine.cpus), "memory": f"{math.ceil(machine.memory_gb)}Gi"}
    if machine.gpus:
        amount["nvidia.com/gpu"] = str(machine.gpus)
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{math.ceil(machine.shm_gb)}Gi"}}
    ]
    if recipe_map:
        mounts.append({"name": "recipe", "mountPath": RECIPE_FOLDER})
        volumes.append({"name": "recipe", "configMap": {"name": recipe_map}})
    container: dict[str, Any] = {
        "name": f"ray-{role}",
        "image": settings.image,
        "resources": {"requests": amount, "limits": dict(amount)},
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "envFrom": [{"secretRef": {"name": name, "optional": True}} for name in settings.env_secrets],
        "volumeMounts": mounts,
    }
    if role == "head":
        ports = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}
        container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    else:
        # Tell Ray before the pod goes: training saves and moves on instead of losing a worker.
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", DRAIN.format(s=settings.drain_s)]}}}
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": settings.drain_s + 30,
        "containers": [container],
        "volumes": volumes,
    }
    if role == "train" and settings.node_selector:
        spec["nodeSelector"] = dict(settings.node_selector)
    if machine.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": {"perceiver/role": role}}, "spec": spec}


def _recipe_map(name: str, recipe_file: str, settings: Settings) -> dict[str, Any]:
    # It goes along as it stands: with what overrides replace, and its comments.
    check_files([recipe_file])
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-recipe", "namespace": settings.namespace},
        "data": {Path(recipe_file).name: Path(recipe_file).read_text()},
    }


def _job(name: str, source: Source, settings: Settings) -> dict[str, Any]:
    """Return a RayJob. Each of its retries brings a new cluster, and goes on with the run where the last one ended."""
    recipe = source.recipe
    file = f"{RECIPE_FOLDER}/{Path(source.file).name}"
    overrides = growing_overrides(source, settings)
    given = recipe.deepspeed.config
    if isinstance(given, str) and not Path(given).is_absolute():
        # The pods have no such file: its contents go along instead.
        overrides.append(f"deepspeed.config={json.dumps(read_config(recipe.deepspeed))}")
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": settings.namespace},
        "spec": {
            "entrypoint": job_command(source, file, overrides),
            "runtimeEnvYAML": json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(recipe.cluster.stop_wait_s)}}),
            "backoffLimit": 3,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": cluster_spec(recipe, settings, f"{name}-recipe"),
        },
    }


def _header(what: str, file: str, recipe_file: str, settings: Settings, then: str) -> str:
    keys = {
        "perceiver-storage": "AWS_ACCESS_KEY_ID=... --from-literal=AWS_SECRET_ACCESS_KEY=...",
        "perceiver-mlflow": "MLFLOW_TRACKING_URI=...",
    }
    secrets = "\n".join(
        f"  kubectl -n {settings.namespace} create secret generic {name} --from-literal={keys.get(name, 'NAME=...')}"
        for name in settings.env_secrets
    )
    return HEADER.format(
        what=what,
        recipe=recipe_file,
        namespace=settings.namespace,
        token=settings.token_secret,
        image=IMAGE_NOTE.format(image=settings.image, indent=" " * 6),
        secrets=secrets,
        file=file,
        then=then,
    )
