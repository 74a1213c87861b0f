"""The machines of a cluster, as files in recipes/cluster/ describe them."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from cluster.recipe.config import Recipe
from cluster.recipe.file import read_yaml_config
from perceiver.config import Config, Count, CountOrZero, Positive, UserError
from perceiver.tracking.redaction import contains_secret, leaves, redact_text

LABELS = {"train": {"role": "train"}, "data": {"role": "data"}}
"""Labels of training and data nodes, unless the recipe sets others."""


def _redis_address(value: str) -> str:
    if not re.fullmatch(r"(rediss?://)?([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:]+\]):\d{1,5}", value) or not (
        0 < int(value.rpartition(":")[2]) < 65536
    ):
        raise ValueError(
            f"got {redact_text(value)!r}, wanted HOST:PORT or redis://HOST:PORT (rediss:// with TLS) without a login: "
            "the password is a Kubernetes secret, secret_name"
        )
    return value


NAME_WANTED = "wanted a Kubernetes name: lower-case letters, digits, - and ."


def _is_name(value: str) -> bool:
    return not value or re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", value) is not None


def _object_name(value: str) -> str:
    if not _is_name(value):
        raise ValueError(f"got {redact_text(value)!r}, {NAME_WANTED}")
    return value


def _secret_name(value: str) -> str:
    if not _is_name(value):
        raise ValueError(f"got other characters (not shown: it may be the password itself), {NAME_WANTED}")
    return value


ObjectName = Annotated[str, Field(max_length=253), AfterValidator(_object_name)]
SecretName = Annotated[str, Field(max_length=253), AfterValidator(_secret_name)]


class Machine(Config):
    """A kind of node."""

    cpus: Count = Field(description="logical CPUs")
    memory_gb: Positive = Field(description="memory, in GiB")
    gpus: CountOrZero = Field(default=0, description="GPUs")
    shm_gb: Positive = Field(default=8, description="shared memory for Ray's object store, in GiB")
    min: CountOrZero = Field(default=0, description="smallest number of nodes")
    max: int = Field(default=8, ge=1, le=100_000, description="largest number of nodes")
    aws: str = Field(default="", description="EC2 instance type")
    gcp: str = Field(default="", description="Compute Engine machine type")
    gcp_accelerator: str = Field(default="", description="Compute Engine accelerator type, such as nvidia-tesla-a100")


class Aws(Config):
    """Amazon EC2."""

    region: str = Field(default="us-west-2", description="region")
    zones: str = Field(default="us-west-2a,us-west-2b", description="availability zones, separated by commas")
    instance_profile: str = Field(default="perceiver-nodes", description="IAM profile with access to the bucket")
    disk_gb: Count = Field(default=200, description="root disk of each node, in GB")


class Gcp(Config):
    """Google Compute Engine."""

    project: str = Field(default="my-project", description="project id")
    region: str = Field(default="us-central1", description="region")
    zone: str = Field(default="us-central1-a", description="zone")
    service_account: str = Field(default="perceiver-nodes", description="service account with access to the bucket")
    source_image: str = Field(
        default="projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204",
        description="image with Docker and the GPU driver",
    )
    disk_gb: Count = Field(default=200, description="boot disk of each node, in GB")


class Slurm(Config):
    """A Slurm cluster."""

    partition: str = Field(default="gpu", description="partition")
    account: str = Field(default="", description="account; empty: the user's default")
    time: str = Field(
        default="24:00:00", description="time limit of an allocation; the job is requeued until it is finished"
    )
    setup: str = Field(
        default="source .venv/bin/activate", description="shell commands that make python and ray available"
    )


class Services(Config):
    """Images of the services in the local stack (compose)."""

    postgres: str = Field(default="postgres:17-alpine", description="database of MLflow; version 17 or older")
    s3: str = Field(default="quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z", description="S3 store")
    s3_client: str = Field(
        default="quay.io/minio/mc:RELEASE.2025-08-13T08-35-41Z", description="client that creates the bucket"
    )
    bucket: str = Field(default="perceiver", description="bucket for data, runs and artifacts")


class GcsFaultTolerance(Config):
    """The Redis that keeps the state of a KubeRay cluster's control plane (GCS), so that a new head continues it."""

    redis_address: Annotated[str, AfterValidator(_redis_address)] = Field(
        max_length=300, description="HOST:PORT or redis://HOST:PORT (rediss:// with TLS), without a login"
    )
    redis_username: str = Field(default="", max_length=100, description="user of the Redis; empty: the default one")
    secret_name: SecretName = Field(
        default="", description="Kubernetes secret with the password; empty: Redis wants none"
    )
    login_entry: str = Field(default="password", min_length=1, max_length=253, description="key of the password in it")
    external_storage_namespace: ObjectName = Field(
        default="",
        description="prefix of the keys of raycluster.yaml in Redis, unique to the cluster; empty: the cluster's UID",
    )
    driver: Machine = Field(
        default=Machine(cpus=2, memory_gb=8, shm_gb=1), description="pod of the driver, which must not be the head's"
    )


