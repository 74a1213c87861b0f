"""Parquet tables as a source: as hubs lay them out, and with columns named by options."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perceiver.config import UserError
from pipelines.feed.ingest import DataConfig, EvalShare, eval_batches
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import Manifest
from tests.pipelines.test_prepare import rows_of
from tests.pipelines.toys import numbered_image, png

OFF = PrepareConfig(parallel="off")


def hub_table(path: Path, first: int, count: int, names: list[str] | None) -> None:
    """Write a file as the Hugging Face libraries write images: structs of bytes and path, classes in the metadata."""
    rows = [
        {"image": {"bytes": png(numbered_image(i)), "path": f"{i}.png"}, "label": i % 3}
        for i in range(first, first + count)
    ]
    table = pa.Table.from_pylist(rows)
    if names:
        facts = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)


def keys_of(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """Return the keys of a split, in order."""
    return [row["key"] for row in rows_of(folder, manifest, split)]


def test_a_hub_s_image_table_is_read_with_its_class_names(tmp_path: Path) -> None:
    src = tmp_path / "src"
    hub_table(src / "data" / "train-00000-of-00002.parquet", 0, 10, ["ant", "bee", "cow"])
    hub_table(src / "data" / "train-00001-of-00002.parquet", 10, 6, ["ant", "bee", "cow"])
    hub_table(src / "data" / "validation-00000-of-00001.parquet", 16, 5, ["ant", "bee", "cow"])
    out = tmp_path / "out"
    manifest = prepare(
        "table", str(src), str(out), PrepareConfig(shard_rows=8, parallel="off", options={"channels": "1"})
    )
    assert manifest.classes == ("ant", "bee", "cow")
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 16, "val": 5}
    assert len(manifest.splits["train"].shards) > 1
    rows = rows_of(out, manifest, "train")
    assert sorted(row["image"] for row in rows) == sorted(png(numbered_image(i)) for i in range(16))
    assert keys_of(out, manifest, "train") != sorted(keys_of(out, manifest, "train"))
    data = DataConfig(url=str(out), executor="inline", image_size=(8, 8))
    batch = next(iter(eval_batches(data, manifest, EvalShare("val", 5), "cpu")))
    numbers = batch["image"][:, 0, 0, 0]
    assert sorted(numbers.tolist()) == [16, 17, 18, 19, 20]
    assert (batch["label"] == numbers % 3).all()


def test_texts_with_string_labels_and_named_columns(tmp_path: Path) -> None:
    table = pa.table({"sentence": ["ja", "no", "si", "oui"], "language": ["de", "en", "es", "fr"]})
    (tmp_path / "src").mkdir()
    pq.write_table(table, tmp_path / "src" / "all.parquet")
    manifest = prepare(
        "table",
        str(tmp_path / "src"),
        str(tmp_path / "out"),
        PrepareConfig(parallel="off", options={"text": "sentence", "label": "language", "held_out": "none"}),
    )
    assert manifest.classes == ("de", "en", "es", "fr")
    assert {row["text"]: manifest.classes[row["label"]] for row in rows_of(tmp_path / "out", manifest, "train")} == {
        "ja": "de",
        "no": "en",
        "si": "es",
        "oui": "fr",
    }


def test_numbered_labels_without_names_get_their_numbers(tmp_path: Path) -> None:
    hub_table(tmp_path / "src" / "train.parquet", 0, 5, None)
    assert prepare("table", str(tmp_path / "src"), str(tmp_path / "out"), OFF).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image": "photo"}, r"option image=photo: no such column; the table has image \(struct.*label \(int64\)"),
        ({"channels": "2"}, "channels=2: wanted"),
        ({"colour": "x"}, "unknown option 'colour'"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, options: dict[str, str], message: str) -> None:
    hub_table(tmp_path / "src" / "train.parquet", 0, 5, None)
    with pytest.raises(UserError, match=message):
        prepare("table", str(tmp_path / "src"), str(tmp_path / "out"), PrepareConfig(options=options))


def test_tables_without_samples_are_refused(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match=r"\.parquet"):
        prepare("table", str(tmp_path / "src"), str(tmp_path / "out"))
    pq.write_table(pa.table({"x": [1.5]}), tmp_path / "src" / "a.parquet")
    with pytest.raises(UserError, match="columns x: .*image=COLUMN"):
        prepare("table", str(tmp_path / "src"), str(tmp_path / "out"))


def test_rows_that_cannot_be_read_are_named_and_the_others_kept(tmp_path: Path) -> None:
    """A damaged row group, a file without the column, and a text that is not UTF-8."""
    (tmp_path / "src").mkdir()
    texts = pa.array([b"one", b"two", b"caf\xe9", b"four"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": texts, "label": [0, 1, 0, 1]}), tmp_path / "src" / "train-0.parquet")
    pq.write_table(pa.table({"body": ["x"] * 3, "label": [0, 1, 0]}), tmp_path / "src" / "train-1.parquet")
    damaged = tmp_path / "src" / "train-2.parquet"
    pq.write_table(
        pa.table({"text": ["long enough " * 9] * 6, "label": [1] * 6}),
        damaged,
        row_group_size=3,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    raw = bytearray(damaged.read_bytes())
    raw[4:60] = b"\xff" * 56
    damaged.write_bytes(raw)
    manifest = prepare(
        "table", str(tmp_path / "src"), str(tmp_path / "out"), OFF.model_copy(update={"max_bad_fraction": 0.9})
    )
    rows = rows_of(tmp_path / "out", manifest, "train")
    assert sorted(row["key"] for row in rows) == [
        *(f"train-0.parquet#0.{i}" for i in (0, 1, 3)),
        *(f"train-2.parquet#1.{i}" for i in range(3)),
    ]
    found = {row["key"]: row["reason"] for row in pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()}
    assert len(found) == manifest.rejected == 7
    assert found["train-0.parquet#0.2"].startswith("invalid UTF-8")
    assert found["train-1.parquet#0.1"] == "unreadable row group: no column text for text"
    assert found["train-2.parquet#0.0"].startswith("unreadable row group: ")


def test_a_file_that_was_cut_off_is_refused_by_name(tmp_path: Path) -> None:
    hub_table(tmp_path / "src" / "train.parquet", 0, 5, None)
    whole = (tmp_path / "src" / "train.parquet").read_bytes()
    (tmp_path / "src" / "train.parquet").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"train\.parquet .*truncated"):
        prepare("table", str(tmp_path / "src"), str(tmp_path / "out"))
