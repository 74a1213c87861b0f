"""Damaged and malicious manifests and state files: each ends in a one-line refusal, a quarantine or a correct result.

`pytest -s` prints how many of each kind were tried and how they ended.
"""

import copy
import hashlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.record.lease import LeaseFile
from cluster.record.run_folder import RunFolder, find_run
from perceiver.config import UserError
from perceiver.export.weights import open_weights
from perceiver.optim.config import OptimConfig
from perceiver.train.checkpoint.fence import Owner
from perceiver.train.checkpoint.store import HISTORY, MANIFEST, CheckpointStore, Snapshot
from pipelines.feed.ingest import DataConfig, TrainShare, check_files, load_data, train_batches
from pipelines.inspect.inspection import inspect
from pipelines.shards.manifest import load_manifest
from pipelines.shards.quarantine import Quarantine
from tests.perceiver.export.test_formats import SMALL, made, run_folder
from tests.perceiver.train.engine.torch_engine import TorchEngine
from tests.pipelines.toys import write_images
from tune.search_record import Evaluation, SearchRecord, TrialRecord, load_record, save_record

Place = tuple[str | int, ...]
DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 1 << 31, (1 << 48) - 1, 1 << 63, 1 << 64, 10**30, -(10**5000), 1.5, -0.0, 1e300),
    *(math.nan, math.inf, [], {}, [[]], [1, 2], {"a": 1}, DEEP, "", " ", "7", "nan", "x" * 5000, "label", "train"),
    *("../x", "a/../../x", "/etc/hostname", "//x", "~/x", ".", "..", "C:\\x", "..\\x", "a\0b", "a\nb", "\u202eb"),
    *("*", "%2e%2e/x", "\ud800"),
    *(
        "http://127.0.0.1:9/x",
        "s3://bucket/x",
        "file:///etc/hostname",
        "memory://x",
        "simplecache::http://127.0.0.1:9/x",
    ),
]
DOUBLE = "the key that appears twice"


def places(tree: Any, path: Place = ()) -> list[Place]:
    """Return the path of every value in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]
    return [place for place in found if place[:2] != ("recipe", "model")]  # Its bounds are those of any recipe.


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> str:
    """Return the JSON text of a tree with one or two changes: keys dropped, doubled or renamed, values replaced."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        if not (known := places(tree)):
            break
        *path, key = draw(st.sampled_from(known))
        node = tree
        for part in path:
            node = node[part]
        odd = copy.deepcopy(draw(st.sampled_from(ODD)))
        change = draw(st.sampled_from(["drop", "replace", "replace", "number", "swap", "double", "rename", "repeat"]))
        if change == "drop":
            del node[key]
        elif change == "number" and isinstance(node[key], int):
            node[key] += draw(st.integers(-16, 16))
        elif change == "swap":
            other = draw(st.sampled_from(known))
            value = tree
            for part in other:
                value = value[part] if isinstance(value, dict) and part in value else None
            node[key] = copy.deepcopy(value)
        elif change == "double" and isinstance(node, dict):
            node[DOUBLE] = (key, odd)
        elif change == "rename" and isinstance(node, dict):
            node[odd if isinstance(odd, str) else "other"] = node.pop(key)
        elif change == "repeat" and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[key] = odd
    return json_text(tree)


def json_text(tree: Any) -> str:
    """Return JSON in which a key may appear twice."""
    if isinstance(tree, dict):
        pairs = [value if isinstance(value, tuple) else (key, value) for key, value in tree.items()]
        return "{" + ", ".join(f"{json.dumps(key)}: {json_text(value)}" for key, value in pairs) + "}"
    return "[" + ", ".join(map(json_text, tree)) + "]" if isinstance(tree, list) else json_number(tree)


def json_number(value: Any) -> str:
    """Return a value as JSON; Python writes no integers of more than 4,300 digits."""
    return "-1" + "0" * 5000 if isinstance(value, int) and value < -(10**4000) else json.dumps(value)


def fuzz(kind: str, tree: Any, read: Callable[[str], str], root: Path, examples: int = 100) -> None:
    """Read mutations of a valid file; `read` writes one, reads it, and returns how that ended."""
    counts: Counter[str] = Counter()
    assert read(json.dumps(tree)) == "right"

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(mutated(tree))
    def tried(text: str) -> None:
        before = set(root.iterdir())
        try:
            counts[read(text)] += 1
        except UserError as error:
            assert str(error).isprintable(), repr(str(error))
            counts["refused"] += 1
        assert set(root.iterdir()) == before

    tried()
    print(f"\n{kind}: {counts.total()} tried, {dict(counts.most_common())}")
    assert counts["refused"] + counts["quarantined"] > examples // 4