class Settings(Config):
    """The machines and their configuration, as far as a recipe does not determine them."""

    image: str = Field(
        default="perceiver-train:latest", description="image of all nodes, with its registry; see render docker"
    )
    base_image: str = Field(default="python:3.11-slim-bookworm", description="base image of that image")
    head: Machine = Field(default=Machine(cpus=4, memory_gb=16), description="control plane and driver, no workers")
    train: Machine = Field(description="nodes of the training workers")
    data: Machine | None = Field(
        default=None, description="nodes for data tasks only; null: data tasks run on the training nodes"
    )
    spot: bool = Field(
        default=True, description="use preemptible training nodes first, on-demand ones if none are available"
    )
    idle_minutes: Count = Field(default=5, description="minutes after which an idle node is released")
    drain_s: Count = Field(default=300, description="seconds between a node's preemption notice and its removal")
    namespace: str = Field(default="default", description="Kubernetes namespace")
    token_secret: str = Field(default="perceiver-token", description="Kubernetes secret with the key auth_token")
    env_secrets: tuple[str, ...] = Field(
        default=("perceiver-storage", "perceiver-mlflow"),
        description="Kubernetes secrets whose keys become environment variables, for storage and tracking",
    )
    gcs_fault_tolerance: GcsFaultTolerance | None = Field(
        default=None, description="for kuberay: a run survives the loss of the head; null: the job starts again then"
    )
    node_selector: dict[str, str] = Field(default={}, description="Kubernetes labels of the training machines")
    aws: Aws = Field(default=Aws(), description="for autoscaler-aws")
    gcp: Gcp = Field(default=Gcp(), description="for autoscaler-gcp")
    slurm: Slurm = Field(default=Slurm(), description="for slurm")
    services: Services = Field(default=Services(), description="for compose")


def read_settings(path: str | Path) -> Settings:
    """Read a file of settings.

    Raises:
        UserError: no such file, a wrong key or value, or a secret, which the rendered files would show.
    """
    settings = read_yaml_config(path, Settings, "see recipes/cluster/")
    for key, value in leaves(settings.model_dump()):
        if contains_secret(str(value)):
            raise UserError(
                f"{path}: {key} contains a secret, which the files would show: set it where the nodes start"
            )
    return settings


def train_nodes(recipe: Recipe, settings: Settings) -> int:
    """Return the number of training nodes for the recipe's workers.

    Raises:
        UserError: a worker does not fit on a node, or the workers need more nodes than the settings allow.
    """
    cluster, machine = recipe.cluster, settings.train
    cpus = cluster.cpus_per_worker or 1.0
    room = math.floor(machine.cpus / cpus)
    if cluster.gpus_per_worker:
        room = min(room, math.floor(machine.gpus / cluster.gpus_per_worker))
    if room < 1:
        raise UserError(
            f"a worker of the recipe needs {cpus:g} CPUs and {cluster.gpus_per_worker:g} GPUs, a node of `train` has "
            f"{machine.cpus} and {machine.gpus}: change cluster.gpus_per_worker or the settings"
        )
    nodes = math.ceil(cluster.workers / room)
    if nodes > machine.max:
        raise UserError(
            f"cluster.workers = {cluster.workers} need {nodes} training nodes, the settings allow "
            f"train.max = {machine.max}: raise it or lower cluster.workers"
        )
    return nodes


def labels(recipe: Recipe, settings: Settings) -> dict[str, dict[str, str]]:
    """Return the labels of training and data nodes: the recipe's, otherwise `LABELS` if there are data nodes."""
    ours: Mapping[str, dict[str, str]] = LABELS if settings.data is not None else {"train": {}, "data": {}}
    return {
        "train": recipe.cluster.worker_labels or ours["train"],
        "data": recipe.data.task_labels or ours["data"],
    }


def placement_overrides(recipe: Recipe, settings: Settings) -> list[str]:
    """Return the overrides that place the recipe's workers and data tasks on their nodes."""
    found = labels(recipe, settings)
    pairs: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("cluster.worker_labels", found["train"], recipe.cluster.worker_labels),
        ("data.task_labels", found["data"], recipe.data.task_labels),
    ]
    return [f"{key}.{name}={value}" for key, wanted, has in pairs if wanted != has for name, value in wanted.items()]
