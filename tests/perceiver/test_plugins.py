"""Plug-ins: what an installed package offers is there by name; clashes are refused, failures are one line."""

import json
from pathlib import Path

import pytest

from perceiver.cli.new import write_package
from perceiver.config import UserError
from perceiver.registry import KINDS
from tests.cluster.recipes import small_tree, write_recipe
from tests.installed import EXAMPLE, install, run_with, write_metadata

CONFIG = "from typing import Literal\nfrom perceiver.config import Config\nclass BadConfig(Config):\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a folder in which the example is installed."""
    return install(EXAMPLE, tmp_path / "site")


def test_what_a_package_offers_is_a_choice_of_recipes(site: Path, tmp_path: Path) -> None:
    """In keys, schema, checks and errors."""
    code = (
        "import json; from cluster.recipe.keys import recipe_keys, recipe_schema; from cluster.recipe.file import *\n"
        "from cluster.recipe.config import build_recipe, for_workers\n"
        "from cluster.jobs.plugins import needed_packages\n"
        "import yaml, sys; recipe = build_recipe(yaml.safe_load(open(sys.argv[1])))\n"
        "again = build_recipe(for_workers(recipe)); assert again.hooks == recipe.hooks and again.task == recipe.task\n"
        "kinds = [key.type for key in recipe_keys('task') if key.name == 'task.kind']\n"
        "keys = [key.name for key in recipe_keys('hooks')]\n"
        "defs = recipe_schema()['$defs']\n"
        "print(json.dumps([recipe.task.weight, recipe.hooks[0].every, kinds, keys, 'BrierConfig' in defs, "
        "needed_packages(recipe)]))"
    )
    tree = small_tree(tmp_path, "data")
    tree |= {"task": {"kind": "brier", "weight": 2}, "hooks": [{"kind": "step_log", "every": 3}]}
    recipe = write_recipe(tmp_path, tree)
    done = run_with(site, "-c", code, str(recipe))
    assert done.returncode == 0, done.stderr
    weight, every, kinds, keys, known, packages = json.loads(done.stdout)
    assert (weight, every, known, packages) == (2, 3, True, ["perceiver-example==0.1.0"])
    assert "brier" in kinds[0] and "classification" in kinds[0] and "hooks.*.every" in keys
    done = run_with(tmp_path / "nothing", "-m", "perceiver_train", "train", str(recipe))
    assert done.returncode == 2 and "task.kind = 'brier': wanted one of" in done.stderr


def test_without_the_package_a_hook_is_refused_in_one_line(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, "data") | {"hooks": [{"kind": "os.system"}]}
    done = run_with(tmp_path, "-m", "perceiver_train", "train", str(write_recipe(tmp_path, tree)))
    assert done.returncode == 2 and "no installed package offers hooks (perceiver.hooks)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_name_that_two_packages_offer_is_refused_with_both(site: Path) -> None:
    write_metadata(site, "other", "2.0", "[perceiver.tasks]\nbrier = perceiver_example.task:BrierConfig\n")
    done = run_with(site, "-c", "from perceiver.tasks import TaskConfig")
    assert "other==2.0 and perceiver-example==0.1.0 both offer the task 'brier'" in done.stderr


@pytest.mark.parametrize(
    ("group", "name", "kind"),
    [
        ("tasks", "classification", "task"),
        ("models", "perceiver_io", "model"),
        ("features", "label", "feature"),
        ("sources", "digits", "source"),
    ],
)
def test_a_name_of_ours_is_refused_before_anything_is_imported(
    tmp_path: Path, group: str, name: str, kind: str
) -> None:
    write_metadata(tmp_path, "other", "2.0", f"[perceiver.{group}]\n{name} = not_there:x\n")
    code = "import cluster.recipe.config; from pipelines.sources import source_names; source_names()"
    done = run_with(tmp_path, "-c", code)
    assert f"perceiver-train and other==2.0 both offer the {kind} {name!r}" in done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise SystemError('a\\nb')", "SystemError: a b"),
        ("BadConfig = 3", "wanted a subclass of perceiver.config.Config with kind and build"),
        (
            f"{CONFIG}    kind: Literal['x'] = 'x'\n    def build(self): ...",
            "its kind is 'x'",
        ),
    ],
)
def test_a_package_that_does_not_work_is_one_line_and_stops_no_other(site: Path, module: str, line: str) -> None:
    (site / "broken.py").write_text(module)
    write_metadata(site, "broken", "1.0", "[perceiver.tasks]\nbad = broken:BadConfig\n")
    code = "from perceiver import registry; import perceiver.tasks; print(*registry.members('perceiver.tasks'))"
    done = run_with(site, "-c", code)
    assert done.returncode == 0 and "brier" in done.stdout.split() and "bad" not in done.stdout.split()
    (said,) = done.stderr.splitlines()
    assert said.startswith("note: the task 'bad' of broken==1.0 is left out (broken:BadConfig: ") and line in said


def test_a_plug_in_may_be_imported_first(site: Path) -> None:
    code = "from perceiver_example.task import BrierConfig; from perceiver_example.hook import StepLogConfig\n"
    code += "from perceiver import registry; from cluster.recipe.config import Recipe\n"
    code += "print(registry.members('perceiver.tasks')['brier'] is BrierConfig, *registry.offered('hook'))"
    done = run_with(site, "-c", code)
    assert (done.stdout, done.stderr) == ("True step_log\n", "")


def test_a_new_package_of_each_kind_passes_its_test(tmp_path: Path) -> None:
    """Written by `perceiver new`, installed together."""
    site = tmp_path / "site"
    for kind in KINDS:
        install(write_package(kind, f"my_{kind}", tmp_path), site)
    tests = sorted(str(path) for path in tmp_path.glob("perceiver-my-*/tests"))
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    done = run_with(site, "-m", "pytest", *options, *tests)
    assert done.returncode == 0 and f"{len(KINDS)} passed" in done.stdout, done.stdout + done.stderr
    done = run_with(site, "-m", "perceiver_train", "prepare", "--help")
    assert "my_source" in done.stdout


def test_a_new_package_needs_a_plain_name_and_a_free_place(tmp_path: Path) -> None:
    write_package("task", "mine", tmp_path)
    for name, line in (("mine", "exists"), ("My-Task", "lower-case"), ("../x", "lower-case"), ("", "lower-case")):
        with pytest.raises(UserError, match=line):
            write_package("task", name, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("* valid).sum()", ").sum()", "a padding row changes the sum of loss"),
        ('{"loss": loss.detach(), ', '{"loss": loss, ', "sums have a gradient"),
        ('"accuracy": sums["right"]', '"accuracy": float("nan") * sums["right"]', "metrics are not finite"),
    ],
)
def test_the_contract_finds_mistakes(site: Path, old: str, new: str, line: str) -> None:
    file = site / "perceiver_example/task.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    code = (
        "import torch; from perceiver.testing import *; from perceiver_example.task import BrierConfig\n"
        "inputs = {'kind': 'points', 'points': 4, 'bands': 2}\n"
        "batch = {'points': torch.randn(4, 4, 3), 'label': torch.tensor([0, 1, 2, 1])}\n"
        "check_task(BrierConfig(), {'kind': 'perceiver', 'inputs': inputs, **SMALL_MODEL}, batch)"
    )
    done = run_with(site, "-c", code)
    assert f"AssertionError: {line}" in done.stderr
