"""Ray's own cluster launcher (`ray up`) on AWS and Google Cloud: preemptible nodes first, full-price ones if need be.

Checked by Ray's own loader (`ray.autoscaler._private.util.prepare_config` and `validate_config`).
"""

from typing import Any

from cluster.deploy.settings import IMAGE_NOTE, Machine, Settings, labels, train_nodes
from cluster.deploy.source import Source, growing_overrides, submit_command
from cluster.deploy.yaml_text import as_yaml
from cluster.recipe.config import Recipe

HEADER = """
A cluster on {cloud} for the recipe {recipe}, rendered by `perceiver cluster render {kind}`.
Not tried in a cloud: checked by Ray's own loader of such files.

Once:   {once}
        {image}
        write what the nodes need as NAME=value lines (MLFLOW_TRACKING_URI, keys of other stores) to
        ~/.perceiver/nodes.env, mode 0600; it is copied to the nodes and is part of no file here
Start:  ray up {file}
Train:  ray dashboard {file} &
        {submit}
Stop:   ray down {file}
"""

PREPARE = "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0; set -a; . ~/.perceiver/nodes.env; set +a; "


def render(kind: str, source: Source, settings: Settings) -> dict[str, str]:
    """Return ``cluster.yaml``."""
    aws = kind == "autoscaler-aws"
    header = HEADER.format(
        cloud="AWS" if aws else "Google Cloud",
        recipe=source.file,
        kind=kind,
        file="cluster.yaml",
        image=IMAGE_NOTE.format(image=settings.image, indent=" " * 8),
        submit=submit_command(source, growing_overrides(source, settings)),
        once="aws configure" if aws else "gcloud auth application-default login",
    )
    return {"cluster.yaml": as_yaml(header, config(aws, source.recipe, settings))}


def config(aws: bool, recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """Return the launcher's configuration."""
    types = _node_types(aws, recipe, settings)
    return {
        "cluster_name": recipe.name.lower().replace("_", "-").replace(".", "-"),
        "max_workers": sum(node.get("max_workers", 0) for node in types.values()),
        "idle_timeout_minutes": settings.idle_minutes,
        "provider": _provider(aws, settings),
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": settings.image,
            "container_name": "perceiver",
            "pull_before_run": True,
            "run_options": [f"--shm-size={settings.train.shm_gb:g}g", "--ulimit nofile=65536:65536"],
        },
        "available_node_types": types,
        "head_node_type": "head",
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token", "~/.perceiver/nodes.env": "~/.perceiver/nodes.env"},
        "initialization_commands": [],
        # The image holds everything; Ray's defaults would install another version.
        "setup_commands": ["chmod 600 ~/.ray/auth_token ~/.perceiver/nodes.env"],
        "head_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            f"{PREPARE}ray start --head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{PREPARE}ray start --address=$RAY_HEAD_IP:6379"],
    }


def _provider(aws: bool, settings: Settings) -> dict[str, Any]:
    if aws:
        return {
            "type": "aws",
            "region": settings.aws.region,
            "availability_zone": settings.aws.zones,
            "cache_stopped_nodes": False,
        }
    return {
        "type": "gcp",
        "region": settings.gcp.region,
        "availability_zone": settings.gcp.zone,
        "project_id": settings.gcp.project,
    }


def _node_types(aws: bool, recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """Return head, training and data nodes; of the training nodes a cheap and a sure kind, the cheap one preferred."""
    found = labels(recipe, settings)
    needed = train_nodes(recipe, settings)
    make = _aws_node if aws else _gcp_node

    def node(machine: Machine, spot: bool, marks: dict[str, str], priority: int) -> dict[str, Any]:
        resources = {"CPU": machine.cpus} | ({"GPU": machine.gpus} if machine.gpus else {})
        return {
            "min_workers": machine.min if not spot or not settings.spot else 0,
            "max_workers": machine.max,
            "priority": priority,
            "resources": resources,
            "labels": dict(marks),
            "node_config": make(machine, spot, settings),
        }

    types: dict[str, Any] = {
        "head": {"resources": {"CPU": 0}, "node_config": make(settings.head, False, settings), "max_workers": 0}
    }
    if settings.spot:
        types["train-spot"] = node(settings.train, True, found["train"], 1)
    types["train"] = node(settings.train, False, found["train"], 0)
    types["train"]["max_workers"] = max(needed, settings.train.max)
    if settings.data is not None:
        types["data"] = node(settings.data, settings.spot, found["data"], 0)
    return types


def _aws_node(machine: Machine, spot: bool, settings: Settings) -> dict[str, Any]:
    disk = {"VolumeSize": settings.aws.disk_gb, "VolumeType": "gp3"}
    node: dict[str, Any] = {
        "InstanceType": machine.aws or ("g5.12xlarge" if machine.gpus else "m7i.4xlarge"),
        "IamInstanceProfile": {"Name": settings.aws.instance_profile},
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        # Only version 2 of the metadata service: what runs in a container cannot steal the node's role.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if spot:
        node["InstanceMarketOptions"] = {"MarketType": "spot"}
    return node


def _gcp_node(machine: Machine, spot: bool, settings: Settings) -> dict[str, Any]:
    disk = {"diskSizeGb": settings.gcp.disk_gb, "sourceImage": settings.gcp.source_image}
    account = f"{settings.gcp.service_account}@{settings.gcp.project}.iam.gserviceaccount.com"
    node: dict[str, Any] = {
        "machineType": machine.gcp or ("g2-standard-48" if machine.gpus else "n2-standard-16"),
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
        "serviceAccounts": [{"email": account, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}],
    }
    scheduling: dict[str, Any] = {}
    if machine.gpus:
        # Machines with a GPU cannot be moved while they run.
        scheduling["onHostMaintenance"] = "TERMINATE"
        if machine.gcp_accelerator:
            accelerator = f"projects/{settings.gcp.project}/zones/{settings.gcp.zone}/acceleratorTypes/"
            node["guestAccelerators"] = [
                {"acceleratorType": accelerator + machine.gcp_accelerator, "acceleratorCount": machine.gpus}
            ]
    if spot:
        scheduling["preemptible"] = True
    if scheduling:
        node["scheduling"] = [scheduling]
    return node