def test_data_manifests(tmp_path: Path) -> None:
    write_images(tmp_path / "data", {"train": [6, 5], "test": [2]}, rows_per_group=3)
    written = load_manifest(str(tmp_path / "data"))
    rows = {shard.name: shard.rows for split in written.splits.values() for shard in split.shards}
    path = tmp_path / "data" / "manifest.json"

    def read(text: str) -> str:
        path.write_text(text)
        data = DataConfig(url=str(path.parent), executor="inline", max_bad_fraction=1.0, image_size=(8, 8))
        sound = inspect(data.url).sound
        manifest = load_data(data)
        for shard in (shard for split in manifest.splits.values() for shard in split.shards):
            assert shard.rows == rows.get(shard.name, shard.rows) or not sound
        check_files(data, manifest)
        quarantine = Quarantine()
        batches = list(train_batches(data, manifest, TrainShare(0, 4, 4, 0, 3), "cpu", quarantine))
        assert len(batches) == 3
        assert not (sound and quarantine.problems), "what inspect calls sound can be trained on"
        return "quarantined" if quarantine.problems or not sound else "right"

    fuzz("data manifest", json.loads(path.read_text()), read, tmp_path)


@pytest.mark.parametrize("url", ["memory", "local"])
def test_checkpoint_manifests_and_headers(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    model = made(SMALL, 2)
    engine = TorchEngine(model, None, OptimConfig(), lambda step: 1.0)  # type: ignore[arg-type]
    store = CheckpointStore(f"memory://{tmp_path.name}/c" if url == "memory" else str(tmp_path / "c"))
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    recipe = {"seed": 0, "model": SMALL, "data": {"url": "x"}}
    snapshot = Snapshot(5, 40, {"kind": "torch"}, shapes, recipe, {}, '{"step": 5}\n', {"loss": 0.5})
    manifest = store.save(engine, snapshot)
    assert manifest is not None

    sound = {name: store.fs.cat_file(f"{store.folder(5)}/{name}") for name in (MANIFEST, "engine.json", HISTORY)}

    def read(text: str, name: str = MANIFEST) -> str:
        for other, content in sound.items():
            store.fs.pipe_file(f"{store.folder(5)}/{other}", content)
        store.fs.pipe_file(f"{store.folder(5)}/{name}", text.encode())
        if name != MANIFEST:  # which the author of such a change would adapt
            entry = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            files = {**manifest.model_dump()["files"], name: entry}
            changed = json.dumps({**manifest.model_dump(), "files": files})
            store.fs.pipe_file(f"{store.folder(5)}/{MANIFEST}", changed.encode())
        saved = open_weights(store.location(5))
        built = saved.build().state_dict()
        assert all(torch.equal(built[key], value) for key, value in model.state_dict().items())
        newest = store.newest()
        assert newest is not None and store.history(newest.step)
        if url == "local":
            engine.load(Path(store.folder(5)))
        return "right"

    for name, examples in ((MANIFEST, 60), ("engine.json", 30), (HISTORY, 20)):
        fuzz(f"{name} ({url})", json.loads(sound[name]), lambda text, name=name: read(text, name), tmp_path, examples)


def test_safetensors_headers(tmp_path: Path) -> None:
    _, model = run_folder(tmp_path / "run", SMALL)
    path = tmp_path / "run" / "model.safetensors"
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    wanted = model.state_dict()

    def read(text: str) -> str:
        header = text.encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[length:])
        built = open_weights(str(path.parent)).build().state_dict()
        assert built.keys() == wanted.keys() and all(built[name].dtype == wanted[name].dtype for name in wanted)
        return "right" if all(torch.equal(built[name], wanted[name]) for name in wanted) else "other tensors"

    fuzz("safetensors header", json.loads(raw[8:length]), read, tmp_path)


def test_run_facts_leases_and_searches(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "small-001")
    data = {"name": "a", "licence": "b", "source": "c", "classes": ["d"]}
    folder.note(step=3, status="finished", evaluation={"loss": 0.5}, data=data, workers={"0": {"pid": 1, "node": "n"}})

    def facts(text: str) -> str:
        folder.write("run.json", text)
        found = find_run(folder.output, "small", folder.name).facts()
        folder.note(step=4)
        assert isinstance(found.get("step", 0), int | None) and folder.facts()["step"] == 4
        return "right"

    fuzz("run.json", folder.facts(), facts, tmp_path)
    lease = LeaseFile(folder.url)

    def owner(text: str) -> str:
        folder.write("lease/00000001.json", text)
        found = lease.read(1)
        assert found is None or 0 < found.life_s <= 86_400
        return "right" if found else "quarantined"

    fuzz("lease/00000001.json", Owner.here(60.0).model_dump(mode="json"), owner, tmp_path, 50)
    trials = [TrialRecord(number=number, values={"optim.lr": 0.1}) for number in range(3)]
    trials[0].add(Evaluation(step=3, epoch=1.0, metrics={"accuracy": 0.5}, at=1.0))
    save_record(SearchRecord(metrics={"accuracy": "max"}, workers=1, trials=trials), folder)

    def search(text: str) -> str:
        folder.write("trials.json", text)
        record = load_record(folder)
        assert all(record.trial(number).number == number for number in range(len(record.trials)))
        record.best(), record.front(), record.worker_seconds()
        return "right"

    fuzz("trials.json", json.loads(folder.read("trials.json") or ""), search, tmp_path)
