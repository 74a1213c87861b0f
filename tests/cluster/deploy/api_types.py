"""The schemas of the files that start clusters: an unknown or missing field, or one of another type, is refused."""

from typing import Any, Literal

from kubernetes.client import models as kubernetes
from pydantic import BaseModel, ConfigDict

Texts = dict[str, str]


class Api(BaseModel):
    """An object of an API: unknown fields and conversions of types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


# KubeRay's API reference for ray.io/v1 at KubeRay 1.6.2 (docs/reference/api.md there); pods are Kubernetes' own types.
class AuthOptions(Api):
    enableK8sTokenAuth: bool | None = None
    secretName: str | None = None
    mode: Literal["disabled", "token"] | None = None


class AutoscalerOptions(Api):
    resources: kubernetes.V1ResourceRequirements | None = None
    image: str | None = None
    imagePullPolicy: str | None = None
    securityContext: kubernetes.V1SecurityContext | None = None
    idleTimeoutSeconds: int | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    version: Literal["v1", "v2"] | None = None
    env: list[kubernetes.V1EnvVar] | None = None
    envFrom: list[kubernetes.V1EnvFromSource] | None = None
    volumeMounts: list[kubernetes.V1VolumeMount] | None = None


class RedisCredential(Api):
    valueFrom: kubernetes.V1EnvVarSource | None = None
    value: str | None = None


class GcsFaultToleranceOptions(Api):
    redisAddress: str
    redisUsername: RedisCredential | None = None
    redisPassword: RedisCredential | None = None
    externalStorageNamespace: str | None = None


class HeadGroupSpec(Api):
    template: kubernetes.V1PodTemplateSpec
    rayStartParams: Texts
    headService: kubernetes.V1Service | None = None
    enableIngress: bool | None = None
    resources: Texts | None = None
    labels: Texts | None = None
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None


class WorkerGroupSpec(Api):
    groupName: str
    minReplicas: int
    maxReplicas: int
    rayStartParams: Texts
    template: kubernetes.V1PodTemplateSpec
    suspend: bool | None = None
    replicas: int | None = None
    idleTimeoutSeconds: int | None = None
    resources: Texts | None = None
    labels: Texts | None = None
    scaleStrategy: dict[Literal["workersToDelete"], list[str]] | None = None
    numOfHosts: int | None = None


class RayClusterSpec(Api):
    headGroupSpec: HeadGroupSpec
    upgradeStrategy: dict[Literal["type"], Literal["Recreate", "None"]] | None = None
    authOptions: AuthOptions | None = None
    suspend: bool | None = None
    managedBy: str | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    headServiceAnnotations: Texts | None = None
    enableInTreeAutoscaling: bool | None = None
    gcsFaultToleranceOptions: GcsFaultToleranceOptions | None = None
    rayVersion: str | None = None
    workerGroupSpecs: list[WorkerGroupSpec] | None = None


class RayJobSpec(Api):
    activeDeadlineSeconds: int | None = None
    backoffLimit: int | None = None
    rayClusterSpec: RayClusterSpec | None = None
    submitterPodTemplate: kubernetes.V1PodTemplateSpec | None = None
    metadata: Texts | None = None
    clusterSelector: Texts | None = None
    submitterConfig: dict[Literal["backoffLimit"], int] | None = None
    managedBy: str | None = None
    deletionStrategy: dict[str, Any] | None = None
    entrypoint: str | None = None
    runtimeEnvYAML: str | None = None
    jobId: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] | None = None
    entrypointResources: str | None = None
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    ttlSecondsAfterFinished: int | None = None
    preRunningDeadlineSeconds: int | None = None
    shutdownAfterJobFinishes: bool | None = None
    suspend: bool | None = None


class RayCluster(Api):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: kubernetes.V1ObjectMeta
    spec: RayClusterSpec


class RayJob(Api):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: kubernetes.V1ObjectMeta
    spec: RayJobSpec


KINDS: dict[str, type[BaseModel]] = {
    "RayCluster": RayCluster,
    "RayJob": RayJob,
    "ConfigMap": kubernetes.V1ConfigMap,
}


def check_kubernetes(document: dict[str, Any]) -> None:
    """Refuse a Kubernetes object that its API would not accept.

    Raises:
        ValidationError: a field is unknown, missing or of another type.
    """
    read = KINDS[document["kind"]].model_validate(document)
    # The client also accepts its own spelling (container_port); Kubernetes does not.
    assert read.model_dump(by_alias=True, exclude_none=True) == document


# The part of the Compose specification (docs.docker.com/reference/compose-file) that our file uses.
class Build(Api):
    context: str
    dockerfile: str | None = None
    target: str | None = None


class Healthcheck(Api):
    test: list[str]
    interval: str | None = None
    timeout: str | None = None
    retries: int | None = None


class Device(Api):
    capabilities: list[str]
    driver: str | None = None
    count: int | None = None


Condition = Literal["service_started", "service_healthy", "service_completed_successfully"]
Devices = dict[Literal["devices"], list[Device]]


class Service(Api):
    image: str
    build: Build | None = None
    command: list[str] | None = None
    entrypoint: list[str] | None = None
    environment: Texts = {}
    secrets: list[str] = []
    shm_size: str | None = None
    stop_grace_period: str | None = None
    ports: list[str] = []
    restart: Literal["no", "always", "on-failure", "unless-stopped"] | None = None
    volumes: list[str] = []
    healthcheck: Healthcheck | None = None
    depends_on: dict[str, dict[Literal["condition"], Condition]] = {}
    deploy: dict[Literal["resources"], dict[Literal["reservations"], Devices]] | None = None


class Compose(Api):
    name: str
    services: dict[str, Service]
    secrets: dict[str, dict[Literal["file"], str]]
    volumes: dict[str, dict[str, Any]]
