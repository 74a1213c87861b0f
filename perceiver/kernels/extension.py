"""Compiles the C++ files to a shared library, once per user and type of machine, and loads it."""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from perceiver.storage import cache_folder

log = logging.getLogger(__name__)
SOURCES = tuple(Path(__file__).with_name(name) for name in ("separable.cpp", "attention.cpp"))
HEADER = Path(__file__).with_name("vector.h")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
BUILD_SECONDS = 120
WAIT_SECONDS = BUILD_SECONDS


@cache
def load() -> ctypes.CDLL | None:
    """Return the library, built if it is not in the cache; None if that fails."""
    if os.environ.get("PERCEIVER_KERNELS", "1") == "0":
        return None
    try:
        path = library()
        return None if path is None else ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("the compiled kernels are not used: %s", error)
        return None


def library() -> Path | None:
    """Return the built library's path, None without a compiler or if another process takes too long to build.

    Raises:
        OSError, subprocess.SubprocessError: the build fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++") or shutil.which("clang++")
    if compiler is None or platform.system() != "Linux":
        return None
    flags = (*FLAGS, f"-DLANES={_lanes()}")
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, HEADER)]
    key = hashlib.sha256("\n".join([*texts, _identity(compiler), *flags, _cpu()]).encode()).hexdigest()[:20]
    folder = cache_folder("kernels")
    path = folder / f"kernels-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _lock(folder / f"{key}.lock") as held:
        if path.exists():
            return path
        if not held:
            return None
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            command = [compiler, *flags, *map(str, SOURCES), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=BUILD_SECONDS)
            built.rename(path)
    return path


def _identity(compiler: str) -> str:
    """Return a compiler's file with size and time, so that another version at the same place builds again."""
    path = Path(compiler).resolve()
    facts = path.stat()
    return f"{path} {facts.st_size} {facts.st_mtime_ns}"


def _cpu_lines() -> list[str]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return []


def _cpu() -> str:
    return platform.machine() + "".join(_cpu_lines())


def _lanes() -> int:
    """Return the number of floats in a vector register: 16 with AVX-512, else 8."""
    return 16 if any("avx512f" in line for line in _cpu_lines()) else 8


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Lock a file between processes; yield False if that takes longer than WAIT_SECONDS."""
    import fcntl

    with path.open("w") as file:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield False
                    return
                time.sleep(0.1)
        yield True
