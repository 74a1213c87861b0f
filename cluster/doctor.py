"""What would stop a run here: each check looks at one thing and says what it found and what to do about it."""

import contextlib
import importlib.metadata
import os
import shutil
import socket
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.local import machine_cpus
from cluster.package import DISTRIBUTION
from cluster.recipe import Recipe
from perceiver.config import UserError
from perceiver.train.redaction import redact_text, resolve

GIB = 2**30
ANSWER_S = 5
OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        state: ``ok``, ``warn`` (a run may be slow or end early) or ``fail`` (it will not start).
        found: what there is.
        fix: what to do; empty if nothing.
    """

    check: str
    state: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Patient:
    """What is looked at.

    Attributes:
        output: where runs are to be written.
        tracking: MLflow's URI; empty for the default, a file beside the runs.
        gpus_per_worker: what the recipe wants of each worker.
        nodes: a function that connects to the cluster and returns one line about it, or None.
    """

    output: str = "runs"
    tracking: str = ""
    gpus_per_worker: float = 0
    nodes: Callable[[], str] | None = None
    proc: Path = field(default=Path("/sys/fs/cgroup"))
    shm: Path = field(default=Path("/dev/shm"))


def patient_of(recipe: Recipe | None, nodes: Callable[[], str] | None = None) -> Patient:
    """Return what a recipe's run touches; without a recipe, the defaults."""
    tracking = (recipe.tracking.uri if recipe else "") or os.environ.get("MLFLOW_TRACKING_URI", "")
    if recipe is None:
        return Patient(tracking=tracking, nodes=nodes)
    return Patient(recipe.output, tracking, recipe.cluster.gpus_per_worker, nodes)


def examine(patient: Patient) -> Iterator[Finding]:
    """Yield one finding a check, as they are made. A check that breaks is itself a finding."""
    for check in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            state, found, fix = check(patient)
        except Exception as error:  # noqa: BLE001  a check must not stop the others
            state, found, fix = WARN, f"could not be looked at ({type(error).__name__}: {str(error)[:80]})", ""
        yield Finding(name, state, found, fix)


Result = tuple[str, str, str]


def check_python(patient: Patient) -> Result:
    """Compare this Python with what our package asks for."""
    wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    version = ".".join(map(str, sys.version_info[:3]))
    good = SpecifierSet(wanted).contains(version)
    return (OK if good else FAIL), version, "" if good else f"use Python {wanted}"


def check_libraries(patient: Patient) -> Result:
    """Compare the installed libraries with what our package asks for."""
    wrong = []
    needs = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    for need in needs:
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version} is not {need.specifier}")
    if wrong:
        return FAIL, "; ".join(wrong), "pip install -c constraints.txt -e . (make setup)"
    shown = ("ray", "torch", "deepspeed", "mlflow")
    return OK, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in shown), ""


def check_cpus(patient: Patient) -> Result:
    """Compare the CPUs that this process sees with what its container may use."""
    seen, quota = machine_cpus(), None
    with contextlib.suppress(OSError, ValueError):
        limit, period = (patient.proc / "cpu.max").read_text().split()
        quota = None if limit == "max" else int(limit) / int(period)
    if quota is not None and quota < seen:
        return (
            WARN,
            f"{seen} seen, but the container may use {quota:g}",
            f"set cluster.workers and data.tasks for {quota:g} CPUs, or raise the limit",
        )
    return (
        (OK if seen > 1 else WARN),
        f"{seen}",
        "" if seen > 1 else "one CPU trains and decodes by turns: expect waiting",
    )


def check_memory(patient: Patient) -> Result:
    """Look at the memory that is free here and in this container."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        limit = (patient.proc / "memory.max").read_text().strip()
        used = int((patient.proc / "memory.current").read_text())
        free = free if limit == "max" else min(free, int(limit) - used)
    fix = "" if free > 4 * GIB else "a worker takes about 1 GiB, Ray 0.5 GiB: fewer workers, or end other programs"
    return (OK if free > 4 * GIB else WARN if free > 1.5 * GIB else FAIL), f"{free / GIB:.1f} GiB free", fix


def check_shared_memory(patient: Patient) -> Result:
    """Look at the place of Ray's object store."""
    if not patient.shm.is_dir():
        return WARN, f"no {patient.shm}", "Ray keeps its objects on disk then: slower"
    free = shutil.disk_usage(patient.shm).free
    fix = "" if free > GIB else "docker run --shm-size=2g, or an emptyDir with medium: Memory on Kubernetes"
    return (OK if free > GIB else WARN), f"{free / GIB:.1f} GiB free in {patient.shm}", fix


def check_gpu(patient: Patient) -> Result:
    """Look for GPUs that torch can use, and for NCCL."""
    import torch

    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"  # type: ignore[attr-defined]
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        found = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}, NCCL {nccl}"
        return (FAIL if nccl == "none" else OK), found, "install a torch build with NCCL" if nccl == "none" else ""
    if shutil.which("nvidia-smi"):
        return FAIL, f"a driver, but torch {torch.__version__} cannot use it", "install a CUDA build of torch"
    if patient.gpus_per_worker:
        return (
            WARN if patient.nodes else FAIL,
            f"none here, the recipe wants {patient.gpus_per_worker:g} a worker",
            "run on nodes with GPUs (perceiver submit), or set cluster.gpus_per_worker=0",
        )
    return OK, "none: runs use the CPU", ""


