"""Run folders: run.json is checked when it is read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.record.run_folder import RunFolder, find_run
from perceiver.config import UserError


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}", "small-001")


def test_facts_are_read_as_they_were_noted(folder: RunFolder) -> None:
    assert folder.facts() == {}
    folder.note(step=3, evaluation={"loss": float("inf")}, mlflow_run=None, other=[1, {"a": None}])
    found = folder.facts()
    assert found["name"] == "small-001" and found["step"] == 3 and found["other"] == [1, {"a": None}]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "[" * 99_999, '{"a": 1, "a": 2}', "\ud800", '{"created": NaN}']
    + [
        json.dumps({key: value})
        for key, value in (
            ("step", -1),
            ("step", 1 << 70),
            ("step", 1.0),
            ("step", True),
            ("status", 1),
            ("evaluation", []),
            ("evaluation", {"a": None}),
            ("workers", [1]),
            ("data", {"name": "a", "licence": "b"}),
            ("data", {"name": "a", "licence": "b", "source": "c", "classes": [1]}),
            ("mlflow_run", 7),
            ("refusal", {}),
        )
    ],
)
def test_damaged_facts_are_one_line_that_names_the_file(folder: RunFolder, text: str) -> None:
    folder.write("run.json", text.encode(errors="surrogatepass"))
    for read in (folder.facts, lambda: folder.note(step=1), lambda: find_run(folder.output, "small", folder.name)):
        if text == "":
            continue
        with pytest.raises(UserError, match=r"small-001/run\.json ") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    folder = RunFolder(str(tmp_path), "small-001")
    path = Path(folder.url, "run.json")
    path.parent.mkdir()
    (tmp_path / "elsewhere").write_text("{}")
    make: dict[str, Any] = {"fifo": lambda: os.mkfifo(path), "folder": path.mkdir}
    make.get(kind, lambda: path.symlink_to(tmp_path / "elsewhere"))()
    with pytest.raises(UserError, match=r"run\.json"):
        folder.facts()
