"""`python -m tests.compat [oldest=PYTHON] [newest=PYTHON]`: fast tests and quickstart on the ends of our ranges.

Each set has a separate environment, `build/compat/NAME`: the oldest one has the lower bounds of pyproject.toml
(`constraints-oldest.txt`), any other what pip resolves today. Prints one table; exit code 1 if something failed.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = ("ray", "deepspeed", "mlflow", "torch")
STEPS = 50
HEAD = ("set", "Python", *LIBRARIES, "fast tests", f"test loss after {STEPS} steps")


def install(name: str, interpreter: str) -> Path:
    """Make or complete the environment of a set; return its folder of programs."""
    place = ROOT / "build/compat" / name
    if not (place / "bin/python").exists():
        subprocess.run([interpreter, "-m", "venv", place], check=True)
    constraints = ["--constraint", "constraints-oldest.txt"] if name == "oldest" else []
    pip = [place / "bin/python", "-m", "pip", "install", "--quiet", "--upgrade"]
    subprocess.run([*pip, "pip"], check=True)  # that of Python 3.11 and 3.13 takes many minutes to find the versions
    for wanted in (".[train]", ".[test]"):  # what the tests need must not limit the versions of what the package needs
        subprocess.run([*pip, *constraints, "--editable", wanted], cwd=ROOT, check=True)
    return place / "bin"


def versions(programs: Path) -> list[str]:
    """Return the versions of Python and of the libraries in an environment."""
    code = "import platform, sys; from importlib.metadata import version; print(platform.python_version(), "
    code += "*map(version, sys.argv[1:]))"
    done = subprocess.run([programs / "python", "-c", code, *LIBRARIES], capture_output=True, text=True, check=True)
    return done.stdout.split()


def fast_tests(programs: Path) -> tuple[bool, str]:
    """Run the fast tests; return whether they passed, and their counts. Output: `build/compat/NAME/tests.log`."""
    command = [programs / "python", "-m", "pytest", "-m", "not slow", "-n", "2", "--dist", "loadfile", "-q"]
    with (programs.parent / "tests.log").open("w+") as log:
        code = subprocess.run(
            command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
        log.seek(0)
        counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", log.readlines()[-1])
    return code == 0, ", ".join(counts)


def quickstart(programs: Path) -> tuple[bool, str]:
    """Prepare the digits and train on them for a few steps; return whether that worked, and the loss at the end."""
    data, runs = programs.parent / "digits", programs.parent / "runs"
    keys = ["train.epochs=null", f"train.steps={STEPS}", f"data.url={data}", f"output={runs}"]
    prepare = [programs / "perceiver", "prepare", "digits", data]
    train = [programs / "perceiver", "train", "recipes/train/quickstart.yaml", *keys, "--json"]
    subprocess.run(prepare, cwd=ROOT, check=True, stdout=sys.stderr)
    done = subprocess.run(train, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return False, f"exit code {done.returncode}"
    return True, f"{json.loads(done.stdout.splitlines()[-1])['evaluation']['loss']:.4f}"


def main(sets: dict[str, str]) -> int:
    """Run the sets and print the table."""
    rows, passed = [], True
    for name, interpreter in sets.items():
        print(f"{time.strftime('%H:%M')} {name}: install, test, train", file=sys.stderr)
        programs = install(name, interpreter)
        (tests, counts), (job, loss) = fast_tests(programs), quickstart(programs)
        rows.append([name, *versions(programs), counts, loss])
        passed &= tests and job
    for row in [HEAD, ["---"] * len(HEAD), *rows]:
        print("| " + " | ".join(row) + " |")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(dict(word.split("=") for word in sys.argv[1:])))
