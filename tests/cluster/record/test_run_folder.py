"""Run folders: run.json is checked when it is read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.record.run_folder import RunFolder, choose_run, find_run
from perceiver.config import UserError
from perceiver.tracking.record import HISTORY
from perceiver.tracking.runs import RunHandle, load_handle, save_handle


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


def test_runs_of_one_name_at_two_urls_have_two_local_folders(tmp_path: Path) -> None:
    """The local folder has the id of the run in MLflow, so a shared one would be a shared MLflow run."""
    places = ["s3://bucket/a", "s3://bucket/b", "memory://a", f"file://{tmp_path}/a", f"file://{tmp_path}/b"]
    found = [RunFolder(place, "small-001").local for place in places]
    assert len(set(found)) == len(places)
    assert found[3] == tmp_path / "a" / "small-001", "a file:// URL is local itself"
    assert RunFolder("s3://bucket/a/", "small-001").local == found[0]
    assert found[0].parent == found[1].parent, "they share the default store"


def test_a_new_run_takes_up_no_record_of_a_deleted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCEIVER_CACHE", str(tmp_path))
    folder = RunFolder(f"memory://{tmp_path.name}", "small-001")
    save_handle(folder.local, RunHandle("sqlite:///x", "e", "small-001", "key", 0, run_id="1"))
    (folder.local / HISTORY).write_text("{}\n")
    folder.set_aside_record()
    assert load_handle(folder.local) is None and not (folder.local / HISTORY).exists()
    assert len(list(folder.local.iterdir())) == 2, "nothing is deleted"


def test_the_parts_of_former_workers_are_removed_and_nothing_else(folder: RunFolder) -> None:
    written = ["part-00000.parquet", "part-00001.parquet", ".part-00001.parquet.tmp-1", "notes.txt"]
    for name in written:
        folder.write(f"predictions/{name}", "x")
    folder.remove_parts("predictions", workers=1)
    assert [name for name in written if not folder.exists(f"predictions/{name}")] == ["part-00001.parquet"]
    folder.remove_parts("nothing", workers=1)


@pytest.mark.parametrize("place", ["checkpoints", "logs", "predictions", "checkpoints/step-00000005", "report/x.png"])
def test_a_link_anywhere_in_a_run_is_refused_before_it_is_resumed(tmp_path: Path, place: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = RunFolder(str(tmp_path / "runs"), "small-001")
    folder.note(step=3)
    link = folder.local / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{link} is a link"):
        choose_run(folder.output, "small", resume=True)
    assert not list(elsewhere.iterdir())
