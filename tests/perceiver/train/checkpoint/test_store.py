"""Checkpoints: complete or absent, verified before use, newest valid one first."""

import json
import math
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perceiver.config import UserError
from perceiver.export.weights import open_weights
from perceiver.train.checkpoint.store import MANIFEST, CheckpointStore, Snapshot, parameter_difference
from perceiver.train.loop import Span, train
from tests.perceiver.train.toy import toy_batches, toy_engine
from tests.pipelines.raw import make_irregular


def snapshot(step: int) -> Snapshot:
    shapes = {name: list(p.shape) for name, p in toy_engine().module.named_parameters()}
    return Snapshot(step, step * 8, {"kind": "torch"}, shapes, {"seed": 0}, {"torch": "x"}, '{"step": 1}\n')


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    url = str(tmp_path / "checkpoints") if request.param == "local" else f"memory://{tmp_path.name}/checkpoints"
    return CheckpointStore(url)


def run(engine, start: int, stop: int) -> list[float]:
    losses: list[float] = []
    train(engine, toy_batches(start, stop), [lambda i: losses.append(i.result.loss)], Span(start, stop, 8, 1, 5.0, 0))
    return losses


def test_resuming_from_a_checkpoint_equals_an_unbroken_run(store: CheckpointStore) -> None:
    unbroken = run(toy_engine(), 0, 6)
    first = toy_engine()
    run(first, 0, 3)
    manifest = store.save(first, snapshot(3))
    assert manifest is not None and manifest.world == 1
    second = toy_engine()
    newest = store.newest()
    assert newest is not None and newest.step == 3
    with store.fetch(3) as folder:
        second.load(folder)
    assert run(second, 3, 6) == unbroken[3:]
    assert store.history(3) == '{"step": 1}\n'


def test_a_folder_without_manifest_is_no_checkpoint(store: CheckpointStore) -> None:
    engine = toy_engine()
    store.save(engine, snapshot(1))
    store.save(engine, snapshot(2))
    store.fs.rm_file(f"{store.folder(2)}/{MANIFEST}")
    assert store.steps() == [1]


