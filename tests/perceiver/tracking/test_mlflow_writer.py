"""What arrives in a real MLflow store: each row of a record once, whatever fails in between."""

import json
import math
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml

from perceiver.config import UserError
from perceiver.export.checkpoint_model import CheckpointModel
from perceiver.tracking import mlflow_writer
from perceiver.tracking.mlflow_writer import RefusedError, RunWriter, clean_key, make_client, open_run
from perceiver.tracking.record import HISTORY, NOTES, SENT, SYSTEM, LineWriter, unsent
from perceiver.tracking.runs import RunHandle, load_handle
from tests.perceiver.export.test_formats import SMALL, run_folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a SQLite store shared by the tests of this file, since making one takes a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def client(store: str) -> Any:
    return make_client(store)


def new_handle(uri: str, **fields: Any) -> RunHandle:
    fields = {"experiment": "direct", "name": "a run", "key": uuid.uuid4().hex, "created_ms": 1, **fields}
    return RunHandle(uri=uri, **fields)


def record(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    """Append rows to a file of the record; rows of metrics get a time by their position."""
    writer = LineWriter(folder / name)
    for number, row in enumerate(rows):
        writer.append({"time": 1000.0 + number, **row})
    writer.close()


def points(client: Any, folder: Path, key: str) -> list[tuple[int, float]]:
    handle = load_handle(folder)
    assert handle is not None
    return [(metric.step, metric.value) for metric in client.get_metric_history(handle.run_id, key)]


def run_of(client: Any, folder: Path) -> Any:
    handle = load_handle(folder)
    assert handle is not None
    return client.get_run(handle.run_id)


def send(folder: Path, handle: RunHandle) -> None:
    """Do what a fresh process does with the folder."""
    RunWriter(folder, handle).send()


def test_a_record_arrives_complete_and_once(store: str, client: Any, tmp_path: Path) -> None:
    handle = new_handle(store, params={"lr": "0.1"}, tags={"team": "x"})
    record(tmp_path, HISTORY, *({"step": step, "loss": 1 / (step + 1)} for step in range(700)))
    record(tmp_path, HISTORY, {"step": 700, "nan": math.nan, "inf": math.inf, "odd key (%)!": 3})
    record(tmp_path, SYSTEM, {"step": 0, "system/cpu": 5.0})
    (tmp_path / "a.txt").write_text("a")
    notes = {"tag": "checkpoint_uri", "value": "s3://b/1"}, {"artifact": str(tmp_path / "a.txt"), "folder": "files"}
    record(tmp_path, NOTES, *notes, {"status": "stopped"})
    writer = RunWriter(tmp_path, handle)
    for _ in range(2):
        writer.send()
        send(tmp_path, handle)
    run = run_of(client, tmp_path)
    assert points(client, tmp_path, "loss") == [(step, 1 / (step + 1)) for step in range(700)]
    assert points(client, tmp_path, "system/cpu") == [(0, 5.0)]
    assert math.isnan(run.data.metrics["nan"]) and run.data.metrics["odd key ____"] == 3
    assert len(client.get_metric_history(run.info.run_id, "inf")) == 1
    assert (run.data.params, run.data.tags["team"]) == ({"lr": "0.1"}, "x")
    assert (run.info.status, run.info.end_time) == ("KILLED", 1002000)
    assert [file.path for file in client.list_artifacts(run.info.run_id, "files")] == ["files/a.txt"]
    assert len(client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")) == 1
    assert len(run.outputs.model_outputs) == 1
    assert unsent(tmp_path) == 0


def test_rows_wider_than_a_batch(store: str, client: Any, tmp_path: Path) -> None:
    record(tmp_path, HISTORY, {"step": 1, **{f"k{index}": 1.0 for index in range(1500)}})
    send(tmp_path, new_handle(store))
    assert len(run_of(client, tmp_path).data.metrics) == 1500


class Flaky:
    """A client whose requests fail a given number of times, before or after they take effect."""

    def __init__(self, client: Any, failures: Iterator[str]) -> None:
        self.client, self.failures = client, failures

    def __getattr__(self, name: str) -> Any:
        def request(*arguments: Any, **options: Any) -> Any:
            kind = next(self.failures, "none") if name in ("log_batch", "set_tag") else "none"
            if kind == "before":
                raise ConnectionError("no connection")
            result = getattr(self.client, name)(*arguments, **options)
            if kind == "after":
                raise ConnectionError("the answer was lost")
            return result

        return request


def test_requests_that_fail_lose_and_double_nothing(
    store: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter(["none", "after", "before", "none", "after", "after", "before"])
    monkeypatch.setattr(mlflow_writer, "make_client", lambda uri: Flaky(make_client(uri), failures))
    record(tmp_path, HISTORY, *({"step": step, "loss": 0.5, "other": 1.5} for step in range(2000)))
    record(tmp_path, NOTES, {"tag": "a", "value": "1"}, {"tag": "a", "value": "2"})
    writer, failed = RunWriter(tmp_path, new_handle(store)), 0
    while unsent(tmp_path):
        try:
            writer.send()
        except ConnectionError:
            failed += 1
    assert failed == 5
    for key, value in (("loss", 0.5), ("other", 1.5)):
        assert points(client, tmp_path, key) == [(step, value) for step in range(2000)]
    assert run_of(client, tmp_path).data.tags["a"] == "2"


def test_steps_that_run_again_after_a_resume_keep_their_first_point(store: str, client: Any, tmp_path: Path) -> None:
    handle = new_handle(store)
    record(tmp_path, HISTORY, *({"step": step, "loss": 1.0} for step in range(1, 11)))
    send(tmp_path, handle)
    kept = "".join(line + "\n" for line in (tmp_path / HISTORY).read_text().splitlines()[:6])
    LineWriter(tmp_path / HISTORY, kept).close()
    record(tmp_path, HISTORY, *({"step": step, "loss": 2.0, "new": 3.0} for step in range(7, 14)))
    send(tmp_path, handle)
    once = [(step, 1.0) for step in range(1, 11)] + [(step, 2.0) for step in range(11, 14)]
    assert sorted(points(client, tmp_path, "loss")) == once
    assert points(client, tmp_path, "new") == [(step, 3.0) for step in range(7, 14)]


def test_a_row_that_comes_late_arrives(store: str, client: Any, tmp_path: Path) -> None:
    handle = new_handle(store)
    record(tmp_path, HISTORY, {"step": 5, "eval/loss": 0.5}, {"step": 9, "eval/loss": 0.9})
    send(tmp_path, handle)
    record(tmp_path, HISTORY, {"step": 7, "eval/loss": 0.7})
    for _ in range(2):
        send(tmp_path, handle)
    assert sorted(points(client, tmp_path, "eval/loss")) == [(5, 0.5), (7, 0.7), (9, 0.9)]


def test_points_of_others_in_a_named_run_block_nothing(store: str, client: Any, tmp_path: Path) -> None:
    _, run = open_run(client, new_handle(store))
    client.log_metric(run.info.run_id, "loss", 9.0, timestamp=500_000, step=1000)
    handle = new_handle(store, run_id=run.info.run_id, created_ms=900_000)
    record(tmp_path, HISTORY, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0})
    for _ in range(2):
        send(tmp_path, handle)
    assert sorted(points(client, tmp_path, "loss")) == [(1, 1.0), (2, 2.0), (1000, 9.0)]


def test_a_run_that_was_deleted_is_replaced_and_gets_everything(store: str, client: Any, tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, new_handle(store))
    record(tmp_path, HISTORY, {"step": 1, "loss": 1.0})
    record(tmp_path, NOTES, {"tag": "a", "value": "1"})
    writer.send()
    first = run_of(client, tmp_path).info.run_id
    client.delete_run(first)
    record(tmp_path, HISTORY, {"step": 2, "loss": 2.0})
    with pytest.raises(Exception, match="deleted"):
        writer.send()
    writer.send()
    second = run_of(client, tmp_path)
    assert points(client, tmp_path, "loss") == [(1, 1.0), (2, 2.0)]
    assert (second.data.tags["resumed_from"], second.data.tags["a"]) == (first, "1")


def test_what_mlflow_refuses_blocks_nothing_and_is_reported(
    store: str, client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path, HISTORY, *({"step": step, "loss": 1.0, "time": -5 if step == 2 else 5} for step in range(1, 5)))
    record(tmp_path, NOTES, {"artifact": str(tmp_path / "absent.txt"), "folder": ""}, {"tag": "a", "value": "1"})
    send(tmp_path, new_handle(store))
    assert points(client, tmp_path, "loss") == [(1, 1.0), (3, 1.0), (4, 1.0)]
    assert run_of(client, tmp_path).data.tags["a"] == "1"
    assert "loss of step 2" in caplog.text and "absent.txt" in caplog.text
    assert unsent(tmp_path) == 0


def test_notes_are_sent_again_to_another_run_only(store: str, client: Any, tmp_path: Path) -> None:
    record(tmp_path, NOTES, {"tag": "a", "value": "1"})
    first, second = new_handle(store), new_handle(store)
    send(tmp_path, first)
    client.set_tag(run_of(client, tmp_path).info.run_id, "a", "by hand")
    send(tmp_path, first)
    assert run_of(client, tmp_path).data.tags["a"] == "by hand"
    send(tmp_path, second)
    assert run_of(client, tmp_path).data.tags["a"] == "1"
    assert json.loads((tmp_path / SENT).read_text())["run_id"] == run_of(client, tmp_path).info.run_id


def test_the_newest_and_the_best_checkpoint(store: str, client: Any, tmp_path: Path) -> None:
    newest = [{"tag": "checkpoint_uri", "value": f"s3://bucket/step-{step}"} for step in (200, 300)]
    best = [{"tag": "best_checkpoint_uri", "value": f"s3://bucket/step-{step}"} for step in (100, 300, 300)]
    record(tmp_path, NOTES, *newest, *best)
    send(tmp_path, new_handle(store, name="best of"))
    run = run_of(client, tmp_path)
    assert run.data.tags["checkpoint_uri"] == "s3://bucket/step-300"
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert [model.tags["checkpoint_uri"] for model in models] == ["s3://bucket/step-300"]
    version = client.get_model_version_by_alias("direct.best of", "best")
    assert version.tags["checkpoint_uri"] == "s3://bucket/step-300"
    assert (int(version.version), version.run_id) == (2, run.info.run_id)


def test_the_best_checkpoint_is_loaded_from_the_registry(store: str, client: Any, tmp_path: Path) -> None:
    """The version refers to the checkpoint, which is read when the model is loaded; here the run's folder."""
    source, model = run_folder(tmp_path / "run", SMALL)
    tree = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({**tree, "task": {"kind": "classification"}}))
    record(tmp_path, NOTES, {"tag": "best_checkpoint_uri", "value": source})
    send(tmp_path, new_handle(store, name="loaded"))
    api: Any = mlflow
    api.set_tracking_uri(store)
    try:
        loaded = api.pyfunc.load_model("models:/direct.loaded@best")
    finally:
        api.set_tracking_uri(None)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        wanted = model(torch.from_numpy(pixels)).softmax(1)
    for image in (pixels, pixels.tolist(), pixels.astype(np.int64)):
        np.testing.assert_allclose(loaded.predict({"image": image})["probability"], wanted, rtol=1e-5, atol=1e-7)
    for wrong in (pixels / 255, pixels.astype(int) * 2, pixels[:, :, :5], pixels.astype(int) - 300):
        with pytest.raises(ValueError, match="image"):
            loaded.predict({"image": wrong})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="nothing"):
        CheckpointModel(source)


