"""Arrow shards: valid IPC files, read back as written, and never wrong values from damaged ones."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isal.isal_zlib import crc32

from perceiver.config import UserError
from perceiver.storage import MAPPED_BYTES, ReadPolicy, open_folder
from pipelines.features import Feature, ImageFeature, LabelFeature, LabelsFeature, TextFeature
from pipelines.shards.arrow import ShardWriter, read_batch
from pipelines.shards.manifest import (
    BatchInfo,
    Manifest,
    ShardInfo,
    Split,
    arrow_schema,
    load_manifest,
    save_manifest,
)
from pipelines.shards.reader import Reader
from tests.pipelines.toys import read_shard, to_format_1, write_images

FEATURES: dict[str, Feature] = {
    "text": TextFeature(),
    "image": ImageFeature(channels=1),
    "label": LabelFeature(),
    "labels": LabelsFeature(),
}
TEXTS = {"text": TextFeature(), "label": LabelFeature()}
SCHEMA = arrow_schema({"image": ImageFeature(channels=1), "label": LabelFeature()})
POLICY = ReadPolicy()
ROWS = [{"key": f"k{i}", "image": bytes([i]) * (40 + i), "label": i} for i in range(8)]

samples = st.fixed_dictionaries(
    {
        "key": st.text(max_size=9),
        "text": st.none() | st.text(max_size=30),
        "image": st.none() | st.binary(max_size=60),
        "label": st.none() | st.integers(-(2**63), 2**63 - 1),
        "labels": st.none() | st.lists(st.integers(0, 9), max_size=4),
    }
)
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, rows: list[dict[str, Any]], size: int, schema: pa.Schema = SCHEMA) -> ShardInfo:
    with ShardWriter(open_folder(str(folder)), "a.arrow", schema, size) as writer:
        writer.write(rows)
        shard = writer.close()
    assert shard is not None
    return shard


def read(folder: Path, batch: BatchInfo, schema: pa.Schema = SCHEMA) -> list[dict[str, Any]]:
    return read_batch(open_folder(str(folder)), "a.arrow", batch, schema, POLICY).to_pylist()


def readable(folder: Path, shard: ShardInfo) -> list[int]:
    """Return the numbers of the batches of `ROWS` that can be read; check their values."""
    good = []
    for number, batch in enumerate(shard.batches):
        try:
            rows = read(folder, batch)
        except OSError as error:
            assert "\n" not in str(error) and str(error)
            continue
        first = sum(before.rows for before in shard.batches[:number])
        assert rows == ROWS[first : first + batch.rows]
        good.append(number)
    return good


def test_a_shard_matches_the_manifest(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, {"train": [23, 7]}, rows_per_group=10)
    shard = manifest.splits["train"].shards[0]
    raw = (tmp_path / shard.name).read_bytes()
    assert (shard.bytes, shard.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    with pa.OSFile(str(tmp_path / shard.name)) as source:
        file = pa.ipc.open_file(source)
        assert file.schema == arrow_schema(manifest.features)
        batches = [file.get_batch(number) for number in range(file.num_record_batches)]
    assert [batch.num_rows for batch in batches] == [batch.rows for batch in shard.batches] == [10, 10, 3]
    assert [key for batch in batches for key in batch["key"].to_pylist()] == [f"train/{i}" for i in range(23)]
    columns = crc32("\n".join(f"{field.name} {field.type}" for field in batches[0].schema).encode())
    for info, batch in zip(shard.batches, batches, strict=True):
        message = raw[info.offset : info.offset + info.length]
        assert pa.ipc.read_record_batch(pa.py_buffer(message), batch.schema).equals(batch)
        assert crc32(message, columns) == info.crc32


def test_a_shard_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    writer = ShardWriter(open_folder(str(tmp_path)), "a.arrow", SCHEMA, 2)
    writer.write(ROWS[:5])
    assert not (tmp_path / "a.arrow").exists()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.arrow"]


def test_a_failed_or_empty_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(open_folder(str(tmp_path)), "a.arrow", SCHEMA, 2) as writer:
        writer.write(ROWS[:3])
        raise KeyError("the source failed")
    assert ShardWriter(open_folder(str(tmp_path)), "b.arrow", SCHEMA, 2).close() is None
    assert list(tmp_path.iterdir()) == []


@few
@given(st.lists(samples, min_size=1, max_size=12), st.integers(1, 5))
def test_samples_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], size: int
) -> None:
    """Through the index, through any Arrow reader, and from a Parquet shard of format 1."""
    folder = tmp_path_factory.mktemp("any")
    shard = write(folder, rows, size, arrow_schema(FEATURES))
    assert shard.group_sizes() == [batch.rows for batch in shard.batches]
    assert read_shard(folder / "a.arrow").to_pylist() == rows
    split = Split(shards=(shard,))
    manifest = Manifest(name="any", features=FEATURES, splits={"train": split}, licence="", source="")
    save_manifest(manifest, open_folder(str(folder)))
    for old in (False, True):
        found = to_format_1(folder) if old else load_manifest(str(folder))
        reader = Reader.of(str(folder), found, found.split("train"))
        got = []
        for shard_number, group, row in reader.locate(np.arange(len(rows))):
            values = reader.row_groups({(shard_number, group)})[shard_number, group]
            assert not values.error, values.error
            got.append({name: values.value(name, row) for name in values.columns})
        assert got == rows
        assert reader.keys(np.arange(len(rows))) == [row["key"] for row in rows]


def test_the_order_of_the_features_does_not_matter(tmp_path: Path) -> None:
    """Folders of a mixture may have the same features in different orders."""
    backwards = arrow_schema(dict(reversed(FEATURES.items())))
    assert backwards == arrow_schema(FEATURES)


def labelled_images(split: Split) -> Manifest:
    """Return the manifest of images with a label."""
    features = {name: FEATURES[name] for name in ("image", "label")}
    return Manifest(name="x", features=features, splits={"train": split}, licence="", source="")


def test_a_reader_of_a_relative_folder_reads_in_other_working_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data tasks work in the folder in which Ray was started."""
    shard = write(tmp_path / "data", ROWS, 8)
    split = Split(shards=(shard,))
    manifest = labelled_images(split)
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(Reader.of("data", manifest, split))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(sent).row_groups({(0, 0)})[0, 0].value("label", 3) == 3


