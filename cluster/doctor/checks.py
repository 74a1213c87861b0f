"""Checks of a machine or cluster before a run: each one examines one thing, and reports the finding and a fix."""

import contextlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.recipe import preflight
from cluster.recipe.config import Recipe
from cluster.recipe.resources import CGROUP, SHARED_MEMORY, ClusterConfig, cpu_quota, visible_cpus
from cluster.runtime.local import check_reachable, socket_folder, token_file
from perceiver.config import UserError
from perceiver.environment import ENGINES, proxies, unsupported_libraries, unsupported_python
from perceiver.storage import cache_folder, first_line, is_local, open_url, write_whole
from perceiver.tracking.redaction import redact_text, resolve, server_address
from perceiver.tracking.runs import TrackingConfig
from pipelines.feed.ingest import check_files

GIB = 2**30
NCCL_S, ANSWER_S = 120, 5
"""Seconds for NCCL's all-reduce, and for a server's answer."""
NCCL = """
import torch
parts = [torch.ones(1 << 20, device=index) for index in range(torch.cuda.device_count())]
torch.cuda.nccl.all_reduce(parts)
torch.cuda.synchronize()
assert all(part[-1].item() == len(parts) for part in parts), "the all-reduce returned a wrong sum"
"""


FEW_FILES = 1024
"""Limit of open files that a run of several workers and data tasks may reach."""

OK, WARN, FAIL = "ok", "warn", "fail"

Result = tuple[str, str, str]
"""State, finding and fix of a check."""


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        check: name of the check.
        state: ``ok``, ``warn`` (a run may be slow or end early) or ``fail`` (a run cannot start).
        found: the finding.
        fix: what to change; empty if nothing.
    """

    check: str
    state: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Setup:
    """What the checks examine.

    Attributes:
        output: folder or URL of the runs.
        tracking: the recipe's tracking section.
        cluster: the recipe's cluster section.
        recipe: the recipe; None if the user gave none.
        nodes: connects to the cluster of ``--address`` and returns one line about it; None without an address.
        proc: the container's cgroup folder.
        shm: folder of the shared memory.
    """

    output: str = "runs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    recipe: Recipe | None = None
    nodes: Callable[[], str] | None = None
    proc: Path = field(default=CGROUP)
    shm: Path = field(default=SHARED_MEMORY)

    @property
    def stops(self) -> str:
        """State of a problem of this machine: only a warning if the run is to be submitted to another cluster."""
        return WARN if self.nodes else FAIL


def setup_of(recipe: Recipe | None, nodes: Callable[[], str] | None = None) -> Setup:
    """Return the setup of a recipe's run; without a recipe, the defaults."""
    if recipe is None:
        return Setup(nodes=nodes)
    return Setup(recipe.output, recipe.tracking, recipe.cluster, recipe, nodes)


def as_result(state: str, error: UserError) -> Result:
    """Return an error as a result; the text after its last colon is the fix."""
    text, _, fix = str(error).rpartition(": ")
    return state, text or str(error), fix if text else ""


def examine(setup: Setup) -> Iterator[Finding]:
    """Run the checks and yield their findings; a check that raises an exception is a warning."""
    for check in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            state, found, fix = check(setup)
        except Exception as error:  # noqa: BLE001  a check must not stop the others
            state, found, fix = WARN, f"could not be checked ({type(error).__name__}: {first_line(error, 80)})", ""
        yield Finding(name, state, found, fix)


def check_python(setup: Setup) -> Result:
    """Check the version of Python against the package's requirement."""
    version, wrong = platform.python_version(), unsupported_python()
    return (FAIL, wrong, "install the package with a supported Python") if wrong else (OK, version, "")


def check_libraries(setup: Setup) -> Result:
    """Check the versions of the installed libraries against the package's requirements."""
    wrong, fix = unsupported_libraries()
    if wrong:
        return FAIL, "; ".join(wrong), fix
    return OK, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ENGINES), ""