def test_data_and_code_are_inputs_and_tags_of_a_run(store: str, client: Any) -> None:
    data = {"name": "digits train", "digest": "0" * 36, "source": "{}", "profile": "{}", "context": "training"}
    tags = {"mlflow.source.git.commit": "1" * 40, "perceiver.git.dirty": "true"}
    handle, _ = open_run(client, new_handle(store, datasets=[data], tags=tags))
    handle, _ = open_run(client, replace(handle, tags={**tags, "perceiver.git.dirty": "false"}))
    run = client.get_run(handle.run_id)
    (found,) = run.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == (data["name"], data["digest"])
    assert {tag.key: tag.value for tag in found.tags} == {"mlflow.data.context": "training"}
    assert run.data.tags["perceiver.git.dirty"] == "false", "a resumed run has the code of its last start"
    foreign = client.create_run(handle.experiment_id, tags={"mlflow.source.git.commit": "theirs"})
    open_run(client, new_handle(store, run_id=foreign.info.run_id, tags=tags))
    assert client.get_run(foreign.info.run_id).data.tags["mlflow.source.git.commit"] == "theirs"


def test_a_store_that_this_machine_does_not_have_is_not_made(tmp_path: Path) -> None:
    handle = new_handle(f"sqlite:///{tmp_path / 'elsewhere.db'}", run_id="x")
    with pytest.raises(OSError, match=r"elsewhere\.db"):
        send(tmp_path, handle)
    assert not (tmp_path / "elsewhere.db").exists()


