"""What would stop a run here: each check looks at one thing and says what it found and what to do about it."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from cluster.doctor.report import FAIL, OK, WARN, Finding, Patient, Result
from cluster.doctor.run_checks import check_cluster, check_output, check_recipe_and_data, check_tracking, check_workers
from cluster.recipe.resources import machine_cpus
from perceiver.versions import ENGINES, unsupported_libraries, unsupported_python

GIB = 2**30
NCCL_S = 120
NCCL = """
import torch
parts = [torch.ones(1 << 20, device=index) for index in range(torch.cuda.device_count())]
torch.cuda.nccl.all_reduce(parts)
torch.cuda.synchronize()
assert all(part[-1].item() == len(parts) for part in parts), "an all-reduce gave a wrong sum"
"""


def examine(patient: Patient) -> Iterator[Finding]:
    """Yield one finding a check, as they are made. A check that breaks is itself a finding."""
    for check in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            state, found, fix = check(patient)
        except Exception as error:  # noqa: BLE001  a check must not stop the others
            state, found, fix = WARN, f"could not be looked at ({type(error).__name__}: {str(error)[:80]})", ""
        yield Finding(name, state, found, fix)


def check_python(patient: Patient) -> Result:
    """Compare this Python with what our package asks for."""
    version, wrong = platform.python_version(), unsupported_python()
    return (FAIL, wrong, "install our package with such a Python") if wrong else (OK, version, "")


def check_libraries(patient: Patient) -> Result:
    """Compare the installed libraries with what our package asks for."""
    wrong, fix = unsupported_libraries()
    if wrong:
        return FAIL, "; ".join(wrong), fix
    return OK, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ENGINES), ""


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
    """Look at the place of Ray's object store, as large as the recipe wants it."""
    if not patient.shm.is_dir():
        return WARN, f"no {patient.shm}", "Ray keeps its objects on disk then: slower"
    free, wanted = shutil.disk_usage(patient.shm).free, patient.cluster.store_mb * 1_000_000
    found = f"{free / 1e6:,.0f} MB free in {patient.shm}"
    if free >= wanted:
        return OK, found, ""
    return (
        WARN,
        f"{found}, cluster.object_store_mb = {patient.cluster.store_mb}: Ray keeps its objects on disk then",
        f"docker run --shm-size={patient.cluster.store_mb + 100}m, an emptyDir with medium: Memory on "
        "Kubernetes, or a smaller cluster.object_store_mb",
    )


def check_gpu(patient: Patient) -> Result:
    """Look for GPUs that torch can use."""
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return OK, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}", ""
    if shutil.which("nvidia-smi"):
        return FAIL, f"a driver, but torch {torch.__version__} cannot use it", "install a CUDA build of torch"
    if patient.cluster.gpus_per_worker:
        return (
            patient.stops,
            f"none here, the recipe wants {patient.cluster.gpus_per_worker:g} a worker",
            "run on nodes with GPUs (perceiver submit), or set cluster.gpus_per_worker=0",
        )
    return OK, "none: runs use the CPU", ""


def check_nccl(patient: Patient) -> Result:
    """Add up a small tensor over all GPUs of this machine, in a process of its own that may hang or crash."""
    import torch

    if not torch.cuda.is_available():
        return OK, "not needed without a GPU", ""
    if not torch.distributed.is_nccl_available():
        return FAIL, "none", "install a torch build with NCCL"
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
    fix = "NCCL_DEBUG=INFO says more; check the driver, /dev/shm and the links between the GPUs (nvidia-smi topo -m)"
    try:
        done = subprocess.run([sys.executable, "-c", NCCL], capture_output=True, text=True, timeout=NCCL_S, check=False)
    except subprocess.TimeoutExpired:
        return FAIL, f"NCCL {version}: an all-reduce did not end in {NCCL_S} s", fix
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return FAIL, f"NCCL {version}: {reason[:120]}", fix
    return OK, f"NCCL {version}, all-reduce over {torch.cuda.device_count()} GPU", ""


def check_compiler(patient: Patient) -> Result:
    """Look for the compiler of the CPU kernel."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))), None)
    return (OK, found, "") if found else (WARN, "none", "apt-get install g++: the fused kernel is left out without one")


def check_token(patient: Patient) -> Result:
    """Look at the token: that there is one, and at the mode of its file."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ:
        if not os.environ["RAY_AUTH_TOKEN"].strip():
            return FAIL, "RAY_AUTH_TOKEN is set to nothing", "unset it, or set it to the cluster's token"
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
    if not path.read_text().strip():
        return FAIL, f"{path} is empty", f"rm {path} (the next start makes one), or put the cluster's token there"
    return OK, f"{path}, mode {mode:04o}", ""


def check_ports(patient: Patient) -> Result:
    """See whether the ports that a cluster takes by default are free."""
    from cluster.runtime.local_cluster import running_cluster

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


CHECKS: tuple[Callable[[Patient], Result], ...] = (
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
    check_token,
    check_ports,
    check_cluster,
)