def check_cpus(setup: Setup) -> Result:
    """Compare the CPUs visible to this process with its container's quota."""
    seen, quota = visible_cpus(), cpu_quota(setup.proc)
    usable = seen if quota is None else min(seen, quota)
    found = f"{seen}" if usable == seen else f"{usable:g}, the container's quota; {seen} visible"
    return (OK, found, "") if usable >= 2 else (WARN, found, "training and decoding share one CPU: expect waiting")


def check_memory(setup: Setup) -> Result:
    """Check the free memory of this machine and container."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        limit = (setup.proc / "memory.max").read_text().strip()
        used = int((setup.proc / "memory.current").read_text())
        free = free if limit == "max" else min(free, int(limit) - used)
    fix = "" if free > 4 * GIB else "a worker takes about 1 GiB, Ray 0.5 GiB: use fewer workers, or end other programs"
    return (OK if free > 4 * GIB else WARN if free > 1.5 * GIB else FAIL), f"{free / GIB:.1f} GiB free", fix


def check_shared_memory(setup: Setup) -> Result:
    """Check that Ray's object store, as large as the recipe asks for, fits into shared memory."""
    if not setup.shm.is_dir():
        return WARN, f"no {setup.shm}", "Ray then stores objects on disk, which is slower"
    free, wanted = shutil.disk_usage(setup.shm).free, setup.cluster.store_mb * 1_000_000
    found = f"{free / 1e6:,.0f} MB free in {setup.shm}"
    if free >= wanted:
        return OK, found, ""
    return (
        WARN,
        f"{found}, cluster.object_store_mb = {setup.cluster.store_mb}: Ray then stores objects on disk",
        f"docker run --shm-size={setup.cluster.store_mb + 100}m, an emptyDir with medium: Memory on "
        "Kubernetes, or a smaller cluster.object_store_mb",
    )


def check_gpu(setup: Setup) -> Result:
    """Check for GPUs that torch can use."""
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return OK, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}", ""
    if shutil.which("nvidia-smi"):
        return FAIL, f"a GPU driver, but torch {torch.__version__} cannot use it", "install a CUDA build of torch"
    if setup.cluster.gpus_per_worker:
        return (
            setup.stops,
            f"none, the recipe asks for cluster.gpus_per_worker = {setup.cluster.gpus_per_worker:g}",
            "run on nodes with GPUs (perceiver submit), or set cluster.gpus_per_worker=0",
        )
    return OK, "none: runs use the CPU", ""


def check_nccl(setup: Setup) -> Result:
    """Run a small all-reduce over all GPUs of this machine, in a separate process because it may hang or crash."""
    import torch

    if not torch.cuda.is_available():
        return OK, "not needed without a GPU", ""
    if not torch.distributed.is_nccl_available():
        return FAIL, "none", "install a torch build with NCCL"
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
    fix = "set NCCL_DEBUG=INFO for details; check the driver, /dev/shm and the GPU links (nvidia-smi topo -m)"
    try:
        done = subprocess.run([sys.executable, "-c", NCCL], capture_output=True, text=True, timeout=NCCL_S, check=False)
    except subprocess.TimeoutExpired:
        return FAIL, f"NCCL {version}: an all-reduce did not finish within {NCCL_S} s", fix
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return FAIL, f"NCCL {version}: {reason[:120]}", fix
    return OK, f"NCCL {version}, all-reduce over {torch.cuda.device_count()} GPU", ""


def check_compiler(setup: Setup) -> Result:
    """Check for the C++ compiler that the fused CPU kernel needs."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))), None)
    return (OK, found, "") if found else (WARN, "none", "apt-get install g++: the fused kernel needs a compiler")


def check_caches(setup: Setup) -> Result:
    """Check that the folders of the cache and of the token, usually in the home folder, can be written."""
    for name, folder in (("PERCEIVER_CACHE", cache_folder()), ("RAY_AUTH_TOKEN_PATH", token_file().parent)):
        place = next(place for place in (folder, *folder.parents) if place.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            return WARN, f"{folder} cannot be written", f"set {name} to a place that can be written"
    return OK, f"{cache_folder()}", ""


def check_temporary_folder(setup: Setup) -> Result:
    """Check that the names of Ray's sockets in the temporary folder are short enough."""
    folder = tempfile.gettempdir()
    try:
        used = socket_folder()
    except UserError as error:
        return as_result(FAIL, error)
    if used == "/tmp" != folder and not os.environ.get("RAY_TMPDIR"):
        return WARN, f"{folder} is too long for Ray's sockets", "nothing, Ray uses /tmp; RAY_TMPDIR sets another folder"
    return OK, used, ""