def test_a_run_is_found_by_id_or_key_and_replaced_when_it_is_gone(store: str, client: Any) -> None:
    first, _ = open_run(client, new_handle(store))
    assert open_run(client, new_handle(store, run_id=first.run_id))[0] == first
    assert open_run(client, new_handle(store, key=first.key))[0] == first
    started = client.get_run(first.run_id).info.start_time
    assert open_run(client, new_handle(store, run_id=first.run_id, created_ms=0))[0].created_ms == started
    client.delete_run(first.run_id)
    second, run = open_run(client, first)
    assert second.run_id != first.run_id
    assert run.data.tags["resumed_from"] == first.run_id


def test_a_parameter_that_changes_becomes_a_tag(store: str, client: Any) -> None:
    first, _ = open_run(client, new_handle(store, params={f"p{index}": "1" for index in range(250)}))
    open_run(client, replace(first, params={"p0": "1", "p1": "2", "new": "3"}))
    data = client.get_run(first.run_id).data
    assert (len(data.params), data.params["p1"], data.params["new"]) == (251, "1", "3")
    assert {key: value for key, value in data.tags.items() if key.startswith("param.")} == {"param.p1": "2"}
    open_run(client, replace(first, params={"p1": "1"}))
    assert client.get_run(first.run_id).data.tags["param.p1"] == "1", "it has its first value again"


def test_a_deleted_experiment_is_refused_with_the_fix(store: str, client: Any) -> None:
    handle, _ = open_run(client, new_handle(store, experiment="gone"))
    client.delete_experiment(handle.experiment_id)
    with pytest.raises(RefusedError, match=r"tracking\.experiment"):
        open_run(client, new_handle(store, experiment="gone"))


@pytest.mark.parametrize(
    ("key", "clean"),
    [("a b/c-d.e", "a b/c-d.e"), ("a//b/../c", "a/c"), ("/x/", "x"), ("..", "_"), ("ä%", "ä_"), ("k" * 300, "k" * 250)],
)
def test_keys_become_what_mlflow_accepts(store: str, client: Any, key: str, clean: str) -> None:
    assert clean_key(key) == clean
    _, run = open_run(client, new_handle(store))
    client.log_metric(run.info.run_id, clean, 1.0)
