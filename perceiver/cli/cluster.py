"""`perceiver cluster`: a local cluster of several nodes, and files that start a real one."""

from pathlib import Path

import click

from perceiver.cli._types import LocalPath
from perceiver.tracking.printable import say, say_json


@click.group(
    epilog="""\b
Examples:
  perceiver cluster up --nodes 3
  perceiver cluster render slurm recipes/train/quickstart.yaml -o files
  perceiver cluster down"""
)
def command() -> None:
    """Manage a local Ray cluster, or write files for a real one."""


@command.command(
    epilog="""\b
Examples:
  perceiver cluster up
  perceiver cluster up --nodes 4 --cpus 1
  perceiver cluster up recipes/cluster/mixed.yaml"""
)
@click.argument("file", required=False, type=click.Path())
@click.option("--nodes", type=click.IntRange(1, 250), help="Number of identical nodes; default: 3.")
@click.option("--cpus", type=click.IntRange(0, 10_000), help="Logical CPUs of each node; default: the machine's.")
@click.option("--json", "as_json", is_flag=True, help="Print the cluster as one JSON line.")
def up(file: str | None, nodes: int | None, cpus: int | None, as_json: bool) -> int:
    """Start a local cluster, or restart its dead nodes.

    FILE describes nodes that differ in CPUs, GPUs, labels and custom resources; the hardware need not exist. A running
    cluster is not changed: a request for other nodes is refused.
    """
    from cluster.runtime.local_cluster import NodeGroup, NodesConfig, equivalent, read_nodes
    from cluster.runtime.local_cluster import up as start
    from perceiver.config import UserError

    if file and (nodes or cpus is not None):
        raise UserError(f"{file} describes the nodes: remove --nodes and --cpus")
    config = read_nodes(file) if file else None
    if nodes or cpus is not None:
        config = NodesConfig(nodes=(NodeGroup(count=nodes or 3, cpus=cpus),))
    cluster = start(config, (lambda line: None) if as_json else say)
    if as_json:
        say_json({"address": cluster.dashboard, "ray": cluster.address, "nodes": cluster.nodes})
        return 0
    say(f"dashboard and jobs  {cluster.dashboard}   (found by perceiver submit and the other job commands)")
    say(f"ray                 RAY_AUTH_MODE=token RAY_ADDRESS={cluster.address}")
    say("the same on real machines, with the same token in ~/.ray/auth_token (mode 0600) on each:")
    for line in equivalent(cluster):
        say(f"  {line}")
    return 0


@command.command()
def down() -> int:
    """Stop the local cluster and everything that runs on it."""
    from cluster.runtime.local_cluster import down as stop

    ended = stop()
    say(f"terminated {ended} processes" if ended else "no local cluster is running")
    return 0


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print the nodes as one JSON line.")
def status(as_json: bool) -> int:
    """Show the nodes of the local cluster: resources, labels and process."""
    from cluster.jobs.commands import list_jobs
    from cluster.jobs.server import Access, connect
    from cluster.runtime.local_cluster import running_cluster
    from perceiver.config import UserError

    cluster = running_cluster()
    if cluster is None:
        raise UserError("no local cluster is running: start one with perceiver cluster up")
    server = connect(Access(cluster.dashboard))
    raylets, alive = cluster.raylets(), {node.name: node for node in server.nodes()}
    jobs = [job.name for job in list_jobs(server) if job.live]
    rows = [
        {
            "node": node["ip"],
            "pid": raylets.get(node["ip"]),
            "alive": node["ip"] in raylets and node["ip"] in alive,
            "options": node["options"],
        }
        for node in cluster.nodes
    ]
    if as_json:
        say_json({"address": cluster.dashboard, "ray": cluster.address, "nodes": rows, "jobs": jobs})
        return 0
    say(f"{cluster.dashboard}, {sum(row['alive'] for row in rows)} of {len(rows)} nodes")
    for row in rows:
        state = f"pid {row['pid']}" if row["alive"] else "dead"
        say(f"  {row['node']:<12} {state:<12} {' '.join(row['options'])}")
    say(f"live jobs: {', '.join(jobs) or 'none'}")
    return 0


@command.command(
    epilog="""\b
Examples:
  perceiver cluster render kuberay recipes/train/quickstart.yaml data.url=s3://b/digits output=s3://b/runs -o deploy
  perceiver cluster render slurm recipes/train/quickstart.yaml --machines recipes/cluster/gpu.yaml -o deploy"""
)
@click.argument("kind", metavar="KIND")
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "-o",
    "--output",
    "folder",
    type=LocalPath(folder=True),
    required=True,
    metavar="FOLDER",
    help="Folder to write to.",
)
@click.option(
    "--machines",
    default="recipes/cluster/gpu.yaml",
    show_default=True,
    metavar="FILE",
    help="Description of the machines of the cluster.",
)
def render(kind: str, recipe: str, overrides: tuple[str, ...], folder: Path, machines: str) -> int:
    """Write the files that start a real cluster for RECIPE.

    KIND is kuberay, autoscaler-aws, autoscaler-gcp, slurm, docker, compose or grafana (a dashboard of the runs' metrics
    on Ray's Prometheus endpoint). The first lines of each file, except the dashboard, describe how to use it; the
    commands there repeat the overrides. Nodes of kuberay and the autoscalers cannot read folders of this machine: data
    and output must be URLs, or absolute paths on shared storage.
    """
    from cluster.deploy.render import read_recipe_file, write
    from cluster.deploy.render import render as make
    from cluster.deploy.settings import read_settings

    files = make(kind, read_recipe_file(recipe, overrides), read_settings(machines), str(folder), say)
    for path in write(files, str(folder)):
        say(str(path))
    return 0