def test_folders_are_looked_at_at_once(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a crashing run leaves would add up at a store with slow answers."""
    for step in range(1, 5):
        store.fs.makedirs(store.folder(step))
    store.fs.touch(f"{store.folder(3)}/{MANIFEST}")
    together, exists = threading.Barrier(4), store.fs.exists

    def slow(path: str) -> bool:
        if path.endswith(MANIFEST):
            together.wait(timeout=30)
        return exists(path)

    monkeypatch.setattr(store.fs, "exists", slow)
    assert store.steps() == [3]


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    store: CheckpointStore, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = toy_engine()
    store.save(engine, snapshot(1))
    store.save(engine, snapshot(2))
    largest = max(store.manifest(2).files.items(), key=lambda item: item[1].bytes)[0]
    victim = f"{store.folder(2)}/{MANIFEST if harm == 'manifest' else largest}"
    blob = store.fs.cat_file(victim)
    if harm == "missing":
        store.fs.rm_file(victim)
    elif harm == "flipped":
        store.fs.pipe_file(victim, blob[:40] + bytes([blob[40] ^ 1]) + blob[41:])
    else:
        store.fs.pipe_file(victim, blob[: len(blob) // 2])
    newest = store.newest()
    assert newest is not None and newest.step == 1
    assert "step-00000002 is not used" in caplog.text


def test_a_save_that_dies_before_the_manifest_leaves_the_one_before(store: CheckpointStore) -> None:
    store.save(toy_engine(), snapshot(1))

    class Dies(type(toy_engine())):
        def save(self, folder: Path) -> None:
            super().save(folder)
            raise OSError("disk full")

    dying = toy_engine()
    dying.__class__ = Dies
    with pytest.raises(OSError, match="disk full"):
        store.save(dying, snapshot(2))
    newest = store.newest()
    assert newest is not None and newest.step == 1
    store.save(toy_engine(), snapshot(2))
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("name", ["engine.json", "shard-00000.safetensors"])
@pytest.mark.parametrize("kept", [True, False])
def test_files_that_the_manifest_does_not_name_are_not_read(store: CheckpointStore, name: str, kept: bool) -> None:
    """They have no checksum: the checkpoint is refused, whether they are there or not."""
    store.save(toy_engine(), snapshot(1))
    manifest = store.manifest(1)
    assert store.problems(1) == []
    files = {known: entry for known, entry in manifest.files.items() if known != name}
    store.fs.pipe_file(
        f"{store.folder(1)}/{MANIFEST}", manifest.model_copy(update={"files": files}).model_dump_json().encode()
    )
    if not kept:
        store.fs.rm_file(f"{store.folder(1)}/{name}")
    assert name in store.problems(1)[0] and MANIFEST in store.problems(1)[0]


def test_prune_keeps_the_named_steps_and_removes_what_crashes_left(store: CheckpointStore) -> None:
    for step in (1, 2, 3, 4):
        store.save(toy_engine(), snapshot(step))
    store.fs.rm_file(f"{store.folder(2)}/{MANIFEST}")
    store.fs.rm_file(f"{store.folder(4)}/{MANIFEST}")
    store.prune({3})
    assert store.steps() == [3]
    assert not store.fs.exists(store.folder(2)) and store.fs.exists(store.folder(4))


def test_an_upload_that_fails_halfway_continues_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(f"memory://{tmp_path.name}/checkpoints")
    staged = store.stage(toy_engine(), snapshot(1))
    put, calls = store.fs.put_file, []

    def flaky(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("reset")
        put(source, target)

    monkeypatch.setattr(store.fs, "put_file", flaky)
    with pytest.raises(OSError, match="reset"):
        store.publish(staged)
    store.publish(staged)
    assert store.commit(staged) is not None and store.problems(1) == []
    assert len(calls) == len(store.manifest(1).files) + 1
    assert not staged.folder.exists()


def test_receipts_of_an_attempt_before_are_not_taken(store: CheckpointStore) -> None:
    before = store.stage(toy_engine(), snapshot(1))
    store.publish(before)
    again = store.stage(toy_engine(), snapshot(1))
    assert store.commit(again, abandoned=lambda: True) is None
    assert store.steps() == []


def test_a_newer_format_is_refused(store: CheckpointStore) -> None:
    store.save(toy_engine(), snapshot(1))
    path = f"{store.folder(1)}/{MANIFEST}"
    tree = json.loads(store.fs.cat_file(path))
    store.fs.pipe_file(path, json.dumps({**tree, "format": 99}).encode())
    with pytest.raises(UserError, match="manifest.json.*format 99"):
        store.manifest(1)


def test_difference_of_parameters_is_one_phrase() -> None:
    assert parameter_difference({"a": [1]}, {"a": [1]}) is None
    assert "'b'" in (parameter_difference({"a": [1]}, {"a": [1], "b": [2]}) or "")
    assert "[1] in the checkpoint, [2] in the recipe" in (parameter_difference({"a": [1]}, {"a": [2]}) or "")
    assert "lacks" in (parameter_difference({"a": [1], "c": [3]}, {"a": [1]}) or "")


def change(store: CheckpointStore, at: int, /, **values: Any) -> None:
    """Replace keys of a manifest."""
    path = f"{store.folder(at)}/{MANIFEST}"
    store.fs.pipe_file(path, json.dumps({**json.loads(store.fs.cat_file(path)), **values}).encode())


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/x", "http://127.0.0.1:1/x", "C:x", "a\\b", "", ".", "a//b", "a\nb"]
)
def test_a_file_name_that_leaves_the_folder_is_refused_before_anything_is_written(
    store: CheckpointStore, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    store.save(toy_engine(), snapshot(1))
    store.save(toy_engine(), snapshot(2))
    change(store, 2, files={name: store.manifest(2).files["engine.json"].model_dump()})
    before = sorted(tmp_path.rglob("*"))
    reads: list[Callable[[], Any]] = [lambda: store.manifest(2), lambda: open_weights(store.location(2))]
    if not store.local:
        reads.append(lambda: store.fetch(2).__enter__())
    for read in reads:
        with pytest.raises(UserError, match=r"manifest\.json.* plain name below the folder") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    newest = store.newest()
    assert newest is not None and newest.step == 1


@pytest.mark.parametrize(
    "key, value",
    [
        ("step", 3),
        ("step", -1),
        ("step", 2.0),
        ("world", 0),
        ("world", "1"),
        ("samples", 1 << 63),
        ("samples", True),
        ("format", 0),
        ("created", "now"),
        ("created", float("nan")),
        ("parameters", {"a": [0]}),
        ("parameters", {"a": [1 << 60]}),
        ("metrics", {"loss": "low"}),
        ("files", {"a": {"bytes": -1, "sha256": "0" * 64}}),
        ("files", {"a": {"bytes": 1, "sha256": "0" * 65}}),
        ("files", {"a": {"bytes": 1, "sha256": "x" * 64}}),
        ("files", ["a"]),
        ("recipe", None),
        ("other", 1),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(store: CheckpointStore, key: str, value: Any) -> None:
    store.save(toy_engine(), snapshot(2))
    change(store, 2, **{key: value})
    with pytest.raises(UserError, match=rf"step-00000002/manifest\.json.*\b{key}\b") as caught:
        store.manifest(2)
    assert "\n" not in str(caught.value) and store.newest() is None


@pytest.mark.parametrize("name", [MANIFEST, "engine.json"])
@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_not_a_regular_file_is_not_opened_and_the_one_before_is_used(
    tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    for step in (1, 2):
        store.save(toy_engine(), snapshot(step))
    path = Path(store.folder(2), name)
    make_irregular(path, kind, tmp_path / "elsewhere")
    newest = store.newest()
    assert newest is not None and newest.step == 1 and "step-00000002 is not used" in caplog.text
    with pytest.raises(UserError, match=name):
        open_weights(store.location(2))
    store.save(toy_engine(), snapshot(2))
    assert store.problems(2) == []


def test_a_metric_that_is_nan_is_read_as_it_was_written(store: CheckpointStore) -> None:
    store.save(toy_engine(), replace(snapshot(1), metrics={"loss": math.nan, "best": math.inf}))
    assert math.isnan(store.manifest(1).metrics["loss"]) and store.manifest(1).metrics["best"] == math.inf


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"step": -1}', '{"step": 1, "step": 2}', '{"step": 1, "loss": "x"}', "1"]
)
def test_a_damaged_history_is_refused_with_its_line(store: CheckpointStore, line: str) -> None:
    store.save(toy_engine(), replace(snapshot(1), history='{"step": 1, "loss": NaN}\n' + line + "\n"))
    with pytest.raises(UserError, match=r"history\.jsonl, line 2,") as caught:
        store.history(1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_fails_on_rank_0_fails_the_save_on_all_ranks(tmp_path: Path, rank: int, monkeypatch) -> None:
    """Also on a rank that has no fault: it would wait for rank 0 in the sum of the tokens."""
    store, engine, sums = CheckpointStore(str(tmp_path / "checkpoints")), toy_engine(), []

    def summed(values: Sequence[float]) -> list[float]:
        sums.append(values)
        return [math.nan]

    def fails(path: str) -> bool:
        raise OSError("the store is down")

    monkeypatch.setattr(engine, "rank", rank)
    monkeypatch.setattr(engine, "sum", summed)
    monkeypatch.setattr(store.fs, "exists", fails)
    with pytest.raises(OSError, match="the store is down" if rank == 0 else "rank 0 could not"):
        store.stage(engine, snapshot(1))
    assert len(sums) == 1
