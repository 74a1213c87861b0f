"""Plug-ins that travel with a job, and those that a cluster lacks."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cluster.jobs import entrypoint as job
from cluster.jobs.plugins import check_installed, unpack
from perceiver.config import UserError
from tests.installed import EXAMPLE


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what a job takes along of the example, built from its folder."""
    return unpack(str(EXAMPLE), tmp_path_factory.mktemp("job") / "plugin-0")


def test_a_folder_is_built_and_found_on_the_path_of_a_worker(modules: list[str], tmp_path: Path) -> None:
    """Ray unpacks each entry of ``py_modules`` in a folder of its own, which it adds to the path."""
    assert [Path(module).name for module in modules] == ["perceiver_example", "perceiver_example-0.1.0.dist-info"]
    assert sorted(path.name for path in EXAMPLE.iterdir()) == ["perceiver_example", "pyproject.toml"]
    places = []
    for number, module in enumerate(modules):
        places.append(str(tmp_path / str(number)))
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / Path(module).name).symlink_to(module)
    code = "from perceiver.tasks import TaskConfig; from perceiver import registry; print(*registry.offered('task'))"
    code += "; from cluster.jobs.plugins import check_installed; check_installed(['perceiver-example==0.1.0'])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["brier"], done.stderr


def write_wheel(folder: Path, files: dict[str, str], name: str = "mine-1.0-py3-none-any.whl") -> str:
    """Write a wheel with files."""
    with zipfile.ZipFile(folder / name, "w") as archive:
        for place, text in files.items():
            archive.writestr(place, text)
    return str(folder / name)


POINTS = {"mine-1.0.dist-info/entry_points.txt": "[perceiver.tasks]\nmine = mine:Config\n"}


def test_a_wheel_is_unpacked(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, {"mine/__init__.py": "", **POINTS})
    assert [Path(module).name for module in unpack(wheel, tmp_path / "out")] == ["mine", "mine-1.0.dist-info"]


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"mine/__init__.py": ""}, "it offers nothing"),
        ({"mine.py": "", **POINTS}, "mine.py is a single file"),
        ({"../mine.py": "", **POINTS}, "cannot be placed"),
        ({"/mine.py": "", **POINTS}, "cannot be placed"),
        ({"mine-1.0.data/scripts/x": "", **POINTS}, "cannot be placed"),
        ({"perceiver/tasks/x.py": "", **POINTS}, "it contains a package perceiver"),
        ({"mine/.env": "A=1\n", **POINTS}, "mine/.env may contain secrets"),
        ({"mine/id_rsa": "x", **POINTS}, "mine/id_rsa may contain secrets"),
        ({"mine/conf.yaml": "a: 1\npassword: s3cret-Value\n", **POINTS}, "mine/conf.yaml, line 2 contains a secret"),
        ({"mine/conf.yaml": "password:\n  [s3cret-Value]\n", **POINTS}, "conf.yaml: password.0 contains a secret"),
        ({"mine/a.py": "", "mine-1.0.dist-info/entry_points.txt": "[x\n"}, "its entry_points.txt cannot be read"),
        ({"mine/__init__.py": "KEY = 'AKIAIOSFODNN7EXAMPLE'\n", **POINTS}, "__init__.py, line 1 contains a secret"),
    ],
)
def test_a_wheel_that_is_no_plug_in_is_refused(tmp_path: Path, files: dict[str, str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        unpack(write_wheel(tmp_path, files), tmp_path / "out")
    assert not (tmp_path / "mine.py").exists()


def test_a_wheel_is_checked_before_it_is_unpacked(tmp_path: Path) -> None:
    name = str(tmp_path / "mine-1.0-py3-none-any.whl")
    with zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(2):
            archive.writestr(f"mine/{number}", bytes(60 * 2**20))
    with pytest.raises(UserError, match="2 files of 120.0 MiB; wanted at most"):
        unpack(name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    content = zipped = Path(write_wheel(tmp_path, {"mine/a.py": "text" * 50, **POINTS})).read_bytes()
    encrypted = bytearray(zipped)
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        encrypted[content.index(signature) + flags] |= 1
    with zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mine/a.py", "text" * 50)
    damaged = bytearray(Path(name).read_bytes())
    damaged[39:44] = b"\xff" * 5  # after a header of 30 bytes and a name of 9
    for broken in (encrypted, damaged):
        Path(name).write_bytes(broken)
        with pytest.raises(UserError, match="not a wheel"):
            unpack(name, tmp_path / "out")


def test_what_is_neither_a_folder_nor_a_pure_wheel_is_refused(tmp_path: Path) -> None:
    compiled = write_wheel(tmp_path, POINTS, "mine-1.0-cp311-cp311-linux_x86_64.whl")
    (tmp_path / "bad-1.0-py3-none-any.whl").write_bytes(b"x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/pyproject.toml").write_text("[build-system]\nrequires = []\nbuild-backend = 'none'\n")
    for place, line in (
        (compiled, "compiled parts"),
        (str(tmp_path), "wanted a folder with pyproject.toml"),
        (str(tmp_path / "gone.whl"), "wanted a folder"),
        (str(tmp_path / "bad-1.0-py3-none-any.whl"), "not a wheel"),
        (str(tmp_path / "broken"), "no wheel was built"),
    ):
        with pytest.raises(UserError, match=line):
            unpack(place, tmp_path / "out")


def test_a_job_names_the_packages_that_the_cluster_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run", "a", "--output", str(tmp_path), "--packages", "numpy==0.1,gone==1.0", "train", "x.yaml"]
    assert job.main(words) == 2
    assert "lacks numpy==0.1, gone==1.0, whose plug-ins the recipe uses" in capsys.readouterr().err
    check_installed([])