def test_encoded_media_are_views_and_texts_are_compressed(tmp_path: Path) -> None:
    image = os.urandom(MAPPED_BYTES)
    shard = write(tmp_path, [{"key": "k", "image": image, "label": 0}] * 2, 2)
    split = Split(shards=(shard,))
    manifest = labelled_images(split)
    group = Reader.of(str(tmp_path), manifest, split).row_groups({(0, 0)})[0, 0]
    value = group.value("image", 1)
    assert isinstance(value, memoryview) and value.readonly and value == image
    schema = arrow_schema(TEXTS)
    shard = write(tmp_path, [{"key": "k", "text": "word " * 1000, "label": 0}] * 10, 10, schema)
    assert shard.bytes < 5000
    assert read(tmp_path, shard.batches[0], schema)[9]["text"] == "word " * 1000


def test_a_flipped_bit_anywhere_costs_its_batch_at_most(tmp_path: Path) -> None:
    shard = write(tmp_path, ROWS, 3)
    raw = (tmp_path / "a.arrow").read_bytes()
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        (tmp_path / "a.arrow").write_bytes(changed)
        hit = [n for n, batch in enumerate(shard.batches) if 0 <= place - batch.offset < batch.length]
        assert readable(tmp_path, shard) == [n for n in range(3) if n not in hit]


