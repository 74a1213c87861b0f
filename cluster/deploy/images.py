"""The image of the nodes, and a whole small installation on one machine: Ray, MLflow, PostgreSQL, an S3 store."""

from typing import Any

from cluster.deploy.settings import Settings
from cluster.deploy.source import Source, submit_command
from cluster.deploy.yaml_text import as_yaml

DOCKERFILE = """# Image of all nodes of a cluster, rendered by `perceiver cluster render docker`.
# Build it in the folder that holds pyproject.toml:  docker build -f @FOLDER@/Dockerfile -t {image} .
# Every dependency is pinned by constraints.txt. Not built here: there was no Docker daemon.
FROM {base} AS nodes
# g++ for the kernel, wget for KubeRay's probes, procps for the drain, openssh for Ray's cluster launcher.
RUN apt-get update \\
    && apt-get install -y --no-install-recommends g++ wget procps rsync openssh-client git \\
    && rm -rf /var/lib/apt/lists/* \\
    && useradd --create-home --uid 1000 ray
WORKDIR /opt/perceiver
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
# The dependencies first: they change less often than the sources.
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN mkdir perceiver pipelines cluster tune && touch perceiver/__init__.py pipelines/__init__.py cluster/__init__.py \\
    tune/__init__.py && pip install -c constraints.txt '.[s3]' && pip uninstall -y perceiver-train
COPY perceiver perceiver
COPY pipelines pipelines
COPY cluster cluster
COPY tune tune
COPY recipes recipes
RUN pip install -c constraints.txt --no-deps . \\
    && python -c "import ray; assert ray.__version__ == '{ray}', ray.__version__"
USER ray
WORKDIR /home/ray
CMD ["bash"]

# MLflow's server: the same pinned MLflow, with a driver for PostgreSQL.
FROM nodes AS mlflow
USER root
RUN pip install 'psycopg2-binary>=2.9.9,<3' boto3 -c /opt/perceiver/constraints.txt
USER ray
"""

DOCKERIGNORE = """# Only what the image takes in; above all no data, no runs, no keys.
*
!constraints.txt
!pyproject.toml
!README.md
!LICENSE
!perceiver
!pipelines
!cluster
!tune
!recipes
**/__pycache__
**/*.so
**/*.env
"""

COMPOSE_HEADER = """
One machine with everything, rendered by `perceiver cluster render compose`: a Ray head and nodes, MLflow on PostgreSQL,
an S3 store. Not started here (there was no Docker daemon): its fields and their types were checked, no image pulled.

Once:  mkdir -p secrets && for s in token s3_password postgres_password; do
         (umask 077; openssl rand -hex 32 | tr -d '\\n' > secrets/$s); done
Start: docker compose -f {file} up -d --build --scale node=2
Train: RAY_AUTH_TOKEN_PATH=secrets/token {submit}
Look:  http://127.0.0.1:5000 (MLflow), http://127.0.0.1:8265 (Ray)
"""

ENVIRONMENT = (
    "export RAY_AUTH_TOKEN_PATH=/run/secrets/token AWS_ACCESS_KEY_ID=perceiver "
    "AWS_SECRET_ACCESS_KEY=$(cat /run/secrets/s3_password) AWS_ENDPOINT_URL=http://s3:9000 AWS_DEFAULT_REGION=us-east-1"
)


def render(kind: str, source: Source, settings: Settings) -> dict[str, str]:
    """Return ``Dockerfile`` and ``Dockerfile.dockerignore``, and for compose ``compose.yaml`` beside them."""
    import ray

    dockerfile = DOCKERFILE.format(base=settings.base_image, image=settings.image, ray=ray.__version__)
    files = {"Dockerfile": dockerfile, "Dockerfile.dockerignore": DOCKERIGNORE}
    if kind == "compose":
        submit = submit_command(source, [*source.overrides, *_store_overrides(source, settings.services.bucket)])
        header = COMPOSE_HEADER.format(file="@FOLDER@/compose.yaml", submit=submit)
        files["compose.yaml"] = as_yaml(header, compose(settings))
    return files


def _store_overrides(source: Source, bucket: str) -> list[str]:
    """Return the overrides that put data and runs into the store, where the recipe names folders of this machine."""
    places = {"data.url": (source.recipe.data.url, "data"), "output": (source.recipe.output, "runs")}
    return [f"{key}=s3://{bucket}/{folder}" for key, (url, folder) in places.items() if "://" not in url]


