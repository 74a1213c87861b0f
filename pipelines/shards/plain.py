"""Columns straight from the pages of a Parquet file: encoded bytes as views of what was read, keys, labels.

Arrow copies each value twice, compares checksums by table and takes half a millisecond to begin, which together cost
more than decoding a WAV. The columns of prepared shards need none of that: their values lie one after the other, as
parquet.thrift describes the encoding PLAIN. Whatever is not exactly so is left to Arrow, which has the last word on
damage.
"""

import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal.isal_zlib import crc32

DATA_PAGE, PLAIN, RLE = 0, 0, 3
TYPE, SIZE, STORED_SIZE, CRC, DATA_HEADER = 1, 2, 3, 4, 5
COUNT, ENCODING, LEVELS_ENCODING = 1, 2, 3
"""Fields of a page's header and of the data page's part of it, as parquet.thrift numbers them."""

_LENGTH = struct.Struct("<I")
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 7, 8, 12
_INTEGERS = (4, 5, 6)
_TYPES = {("BYTE_ARRAY", "NONE"): pa.binary(), ("BYTE_ARRAY", "STRING"): pa.string(), ("INT64", "NONE"): pa.int64()}


class _NotPlain(Exception):
    """The pages are of another kind, or damaged."""


def plain_type(chunk: pq.ColumnChunkMetaData, column: Any) -> pa.DataType | None:
    """What a column's values are, if they may be taken from its pages: bytes, texts or numbers, neither nested nor
    encoded in another way.

    Args:
        chunk: what the footer says of the column in a row group.
        column: what its schema says.
    """
    if (
        chunk.compression not in ("UNCOMPRESSED", "ZSTD")
        or chunk.has_dictionary_page
        or column.max_repetition_level
        or column.max_definition_level > 1
        or "." in chunk.path_in_schema
    ):
        return None
    return _TYPES.get((chunk.physical_type, column.logical_type.type))


def plain_values(pages: memoryview, chunk: pq.ColumnChunkMetaData, column: Any) -> list[Any] | None:
    """The values of a column in a row group: numbers, or views of its bytes; None if Arrow should read them.

    Each page's checksum is compared where it has one.

    Args:
        pages: the column's pages, as stored.
        chunk, column: see `plain_type`, which has found one.
    """
    values: list[Any] = []
    place = 0
    split = _numbers if chunk.physical_type == "INT64" else _strings
    try:
        while place < len(pages):
            header, place = _fields(pages, place)
            page = _checked(pages[place : place + header[STORED_SIZE]], header, chunk)
            place += header[STORED_SIZE]
            first = _after_levels(page, header[DATA_HEADER]) if column.max_definition_level else 0
            values += split(page[first:], header[DATA_HEADER][COUNT])
    except (_NotPlain, IndexError, KeyError, TypeError, ValueError, RecursionError, OSError, struct.error):
        return None
    return values if place == len(pages) and len(values) == chunk.num_values else None


def _checked(page: memoryview, header: dict[int, Any], chunk: pq.ColumnChunkMetaData) -> memoryview:
    """The content of a page."""
    if header[TYPE] != DATA_PAGE or len(page) != header[STORED_SIZE] or header[DATA_HEADER][ENCODING] != PLAIN:
        raise _NotPlain
    if CRC in header and crc32(page) != header[CRC] & 0xFFFFFFFF:
        raise _NotPlain
    if chunk.compression == "ZSTD" and 0 <= header[SIZE] <= chunk.total_uncompressed_size:
        page = memoryview(pa.decompress(page, header[SIZE], codec="zstd")).cast("B")
    if len(page) != header[SIZE]:
        raise _NotPlain
    return page


def _strings(page: memoryview, count: int) -> list[memoryview]:
    """The values of a page: each is its length and so many bytes."""
    values = []
    place, most = 0, len(page)
    length_at = _LENGTH.unpack_from
    for _ in range(count):
        start = place + 4
        place = start + length_at(page, place)[0]
        values.append(page[start:place])
    if place != most:
        raise _NotPlain
    return values


def _numbers(page: memoryview, count: int) -> list[int]:
    values = np.frombuffer(page, "<i8").tolist()
    if len(values) != count:
        raise _NotPlain
    return values


def _after_levels(page: memoryview, header: dict[int, Any]) -> int:
    """Where the values begin, behind levels that are one run of ones: nothing is missing."""
    size = _LENGTH.unpack_from(page)[0]
    run, place = _varint(page, 4)
    if header[LEVELS_ENCODING] != RLE or run != header[COUNT] << 1 or page[place] != 1 or place + 1 != 4 + size:
        raise _NotPlain
    return 4 + size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """An unsigned integer of Thrift's compact protocol, and where the next thing begins."""
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise _NotPlain


def _fields(data: memoryview, place: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct in Thrift's compact protocol by number, and where the next thing begins."""
    found: dict[int, Any] = {}
    number = 0
    while head := data[place]:
        place += 1
        if head >> 4:
            number += head >> 4
        else:
            number, place = _integer(data, place)
        found[number], place = _value(data, place, head & 0x0F)
    return found, place + 1


def _integer(data: memoryview, place: int) -> tuple[int, int]:
    value, place = _varint(data, place)
    return (value >> 1) ^ -(value & 1), place


def _value(data: memoryview, place: int, kind: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _integer(data, place)
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, place
    if kind == _BINARY:
        size, place = _varint(data, place)
        return bytes(data[place : place + size]), place + size
    if kind == _STRUCT:
        return _fields(data, place)
    if kind in (_BYTE, _DOUBLE):
        return None, place + (1 if kind == _BYTE else 8)
    raise _NotPlain
