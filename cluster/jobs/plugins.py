"""Plug-ins of a job: packages that it takes along, and those that its recipe needs on the cluster."""

import configparser
import lzma
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import perceiver_train
from cluster.jobs.package import LIMIT_BYTES, check_size, may_be_secret
from perceiver import registry
from perceiver.config import Config, UserError, shown
from perceiver.tracking.redaction import contains_secret, secret_keys
from perceiver.yaml_reader import parse_yaml

PURE = "-none-any.whl"
MOST_FILES = 20_000
NO_SOURCES = shutil.ignore_patterns(".git", ".venv", "venv", "__pycache__", ".*_cache", "*.egg-info")
NO_TOP = shutil.ignore_patterns("build", "dist", "data", "runs", "mlruns")
"""Not copied from the top of a package's folder; folders of these names in the package itself are."""
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, RuntimeError, ValueError, EOFError)
"""What zipfile raises for damaged, encrypted and otherwise unreadable members."""
GROUPS = {registry.group(kind) for kind in registry.KINDS}


def unpack(place: str, target: Path) -> list[str]:
    """Unpack a plug-in into a folder; return its modules and its metadata, for ``py_modules`` of a runtime environment.

    Ray puts the folder of each of them on the workers' path, where Python finds the entry points. Nothing is installed,
    and the dependencies of the plug-in must be on the cluster.

    Args:
        place: a wheel without compiled parts, or the folder of a package with pyproject.toml, which is built here.
        target: an empty folder.

    Raises:
        UserError: it is neither, cannot be built, is too large, offers nothing, or a file of it has the name of one
            with secrets (see `cluster.jobs.package.SECRET_FILES`) or contains one.
    """
    path = Path(place)
    if path.is_dir() and (path / "pyproject.toml").is_file():
        with tempfile.TemporaryDirectory(prefix="perceiver-plugin-") as folder:
            _unzip(_build(path, Path(folder)), place, target)
    elif path.is_file() and path.name.endswith(PURE):
        _unzip(path, place, target)
    else:
        raise UserError(
            f"--plugin {place}: wanted a folder with pyproject.toml, or a wheel *{PURE}; one with compiled parts must "
            "be in the cluster's image"
        )
    check_size(target)
    _check_secrets(target, place)
    return sorted(str(item) for item in target.iterdir())


def needed_packages(recipe: Config) -> list[str]:
    """Return the packages, `name==version`, whose plug-ins a recipe names."""
    return sorted(registry.packages_of(set(_classes(recipe))))


def check_installed(packages: Collection[str]) -> None:
    """Raise a UserError if a package, `name==version`, is not installed here; for the start of a job."""
    if missing := [package for package in packages if not registry.installed(package)]:
        raise UserError(
            f"the cluster lacks {', '.join(missing)}, whose plug-ins the recipe uses: install it in the image, "
            "or submit with --plugin and its folder or wheel"
        )


def _check_secrets(target: Path, place: str) -> None:
    """Raise a UserError if an unpacked file has the name of one with secrets, or a text file contains one."""
    for file in sorted(target.rglob("*")):
        name = file.relative_to(target)
        if may_be_secret(file, target):
            raise UserError(f"--plugin {place}: {name} may contain secrets, and would be uploaded: remove it")
        content = file.read_bytes() if file.is_file() else b"\0"
        if b"\0" in content:
            continue  # not a text
        text = content.decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if contains_secret(line):
                raise UserError(f"--plugin {place}: {name}, line {number} contains a secret: remove it")
        for key in _secret_keys(text, name):
            raise UserError(f"--plugin {place}: {name}: {key} contains a secret: remove it")


def _secret_keys(text: str, file: Path) -> Iterator[str]:
    """Yield the keys of a YAML or JSON file whose values are secrets."""
    if file.suffix.lower() in (".yaml", ".yml", ".json"):
        try:
            yield from secret_keys(parse_yaml(text, str(file)))
        except UserError:  # not YAML: its lines were searched
            return


def _classes(value: Any) -> Iterator[type[Config]]:
    """Yield the class of each section of a recipe."""
    if isinstance(value, Config):
        yield type(value)
        for name in type(value).model_fields:
            yield from _classes(getattr(value, name))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _classes(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _classes(part)


def _build(source: Path, folder: Path) -> Path:
    """Build the wheel of a package from a copy of its folder; return the file."""
    copy = folder / "source"
    try:
        shutil.copytree(source, copy, symlinks=True, ignore=lambda at, names: _left_out(source, str(at), names))
    except OSError as error:  # shutil.Error too, with a list of files
        raise UserError(f"--plugin {source}: cannot be copied ({shown(str(error), 200)}): repair it") from None
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(copy)], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in done.stderr.splitlines() if line.strip().lower().startswith("error")), "")
        raise UserError(f"--plugin {source}: no wheel was built ({shown(reason, 200) or 'no message'}): see pip wheel")
    return wheels[0]


def _left_out(source: Path, folder: str, names: list[str]) -> set[str]:
    top = Path(folder).samefile(source)
    return NO_SOURCES(folder, names) | (NO_TOP(folder, names) if top else set())


def _unzip(wheel: Path, place: str, target: Path) -> None:
    """Unpack a wheel.

    Raises:
        UserError: it is no wheel of a plug-in.
    """
    if not wheel.name.endswith(PURE):
        raise UserError(f"--plugin {place}: it has compiled parts ({wheel.name}): install it in the cluster's image")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            size = sum(member.file_size for member in archive.infolist())
            if size > LIMIT_BYTES or len(names) > MOST_FILES:
                raise UserError(
                    f"--plugin {place}: it has {len(names):,} files of {size / 2**20:,.1f} MiB; wanted at most "
                    f"{MOST_FILES:,} of {LIMIT_BYTES / 2**20:.0f} MiB: install it in the cluster's image"
                )
            tops = {PurePosixPath(name).parts[0] for name in names if PurePosixPath(name).parts}
            wrong = [n for n in names if n.startswith("/") or ".." in PurePosixPath(n).parts or "\\" in n]
            wrong += [top for top in tops if top.endswith(".data")]
            if wrong:
                raise UserError(f"--plugin {place}: {shown(wrong[0])} in it cannot be placed: build the wheel again")
            if single := [name for name in names if "/" not in name]:  # Ray's job client takes folders only
                raise UserError(f"--plugin {place}: the module {single[0]} is a single file: make it a package")
            if ours := sorted(tops & {*perceiver_train.PACKAGES, perceiver_train.__name__}):
                raise UserError(f"--plugin {place}: it contains a package {ours[0]} as perceiver-train does: rename it")
            target.mkdir(parents=True)
            archive.extractall(target)
    except DAMAGED as error:
        raise UserError(f"--plugin {place}: not a wheel ({shown(str(error), 200)}): build it again") from None
    offered = configparser.ConfigParser(delimiters=("=",))
    try:
        offered.read(target.glob("*.dist-info/entry_points.txt"), encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"--plugin {place}: its entry_points.txt cannot be read ({shown(str(error), 200)}): build it again"
        ) from None
    if GROUPS.isdisjoint(offered.sections()):
        raise UserError(f"--plugin {place}: it offers nothing: no entry points {', '.join(sorted(GROUPS))}")