def check_open_files(setup: Setup) -> Result:
    """Check the limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard) or hard >= FEW_FILES:
        return OK, f"{'unlimited' if soft == resource.RLIM_INFINITY else soft} at a time", ""
    return WARN, f"{hard} at a time, enough for few workers", f"ulimit -n {FEW_FILES}, or LimitNOFILE= in the service"


def check_proxies(setup: Setup) -> Result:
    """List the proxies of the environment."""
    if not (names := proxies()):
        return OK, "none", ""
    return OK, f"{', '.join(names)}; not for this machine, nor for no_proxy={os.environ.get('no_proxy', '')}", ""


def check_token(setup: Setup) -> Result:
    """Check Ray's authentication token and the mode of its file."""
    path = token_file()
    if "RAY_AUTH_TOKEN" in os.environ:
        if not os.environ["RAY_AUTH_TOKEN"].strip():
            return FAIL, "RAY_AUTH_TOKEN is empty", "unset it, or set it to the cluster's token"
        return WARN, "in RAY_AUTH_TOKEN", "process lists show it: use a file of mode 0600 and RAY_AUTH_TOKEN_PATH"
    if not path.is_file():
        return OK, "none yet: the first start creates it", ""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return FAIL, f"{path} has mode {mode:04o}: others can read it", f"chmod 600 {path}"
    if not path.read_text().strip():
        return FAIL, f"{path} is empty", f"rm {path} (the next start creates it), or write the cluster's token into it"
    return OK, f"{path}, mode {mode:04o}", ""


def check_ports(setup: Setup) -> Result:
    """Check that Ray's default ports for a cluster are free."""
    from cluster.runtime.local_cluster import running_cluster

    local = running_cluster()
    ours = {local.address.rpartition(":")[2], local.dashboard.rpartition(":")[2]} if local else set()
    taken = [port for port in (6379, 8265) if str(port) not in ours and _listens(port)]
    if taken:
        return WARN, f"{', '.join(map(str, taken))} in use by another program", "ray start --port / --dashboard-port"
    return OK, "6379 and 8265 are free" + (" or used by the local cluster" if local else ""), ""


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_disk(setup: Setup) -> Result:
    """Check the free disk space for runs and for Ray's sessions."""
    folders = {Path(tempfile.gettempdir())}
    if "://" not in setup.output:
        output = Path(setup.output).resolve()
        folders.add(next(folder for folder in (output, *output.parents) if folder.exists()))
    free, where = min((shutil.disk_usage(folder).free, str(folder)) for folder in folders)
    fix = "" if free > 10 * GIB else "delete old checkpoints, shards, or Ray's sessions in /tmp/ray"
    return (OK if free > 10 * GIB else WARN if free > GIB else FAIL), f"{free / GIB:.0f} GiB free in {where}", fix


def check_workers(setup: Setup) -> Result:
    """Check that the recipe's workers and data tasks fit on this machine, as ``perceiver train`` does."""
    if setup.recipe is None:
        return OK, "no recipe given", ""
    wanted = f"cluster.workers = {setup.cluster.workers}"
    try:
        if setup.nodes or setup.cluster.resolved_address():
            return OK, f"{wanted}, on the cluster's nodes", ""
        cpus, gpus = preflight.check_machine(setup.recipe)
    except UserError as error:
        return as_result(FAIL, error)
    return OK, f"{wanted} on {cpus} CPUs and {gpus} GPUs", ""


