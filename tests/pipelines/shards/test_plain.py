"""Columns taken from their pages: the same values as Arrow reads, and never damaged ones."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.shards.plain import plain_type, plain_values

VALUES = st.lists(st.binary(max_size=300), min_size=1, max_size=150)


def written(values: list[Any], *, kind: pa.DataType | None = None, nullable: bool = True, **options: Any) -> bytes:
    """A Parquet file with one column, `data`."""
    sink = io.BytesIO()
    schema = pa.schema([pa.field("data", kind or pa.binary(), nullable=nullable)])
    usual = {"compression": "none", "use_dictionary": False, "write_page_checksum": True, "write_statistics": False}
    pq.write_table(pa.Table.from_pydict({"data": values}, schema), sink, **usual | options)
    return sink.getvalue()


def column_of(raw: bytes) -> tuple[pq.ColumnChunkMetaData, Any, bytearray]:
    """What the footer says of the column, and its pages."""
    with pq.ParquetFile(io.BytesIO(raw)) as file:
        chunk, column = file.metadata.row_group(0).column(0), file.schema.column(0)
    start = chunk.data_page_offset
    return chunk, column, bytearray(raw[start : start + chunk.total_compressed_size])


def taken(raw: bytes, flipped: int | None = None) -> list[Any] | None:
    """The column's values from its pages, with one byte changed if wanted; None if they are left to Arrow."""
    chunk, column, pages = column_of(raw)
    if flipped is not None:
        pages[flipped % len(pages)] ^= 1 + flipped % 255
    values = plain_values(memoryview(pages), chunk, column) if plain_type(chunk, column) else None
    return values and [bytes(value) if isinstance(value, memoryview) else value for value in values]


PAGES = st.fixed_dictionaries(
    {
        "nullable": st.booleans(),
        "data_page_size": st.sampled_from([64, 1 << 20]),
        "write_statistics": st.booleans(),
        "compression": st.sampled_from(["none", "zstd"]),
    }
)


@settings(deadline=None)
@given(VALUES, PAGES)
def test_values_are_those_that_were_written(values: list[bytes], options: dict[str, Any]) -> None:
    assert taken(written(values, write_batch_size=4, **options)) == values


@settings(deadline=None)
@given(st.lists(st.integers(-1 << 63, (1 << 63) - 1), min_size=1, max_size=150), PAGES)
def test_numbers_are_those_that_were_written(values: list[int], options: dict[str, Any]) -> None:
    assert taken(written(values, kind=pa.int64(), write_batch_size=4, **options)) == values


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=150), PAGES)
def test_texts_are_those_that_were_written(values: list[str], options: dict[str, Any]) -> None:
    found = taken(written(values, kind=pa.string(), write_batch_size=4, **options))
    assert found == [value.encode() for value in values]


@settings(deadline=None)
@given(VALUES, st.integers(0, 1 << 20), PAGES)
def test_a_changed_byte_is_met(values: list[bytes], place: int, options: dict[str, Any]) -> None:
    """Some bytes of a header mean nothing here; then the values must be right all the same."""
    assert taken(written(values, write_batch_size=4, **options), place) in (None, values)


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", 7]), PAGES)
def test_garbage_is_left_to_arrow(pages: bytes, value: Any, options: dict[str, Any]) -> None:
    kind = pa.int64() if value else pa.binary()
    chunk, column, _ = column_of(written([value] * 5, kind=kind, **options))
    assert plain_values(memoryview(pages), chunk, column) is None


@pytest.mark.parametrize("pages", [b"\x1c" * 100_000, b"\x15" + b"\x80" * 1_000_000], ids=["nested", "endless number"])
def test_hostile_headers_end_soon(pages: bytes) -> None:
    chunk, column, _ = column_of(written([b"a"]))
    assert plain_values(memoryview(pages), chunk, column) is None


def test_a_page_that_claims_to_be_enormous_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, column, pages = column_of(written([b"a" * 1000], compression="zstd", write_page_checksum=False))
    place = pages.index(b"\xe4\x0f")  # The size, 1010, as a zigzag integer.
    pages[place : place + 2] = b"\xfe\xff\xff\xff\x0f"
    monkeypatch.setattr(pa, "decompress", lambda *_, **__: pytest.fail("would take 2 GB"))
    assert plain_values(memoryview(pages), chunk, column) is None


@pytest.mark.parametrize(
    "values, options",
    [
        ([b"a", None, b"c"], {}),
        ([b"a", b"b", b"a"], {"data_page_version": "2.0"}),
        ([1, None], {"kind": pa.int64()}),
        ([b"a", b"b"], {"compression": "snappy"}),
        ([b"a", b"b"], {"use_dictionary": True}),
        ([1, 2], {"kind": pa.int32()}),
        ([1, 2], {"kind": pa.timestamp("us")}),
        ([[b"a"], [b"b"]], {"kind": pa.list_(pa.binary())}),
    ],
    ids=[
        "a missing value",
        "pages of version 2",
        "a missing number",
        "snappy",
        "dictionary",
        "small numbers",
        "times",
        "lists",
    ],
)
def test_other_columns_are_left_to_arrow(values: list[Any], options: dict[str, Any]) -> None:
    assert taken(written(values, **options)) is None
