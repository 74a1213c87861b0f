"""AudioSet's released embeddings, from TFRecords and packed HDF5 to batches, and what is damaged in them.

The records are made by google.protobuf, which knows nothing of our reader.
"""

import csv
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from perceiver.config import UserError
from pipelines.features import EmbeddingsFeature
from pipelines.features.base import ViewConfig
from pipelines.feed.ingest import DataConfig, EvalShare, eval_batches, load_data
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import Manifest
from pipelines.sources._tfrecord import masked_crc, parse_sequence_example
from pipelines.transforms import BadSample

CONFIG = PrepareConfig(parallel="off", max_bad_fraction=0.9)


def message_types() -> dict[str, Any]:
    """Return the message classes of TensorFlow's example.proto and feature.proto."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, bool, str]) -> Any:
        made = file.message_type.add(name=name)
        for field, number, type_, repeated, of in fields:
            label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
            made.field.add(name=field, number=number, type=type_, label=label, **({"type_name": of} if of else {}))
        return made

    one = kind.TYPE_MESSAGE
    message("BytesList", ("value", 1, kind.TYPE_BYTES, True, ""))
    message("FloatList", ("value", 1, kind.TYPE_FLOAT, True, ""))
    message("Int64List", ("value", 1, kind.TYPE_INT64, True, ""))
    lists = ("Bytes", "Float", "Int64")
    message("Feature", *((f"{n.lower()}_list", i, one, False, f".t.{n}List") for i, n in enumerate(lists, 1)))
    message("FeatureList", ("feature", 1, one, True, ".t.Feature"))
    for name, field, of in (("Features", "feature", "Feature"), ("FeatureLists", "feature_list", "FeatureList")):
        made = message(name, (field, 1, one, True, f".t.{name}.Entry"))
        entry = made.nested_type.add(name="Entry")
        entry.field.add(name="key", number=1, type=kind.TYPE_STRING, label=kind.LABEL_OPTIONAL)
        entry.field.add(name="value", number=2, type=one, label=kind.LABEL_OPTIONAL, type_name=f".t.{of}")
    parts = (("context", 1, one, False, ".t.Features"), ("feature_lists", 2, one, False, ".t.FeatureLists"))
    message("SequenceExample", *parts)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}"))
        for name in ("SequenceExample", "Features", "FeatureLists", "Feature")
    }


TYPES = message_types()


def example(video: str, labels: list[int], segments: np.ndarray) -> bytes:
    """Return a record's content as AudioSet's release has it."""
    made = TYPES["SequenceExample"]()

    def put(name: str) -> Any:
        entry = made.context.feature.add(key=name)
        return entry.value

    put("video_id").bytes_list.value.append(video.encode())
    put("start_time_seconds").float_list.value.append(30.0)
    put("labels").int64_list.value.extend(labels)
    steps = made.feature_lists.feature_list.add(key="audio_embedding").value
    for segment in segments:
        steps.feature.add().bytes_list.value.append(segment.tobytes())
    return made.SerializeToString()


def record(content: bytes) -> bytes:
    """Return a framed record."""
    head = struct.pack("<Q", len(content))
    return head + struct.pack("<I", masked_crc(head)) + content + struct.pack("<I", masked_crc(content))


def values(number: int, segments: int = 10, channels: int = 128) -> np.ndarray:
    return np.random.default_rng(number).integers(1, 256, (segments, channels), dtype=np.uint8)


def write(root: Path, files: dict[str, bytes]) -> str:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    with (root / "class_labels_indices.csv").open("w", newline="") as stream:
        rows = [["index", "mid", "display_name"], *([i, f"/m/{i}", f"Sound {i}"] for i in range(527))]
        csv.writer(stream).writerows(rows)
    return str(root)


def quarantined(folder: Path) -> dict[str, str]:
    rows = pq.read_table(folder / "quarantine.parquet").to_pylist()
    return {row["key"].split("/")[-1]: row["reason"] for row in rows}


def test_the_checksum_is_castagnolis() -> None:
    """RFC 3720, B.4: 32 bytes of zeros, and the usual check value of the digits, unmasked."""
    for content, crc in ((b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA)):
        unmasked = (masked_crc(content) - 0xA282EAD8) & 0xFFFFFFFF
        assert ((unmasked >> 17) | (unmasked << 15)) & 0xFFFFFFFF == crc


def test_records_of_another_writer_are_read() -> None:
    found = parse_sequence_example(example("abc", [0, 300, 7], values(0, 2)))
    assert found.context == {"video_id": [b"abc"], "start_time_seconds": [30.0], "labels": [0, 300, 7]}
    assert found.lists == {"audio_embedding": [[part.tobytes()] for part in values(0, 2)]}


def test_the_release_becomes_batches(tmp_path: Path) -> None:
    train = b"".join(record(example(f"video{n:06}", [n, 526], values(n, 10 - n))) for n in range(3))
    files = {"bal_train/0a.tfrecord": train, "eval/0b.tfrecord": record(example("held-out-00", [4], values(9)))}
    src = write(tmp_path / "src", files)
    manifest = prepare("audioset_embeddings", src, str(tmp_path / "out"), CONFIG)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 3, "test": 1}
    assert manifest.classes[4] == "Sound 4"
    data = DataConfig(url=str(tmp_path / "out"), executor="inline", eval_split="train")
    [batch] = eval_batches(data, load_data(data), EvalShare("train", 3), "cpu")
    lengths = batch["embeddings_mask"].sum(1).tolist()
    assert sorted(lengths) == [8, 9, 10] and batch["embeddings"].shape == (3, 10, 128)
    row = lengths.index(9)
    assert (batch["embeddings"][row].numpy()[:9] == values(1, 9)).all() and not batch["embeddings"][row][9:].any()
    assert batch["label"][row].nonzero().ravel().tolist() == [1, 526]


def test_damaged_records_are_named_and_the_others_are_used(tmp_path: Path) -> None:
    good = record(example("good-video0", [1], values(0)))
    wrong = bytearray(record(example("bad-crc-000", [1], values(1))))
    wrong[40] ^= 1
    files = {
        "bal_train/a.tfrecord": good
        + bytes(wrong)
        + record(b"\x0a\xff\xff")
        + record(example("other-size0", [1], values(2, 10, 64)))
        + record(example("too-long-00", [1], values(2, 11)))
        + record(example("no-label-00", [900], values(3)))
        + record(example("no-audio-00", [1], values(3, 0)))
        + good[:-9],
        "bal_train/b.tfrecord": b"\x01" * 12 + good,
        "bal_train/c.tfrecord": good[:7],
        "eval/d.tfrecord": good,
    }
    prepare("audioset_embeddings", write(tmp_path / "src", files), str(tmp_path / "out"), CONFIG)
    assert quarantined(tmp_path / "out") == {
        "a.tfrecord#1": "wrong checksum of a record",
        "a.tfrecord#2": "not a SequenceExample",
        "a.tfrecord#3": "embeddings of 64 bytes, wanted 128",
        "a.tfrecord#4": "11 segments, wanted at most 10",
        "a.tfrecord#5": "no known label",
        "a.tfrecord#6": "no audio_embedding",
        "a.tfrecord#7": "truncated record",
        "b.tfrecord#0": "wrong checksum of a length: the rest of the file is not read",
        "c.tfrecord#0": "truncated record",
    }


@pytest.mark.parametrize("seed", range(20))
def test_no_bytes_break_the_parser(seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(example("abc", [1, 2], values(seed, 3)))
    for place in rng.integers(0, len(content), 6):
        content[place] = rng.integers(256)
    for damaged in (bytes(content), bytes(content[: rng.integers(len(content))])):
        try:
            parse_sequence_example(damaged)
        except ValueError:
            continue


def packed(path: Path, count: int, first: int = 0, channels: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        x = np.stack([values(first + n, 10, channels) for n in range(count)])
        x[1, 7:] = 0
        y = np.zeros((count, 527), bool)
        y[np.arange(count), np.arange(count)] = y[:, 9] = True
        y[2] = False
        file["x"], file["y"] = x, y
        file["video_id_list"] = np.array([f"video{first + n:06}".encode() for n in range(count)])


def test_the_packed_files_give_the_same(tmp_path: Path) -> None:
    packed(tmp_path / "src/balanced/full_bal_train.h5", 5)
    packed(tmp_path / "src/eval.h5", 4, first=50)
    config = CONFIG.model_copy(update={"shard_rows": 2})
    manifest: Manifest = prepare("audioset_embeddings", str(tmp_path / "src"), str(tmp_path / "out"), config)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 4, "test": 3}
    assert manifest.classes[526] == "526" and set(quarantined(tmp_path / "out").values()) == {"no known label"}
    data = DataConfig(url=str(tmp_path / "out"), executor="inline")
    [batch] = eval_batches(data, load_data(data), EvalShare("test", 3), "cpu")
    assert sorted(batch["embeddings_mask"].sum(1).tolist()) == [7, 10, 10]


def test_packed_files_of_another_size_are_refused(tmp_path: Path) -> None:
    packed(tmp_path / "src/eval.h5", 3, channels=64)
    with pytest.raises(UserError, match=r"x \(3, 10, 64\).*--option segments=T and channels=D"):
        prepare("audioset_embeddings", str(tmp_path / "src"), str(tmp_path / "out"), CONFIG)
    with pytest.raises(UserError, match="no embeddings below"):
        prepare("audioset_embeddings", write(tmp_path / "none", {}), str(tmp_path / "out"), CONFIG)


def test_damaged_stored_embeddings_are_bad_samples() -> None:
    feature = EmbeddingsFeature(segments=2, channels=4)
    for stored in (b"", None, b"12345", bytes(12)):
        with pytest.raises(BadSample):
            feature.decode(stored, ViewConfig(), 0)