def test_a_truncated_file_loses_only_its_end(tmp_path: Path) -> None:
    shard = write(tmp_path, ROWS, 3)
    raw = (tmp_path / "a.arrow").read_bytes()
    for size in range(0, len(raw), 7):
        (tmp_path / "a.arrow").write_bytes(raw[:size])
        whole = [n for n, batch in enumerate(shard.batches) if batch.offset + batch.length <= size]
        assert readable(tmp_path, shard) == whole


def test_swapped_batches_are_damaged(tmp_path: Path) -> None:
    rows = [{"key": f"k{i}", "image": bytes([i]) * 40, "label": i} for i in range(8)]
    shard = write(tmp_path, rows, 3)
    raw = (tmp_path / "a.arrow").read_bytes()
    (start, length, *_), (other, same, *_) = shard.batches[:2]
    assert length == same and start + length == other
    end = other + length
    (tmp_path / "a.arrow").write_bytes(raw[:start] + raw[other:end] + raw[start:other] + raw[end:])
    for batch in shard.batches[:2]:
        with pytest.raises(OSError, match=rf"byte {batch.offset} .*CRC-32"):
            read(tmp_path, batch)
    assert read(tmp_path, shard.batches[2]) == rows[6:]


def test_columns_of_another_name_or_type_are_damage(tmp_path: Path) -> None:
    """A record batch has no schema: otherwise floats would be read as integers, sounds as images."""
    shard = write(tmp_path, ROWS, 3)
    for schema in (
        SCHEMA.set(2, pa.field("label", pa.float64())),
        SCHEMA.set(1, pa.field("audio", pa.binary())),
        pa.schema([SCHEMA.field(1), SCHEMA.field(0), SCHEMA.field(2)]),
    ):
        with pytest.raises(OSError, match="is damaged"):
            read(tmp_path, shard.batches[0], schema)


@few
@given(st.data())
def test_an_index_that_disagrees_with_the_file_is_refused_or_damage(tmp_path: Path, data: st.DataObject) -> None:
    shard = write(tmp_path, ROWS, 3)
    raw = json.loads(shard.model_dump_json())
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, 2))
        part = data.draw(st.integers(0, 3))
        there = raw["batches"][number][part]
        near = st.integers(there - 16, there + 16)
        raw["batches"][number][part] = data.draw(near | st.integers(-(2**65), 2**65) | st.integers(0, 2000))
    manifest = {"format_version": 2, "name": "x", "features": {}, "licence": "", "source": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"splits": {"train": {"shards": [raw]}}}))
    try:
        found = load_manifest(str(tmp_path)).split("train").shards[0]
    except UserError as error:
        assert "\n" not in str(error)
        return
    good = readable(tmp_path, found)
    assert all(found.batches[n] == shard.batches[n] for n in good)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_batch_made_up_with_its_checksum_is_an_error_or_has_values(tmp_path: Path, data: st.DataObject) -> None:
    """Offsets that point outside the file must not be followed."""
    schema = data.draw(st.sampled_from([SCHEMA, arrow_schema(FEATURES), arrow_schema(TEXTS)]))
    rows = [{"text": "some words " * 9, "labels": [1, 2, 3]} | row for row in ROWS[:3]]
    shard = write(tmp_path, [{name: row[name] for name in schema.names} for row in rows], 3, schema)
    raw = bytearray((tmp_path / "a.arrow").read_bytes())
    offset, length, count, _ = shard.batches[0]
    for _ in range(data.draw(st.integers(1, 4))):
        place = offset + data.draw(st.integers(0, length - 8))
        value = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f" * 4]))
        raw[place : place + len(value)] = value
    (tmp_path / "a.arrow").write_bytes(raw)
    columns = crc32("\n".join(f"{field.name} {field.type}" for field in schema).encode())
    batch = BatchInfo(offset, length, count, crc32(raw[offset : offset + length], columns))
    try:
        found = read_batch(open_folder(str(tmp_path)), "a.arrow", batch, schema, POLICY)
    except OSError as error:
        assert str(error)
    else:
        assert found.num_rows == count and len(found.to_pylist()) == count
