"""Checks of the paths in a recipe: which of them refer to the same files on a cluster as here."""

import os
import socket
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from cluster.jobs.package import is_named_file, path_in_package
from cluster.recipe.config import Recipe
from cluster.recipe.placement import Node
from cluster.runtime.local_cluster import running_cluster
from perceiver.config import UserError
from perceiver.tracking.redaction import is_reference

STORE = "MLFLOW_TRACKING_URI"


def is_here(nodes: Sequence[Node], url: str) -> bool:
    """Return whether all nodes of a cluster run on this machine, so that they see the same files.

    Every machine has the loopback addresses, so they count only if the job server is that of the local cluster: behind
    a tunnel, nodes of another machine have the same addresses.

    Args:
        nodes: nodes of the cluster.
        url: of its job server.
    """
    own = {a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET}
    own = {address for address in own if not address.startswith("127.")}
    local = running_cluster()
    if local is not None and _same_server(url, local.dashboard):
        own |= {str(node["ip"]) for node in local.nodes}
    return all(node.name in own for node in nodes)


def _same_server(url: str, other: str) -> bool:
    one, two = urlsplit(url), urlsplit(other)
    names = {"localhost": "127.0.0.1"}
    return (names.get(one.hostname or "", one.hostname), one.port) == (two.hostname, two.port)


def check_paths(recipe: Recipe, here: bool, url: str) -> Iterator[str]:
    """Yield a warning for each path that all nodes must share.

    Raises:
        UserError: a relative path, which other machines cannot resolve.
    """
    if here:
        return
    for key, place in _places(recipe):
        path = place.removeprefix("file://").removeprefix("local://")
        if "://" in path:
            continue
        if not Path(path).is_absolute():
            raise UserError(
                f"{key} = {place} is a path on this machine, which the nodes of {url} do not see: set {key} to a URL "
                "such as s3://bucket/folder, or to an absolute path of shared storage"
            )
        yield f"note: {key} = {place} must be the same storage on every node"
    uri = recipe.tracking.uri or ""
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raise UserError(f"tracking.uri = {uri} is a file on this machine: set it to the URL of an MLflow server")
    if is_reference(uri) and uri.startswith("file:") and not Path(uri.removeprefix("file:")).is_absolute():
        raise UserError(
            f"tracking.uri = {uri} is a file on this machine: set it to the absolute path of a file on the nodes"
        )


def _places(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield key and value of each path or URL that the job reads or writes outside its package."""
    yield "data.url", recipe.data.url
    for number, part in enumerate(recipe.data.mixture):
        yield f"data.mixture.{number}.url", part.url
    yield "output", recipe.output
    yield from recipe.train.initial_places().items()
    if recipe.tracking.artifact_root:
        yield "tracking.artifact_root", recipe.tracking.artifact_root
    settings = recipe.deepspeed.config
    if isinstance(settings, str) and not _is_packaged(settings):
        yield "deepspeed.config", settings


def _is_packaged(file: str) -> bool:
    """Return whether a file is part of the package, at the path that the recipe names."""
    return is_named_file(file) and path_in_package(file) == os.path.normpath(file)


def tracking_note(recipe: Recipe, here: bool, known: Collection[str]) -> str:
    """Return a warning if the MLflow store would be on the disk of the node that runs the job, otherwise "".

    Args:
        recipe: of the job.
        here: whether the cluster is this machine.
        known: names of the environment variables that the job certainly has.
    """
    tracking = recipe.tracking
    if here or "://" not in recipe.output or not tracking.enabled or tracking.uri or STORE in known:
        return ""
    return (
        f"note: no tracking.uri: unless {STORE} is set on the nodes, MLflow's store is a file on the node that runs "
        "the job, and a later job on another node cannot continue the MLflow run: set tracking.uri to an MLflow "
        f"server, or name the variable with --secret {STORE}"
    )
