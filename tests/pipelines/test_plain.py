"""Columns taken from their pages: the same values as Arrow reads, and never damaged ones."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.plain import is_plain, plain_values

VALUES = st.lists(st.binary(max_size=300), min_size=1, max_size=60)


def written(values: list[Any], *, kind: pa.DataType | None = None, nullable: bool = True, **options: Any) -> bytes:
    """A Parquet file with one column, `data`."""
    sink = io.BytesIO()
    schema = pa.schema([pa.field("data", kind or pa.binary(), nullable=nullable)])
    usual = {"compression": "none", "use_dictionary": False, "write_page_checksum": True, "write_statistics": False}
    pq.write_table(pa.Table.from_pydict({"data": values}, schema), sink, **usual | options)
    return sink.getvalue()


def taken(raw: bytes, flipped: int | None = None) -> tuple[bool, list[bytes] | None]:
    """Whether the column is plain, and its values; of the pages with one byte changed if wanted."""
    with pq.ParquetFile(io.BytesIO(raw)) as file:
        chunk, column = file.metadata.row_group(0).column(0), file.schema.column(0)
    start = chunk.data_page_offset
    pages = bytearray(raw[start:start + chunk.total_compressed_size])
    if flipped is not None:
        pages[flipped % len(pages)] ^= 1 + flipped % 255
    values = plain_values(memoryview(pages), chunk.num_values, optional=column.max_definition_level == 1)
    return is_plain(chunk, column), None if values is None else list(map(bytes, values))


@settings(deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([64, 1 << 20]), st.booleans())
def test_values_are_those_that_were_written(values: list[bytes], nullable: bool, page: int, statistics: bool) -> None:
    raw = written(values, nullable=nullable, data_page_size=page, write_batch_size=4, write_statistics=statistics)
    assert taken(raw) == (True, values)


@settings(deadline=None)
@given(VALUES, st.integers(0, 1 << 20), st.booleans())
def test_a_changed_byte_is_met(values: list[bytes], place: int, nullable: bool) -> None:
    """Some bytes of a header mean nothing here; then the values must be right all the same."""
    assert taken(written(values, nullable=nullable, data_page_size=256, write_batch_size=4), place)[1] in (None, values)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 5), st.booleans())
def test_garbage_is_left_to_arrow(pages: bytes, count: int, optional: bool) -> None:
    found = plain_values(memoryview(pages), count, optional=optional)
    assert found is None or sum(map(len, found)) <= len(pages)


@pytest.mark.parametrize("pages", [b"\x1c" * 100_000, b"\x15" + b"\x80" * 1_000_000], ids=["nested", "endless number"])
def test_hostile_headers_end_soon(pages: bytes) -> None:
    assert plain_values(memoryview(pages), 1, optional=False) is None


@pytest.mark.parametrize("values, options", [
    ([b"a", None, b"c"], {}), ([b"a", b"b", b"a"], {"data_page_version": "2.0"}),
], ids=["a missing value", "pages of version 2"])
def test_other_pages_are_left_to_arrow(values: list[bytes | None], options: dict[str, Any]) -> None:
    assert taken(written(values, **options))[1] is None


@pytest.mark.parametrize("values, options", [
    ([b"a", b"b"], {"compression": "zstd"}), ([b"a", b"b"], {"use_dictionary": True}),
    (["a", "b"], {"kind": pa.string()}),
    ([1, 2], {"kind": pa.int64()}), ([[b"a"], [b"b"]], {"kind": pa.list_(pa.binary())}),
], ids=["compressed", "dictionary", "text", "numbers", "lists"])
def test_other_columns_are_left_to_arrow(values: list[Any], options: dict[str, Any]) -> None:
    assert not taken(written(values, **options))[0]