def check_compiler(patient: Patient) -> Result:
    """Look for the compiler of the CPU kernel."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))), None)
    return (OK, found, "") if found else (WARN, "none", "apt-get install g++: the fused kernel is left out without one")


def check_output(patient: Patient) -> Result:
    """Write, read and delete a small object where runs are to go."""
    import fsspec

    place = f"{patient.output.rstrip('/')}/.doctor-{uuid.uuid4().hex}"
    shown = redact_text(patient.output)
    try:
        fs, path = fsspec.core.url_to_fs(place)
        parent = path.rsplit("/", 1)[0]
        made = not fs.exists(parent)
        fs.makedirs(parent, exist_ok=True)
        fs.pipe_file(path, b"doctor")
        same = fs.cat_file(path) == b"doctor"
        fs.rm_file(path)
        if made and "file" in fs.protocol:
            fs.rmdir(parent)
    except ImportError as error:
        return FAIL, f"{shown}: {error}", "pip install 'perceiver-train[s3]'"
    except Exception as error:  # noqa: BLE001  each store raises its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        return (
            FAIL,
            f"{shown}: {redact_text(reason)}",
            "set output= to a place that you may write to; check its credentials",
        )
    return (OK, f"{shown}: written, read and deleted", "") if same else (FAIL, f"{shown}: read something else", "")


def check_tracking(patient: Patient) -> Result:
    """Ask MLflow's server whether it is there."""
    import requests

    uri = resolve(patient.tracking)
    if not uri or uri.startswith(("sqlite:", "file:", "/", ".")):
        return OK, redact_text(uri) or "a SQLite file beside the runs", ""
    shown = redact_text(uri)
    fix = "start it, or correct MLFLOW_TRACKING_URI or tracking.uri; runs spool their figures meanwhile"
    parts = urlsplit(uri)
    try:
        if parts.scheme in ("http", "https"):
            answer = requests.get(f"{uri.rstrip('/')}/health", timeout=ANSWER_S)
            return (OK, f"{shown} answers", "") if answer.ok else (WARN, f"{shown}: HTTP {answer.status_code}", fix)
        port = parts.port or {"postgresql": 5432, "mysql": 3306}.get(parts.scheme.partition("+")[0], 0)
        socket.create_connection((parts.hostname or "", port), timeout=ANSWER_S).close()
    except (OSError, requests.RequestException) as error:
        return WARN, f"{shown} does not answer ({type(error).__name__})", fix
    return OK, f"{shown} answers", ""


def check_token(patient: Patient) -> Result:
    """Look at the mode of the file with the token."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ:
        return (
            WARN,
            "in RAY_AUTH_TOKEN",
            "a file of mode 0600 named by RAY_AUTH_TOKEN_PATH does not show in process lists",
        )
    if not path.is_file():
        return OK, "none yet: the first start makes it", ""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return FAIL, f"{path} has mode {mode:04o}: others can read it", f"chmod 600 {path}"
    return OK, f"{path}, mode {mode:04o}", ""


def check_ports(patient: Patient) -> Result:
    """See whether the ports that a cluster takes by default are free."""
    from cluster.nodes import running_cluster

    local = running_cluster()
    ours = {local.address.rpartition(":")[2], local.dashboard.rpartition(":")[2]} if local else set()
    taken = [port for port in (6379, 8265) if str(port) not in ours and _listens(port)]
    if taken:
        return WARN, f"{', '.join(map(str, taken))} taken by another program", "ray start --port / --dashboard-port"
    return OK, "6379 and 8265 are free" + (" or our local cluster's" if local else ""), ""


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_disk(patient: Patient) -> Result:
    """Look at the disks of runs and of Ray's sessions."""
    places = {Path(tempfile.gettempdir())}
    if "://" not in patient.output:
        places.add(
            next(p for p in [Path(patient.output).resolve(), *Path(patient.output).resolve().parents] if p.exists())
        )
    free, where = min((shutil.disk_usage(place).free, str(place)) for place in places)
    fix = "" if free > 10 * GIB else "make room: checkpoints, shards, and Ray's sessions in /tmp/ray"
    return (OK if free > 10 * GIB else WARN if free > GIB else FAIL), f"{free / GIB:.0f} GiB free at {where}", fix


def check_cluster(patient: Patient) -> Result:
    """Ask the cluster who it is."""
    if patient.nodes is None:
        return OK, "none asked about: runs start a Ray of their own", ""
    try:
        return OK, patient.nodes(), ""
    except UserError as error:
        text, _, fix = str(error).rpartition(": ")
        return FAIL, text or str(error), fix if text else ""


CHECKS: tuple[Callable[[Patient], Result], ...] = (
    check_python,
    check_libraries,
    check_cpus,
    check_memory,
    check_shared_memory,
    check_gpu,
    check_compiler,
    check_output,
    check_disk,
    check_tracking,
    check_token,
    check_ports,
    check_cluster,
)