def compose(settings: Settings) -> dict[str, Any]:
    """Return the compose file. Only ports of the loopback interface are published."""
    services, machine = settings.services, settings.train
    gpus = f" --num-gpus={machine.gpus}" if machine.gpus else ""
    shared = {
        "image": settings.image,
        "secrets": ["token", "s3_password"],
        "environment": {"RAY_AUTH_MODE": "token", "MLFLOW_TRACKING_URI": "http://mlflow:5000"},
        "shm_size": f"{machine.shm_gb:g}g",
        "stop_grace_period": f"{settings.drain_s}s",
        "restart": "unless-stopped",
    }
    # The dashboard listens inside the container's network; from outside only the loopback interface leads to it.
    head = "ray start --head --block --port=6379 --num-cpus=0 --dashboard-host=0.0.0.0"
    node = f"ray start --block --address=head:6379 --num-cpus={machine.cpus}{gpus}"
    return {
        "name": "perceiver",
        "services": {
            "head": {
                **shared,
                "build": {"context": "@ROOT@", "dockerfile": "@FOLDER@/Dockerfile", "target": "nodes"},
                "command": _shell(f"{ENVIRONMENT}; exec {head}"),
                "ports": ["127.0.0.1:8265:8265"],
                "depends_on": {"mlflow": {"condition": "service_started"}, "bucket": _done()},
            },
            "node": {
                **shared,
                "command": _shell(f"{ENVIRONMENT}; exec {node}"),
                "depends_on": {"head": {"condition": "service_started"}},
                **({"deploy": {"resources": {"reservations": {"devices": [_gpu(machine.gpus)]}}}} if gpus else {}),
            },
            "mlflow": _mlflow(settings),
            "postgres": _postgres(services.postgres),
            "s3": _store(services.s3),
            "bucket": _bucket(services.s3_client, services.bucket),
        },
        "secrets": {name: {"file": f"@ROOT@/secrets/{name}"} for name in ("token", "s3_password", "postgres_password")},
        "volumes": {"postgres": {}, "s3": {}},
    }


def _shell(line: str) -> list[str]:
    # Compose itself replaces $NAME; two dollars stand for one.
    return ["bash", "-ec", line.replace("$", "$$")]


def _done() -> dict[str, str]:
    return {"condition": "service_completed_successfully"}


def _gpu(count: int) -> dict[str, Any]:
    return {"driver": "nvidia", "count": count, "capabilities": ["gpu"]}


def _mlflow(settings: Settings) -> dict[str, Any]:
    store = "postgresql://mlflow:$(cat /run/secrets/postgres_password)@postgres/mlflow"
    server = (
        f'{ENVIRONMENT}; exec mlflow server --host 0.0.0.0 --port 5000 --backend-store-uri "{store}" '
        f"--artifacts-destination s3://{settings.services.bucket}/mlflow --allowed-hosts 'mlflow:5000,127.0.0.1:5000,"
        "localhost:5000'"
    )
    return {
        "image": f"{settings.image.partition(':')[0]}-mlflow:{settings.image.partition(':')[2] or 'latest'}",
        "build": {"context": "@ROOT@", "dockerfile": "@FOLDER@/Dockerfile", "target": "mlflow"},
        "secrets": ["token", "s3_password", "postgres_password"],
        # Else it brings up eight processes more, of 250 MB each, for evaluations of language models.
        "environment": {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        "command": _shell(server),
        "ports": ["127.0.0.1:5000:5000"],
        "depends_on": {"postgres": {"condition": "service_healthy"}, "bucket": _done()},
        "restart": "unless-stopped",
    }


def _postgres(image: str) -> dict[str, Any]:
    return {
        "image": image,
        "secrets": ["postgres_password"],
        "environment": {
            "POSTGRES_USER": "mlflow",
            "POSTGRES_DB": "mlflow",
            "POSTGRES_PASSWORD_FILE": "/run/secrets/postgres_password",
        },
        # Where the images up to version 17 keep their data.
        "volumes": ["postgres:/var/lib/postgresql/data"],
        "healthcheck": {"test": ["CMD-SHELL", "pg_isready -U mlflow"], "interval": "5s", "retries": 20},
        "restart": "unless-stopped",
    }


def _store(image: str) -> dict[str, Any]:
    return {
        "image": image,
        "command": ["server", "/data"],
        "secrets": ["s3_password"],
        "environment": {"MINIO_ROOT_USER": "perceiver", "MINIO_ROOT_PASSWORD_FILE": "/run/secrets/s3_password"},
        "volumes": ["s3:/data"],
        "healthcheck": {"test": ["CMD", "mc", "ready", "local"], "interval": "5s", "retries": 20},
        "restart": "unless-stopped",
    }


def _bucket(image: str, bucket: str) -> dict[str, Any]:
    line = (
        "mc alias set store http://s3:9000 perceiver $(cat /run/secrets/s3_password) && "
        f"mc mb --ignore-existing store/{bucket}"
    )
    return {
        "image": image,
        "entrypoint": ["/bin/sh", "-ec", line.replace("$", "$$")],
        "secrets": ["s3_password"],
        "depends_on": {"s3": {"condition": "service_healthy"}},
    }
