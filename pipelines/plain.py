"""Columns of encoded bytes straight from the pages of a Parquet file, as views of what was read.

Arrow copies each value twice and compares checksums by table, which together cost as much as decoding a WAV. The
columns of prepared shards need none of that: their values lie one after the other, uncompressed, as parquet.thrift
describes the encoding PLAIN. Whatever is not exactly so is left to Arrow, which has the last word on damage.
"""

import struct
from typing import Any

import pyarrow.parquet as pq
from isal.isal_zlib import crc32

DATA_PAGE, PLAIN, RLE = 0, 0, 3
TYPE, SIZE, STORED_SIZE, CRC, DATA_HEADER = 1, 2, 3, 4, 5
COUNT, ENCODING, LEVELS_ENCODING = 1, 2, 3
"""Fields of a page's header and of the data page's part of it, as parquet.thrift numbers them."""

_LENGTH = struct.Struct("<I")
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 7, 8, 12
_INTEGERS = (4, 5, 6)


class _NotPlain(Exception):
    """The pages are of another kind, or damaged."""


def is_plain(chunk: pq.ColumnChunkMetaData, column: Any) -> bool:
    """Whether a column's values may be taken from its pages: flat, uncompressed bytes that mean nothing else.

    Args:
        chunk: what the footer says of the column in a row group.
        column: what its schema says.
    """
    return (chunk.physical_type == "BYTE_ARRAY" and chunk.compression == "UNCOMPRESSED"
            and not chunk.has_dictionary_page and column.logical_type.type == "NONE" and not column.max_repetition_level
            and column.max_definition_level <= 1 and "." not in chunk.path_in_schema)


def plain_values(pages: memoryview, count: int, *, optional: bool) -> list[memoryview] | None:
    """The values of a column in a row group, views of `pages`; None if Arrow should read them.

    Each page's checksum is compared where it has one.

    Args:
        pages: the column's pages, as stored.
        count: values in them.
        optional: whether the schema allows for missing values. If one is missing, Arrow should read them.
    """
    values: list[memoryview] = []
    place = 0
    try:
        while place < len(pages):
            header, place = _fields(pages, place)
            page = pages[place:place + header[STORED_SIZE]]
            place += header[STORED_SIZE]
            _split(values, _checked(page, header), header[DATA_HEADER], optional)
    except (_NotPlain, IndexError, KeyError, TypeError, RecursionError, struct.error):
        return None
    return values if place == len(pages) and len(values) == count else None


def _checked(page: memoryview, header: dict[int, Any]) -> memoryview:
    if header[TYPE] != DATA_PAGE or not len(page) == header[STORED_SIZE] == header[SIZE]:
        raise _NotPlain
    if CRC in header and crc32(page) != header[CRC] & 0xFFFFFFFF:
        raise _NotPlain
    return page


def _split(values: list[memoryview], page: memoryview, header: dict[int, Any], optional: bool) -> None:
    """Add the values of a page: each is its length and so many bytes."""
    if header[ENCODING] != PLAIN:
        raise _NotPlain
    place = _after_levels(page, header) if optional else 0
    length_at, most = _LENGTH.unpack_from, len(page)
    for _ in range(header[COUNT]):
        start = place + 4
        place = start + length_at(page, place)[0]
        values.append(page[start:place])
    if place != most:
        raise _NotPlain


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
        return bytes(data[place:place + size]), place + size
    if kind == _STRUCT:
        return _fields(data, place)
    if kind in (_BYTE, _DOUBLE):
        return None, place + (1 if kind == _BYTE else 8)
    raise _NotPlain