def check_recipe_and_data(setup: Setup) -> Result:
    """Check the recipe against its data: the manifest, the files that it lists, the model and the batch."""
    if setup.recipe is None:
        return OK, "no recipe given", ""
    try:
        model = preflight.check_recipe(setup.recipe)
        check_files(setup.recipe.data, model.manifest)
    except UserError as error:
        return as_result(setup.stops, error)
    rows = ", ".join(f"{split.samples:,} {name}" for name, split in model.manifest.splits.items())
    return OK, f"{redact_text(setup.recipe.data.url)}: {rows}; {model.parameters:,} parameters", ""


def check_output(setup: Setup) -> Result:
    """Write, read and delete a small file in the output folder."""
    shown = redact_text(setup.output)
    try:
        fs, path = open_url(f"{setup.output.rstrip('/')}/.doctor-{uuid.uuid4().hex}")
        parent = path.rsplit("/", 1)[0]
        made = not fs.exists(parent)
        write_whole(path, b"doctor", fs)
        same = fs.cat_file(path) == b"doctor"
        fs.rm_file(path)
        if made and is_local(fs):
            fs.rmdir(parent)
    except UserError as error:
        return as_result(FAIL, error)
    except Exception as error:  # noqa: BLE001  each store raises its own
        reason = redact_text(first_line(error, 120))
        return FAIL, f"{shown}: {reason}", "set output= to a writable folder or URL; check its credentials"
    return (OK, f"{shown}: written, read and deleted", "") if same else (FAIL, f"{shown}: read other bytes back", "")


def check_tracking(setup: Setup) -> Result:
    """Check that MLflow's server answers; if not, only ``tracking.required`` makes that a failure."""
    config = setup.tracking
    if not config.enabled:
        return OK, "off (tracking.enabled=false)", ""
    try:
        given = bool(config.uri or os.environ.get("MLFLOW_TRACKING_URI"))
        uri = resolve(config.store_uri(Path(setup.output)))
    except UserError as error:
        return as_result(setup.stops, error)
    if not given:
        return OK, "a SQLite file in the folder of the runs", ""
    if uri.startswith(("sqlite:", "databricks")):
        return OK, redact_text(uri), ""
    if (reason := _unreachable(uri)) is None:
        return OK, f"{redact_text(uri)} answers", ""
    fix = "start it, or correct MLFLOW_TRACKING_URI or tracking.uri"
    if config.required:
        return setup.stops, f"{redact_text(uri)} {reason}", f"{fix}, or set tracking.required=false"
    return WARN, f"{redact_text(uri)} {reason}", f"{fix}; runs record their metrics and send them later"


def _unreachable(uri: str) -> str | None:
    """Return why the server of a URI counts as down, or None if it answers."""
    import requests

    try:
        if uri.startswith(("http://", "https://")):
            answer = requests.get(f"{uri.rstrip('/')}/health", timeout=ANSWER_S)
            return None if answer.ok else f"answers with HTTP {answer.status_code}"
        host, port = server_address(uri, "tracking.uri")
        socket.create_connection((host, port or 0), timeout=ANSWER_S).close()
    except (OSError, requests.RequestException) as error:
        return f"does not answer ({type(error).__name__})"
    return None


def check_cluster(setup: Setup) -> Result:
    """Connect to the cluster, if there is one, and check that the recipe's workers fit on it."""
    try:
        if setup.nodes is not None:
            return OK, setup.nodes(), ""
        address = setup.cluster.resolved_address()
        if address is None:
            return OK, "none given: a run starts a local Ray instance", ""
        check_reachable(address)
    except UserError as error:
        return as_result(FAIL, error)
    return OK, f"{address} accepts connections; give --address to check the nodes and their resources", ""


CHECKS: tuple[Callable[[Setup], Result], ...] = (
    check_python,
    check_libraries,
    check_cpus,
    check_memory,
    check_shared_memory,
    check_gpu,
    check_nccl,
    check_compiler,
    check_workers,
    check_recipe_and_data,
    check_output,
    check_disk,
    check_tracking,
    check_caches,
    check_temporary_folder,
    check_open_files,
    check_proxies,
    check_token,
    check_ports,
    check_cluster,
)
