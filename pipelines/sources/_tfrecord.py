"""TFRecord files of tf.train.SequenceExample, read without TensorFlow.

A record is its length (uint64), the masked CRC-32C of the length, the content, and the masked CRC-32C of the content,
little-endian. The content is a protocol buffer; field numbers are those of tensorflow/core/example/example.proto and
feature.proto. https://www.tensorflow.org/tutorials/load_data/tfrecord, https://protobuf.dev/programming-guides/encoding
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from pipelines.sources._common import MAX_FILE

POLYNOMIAL = 0x82F63B78
"""Castagnoli's, reversed."""
MASK_DELTA = 0xA282EAD8
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
Value = list[bytes] | list[int] | list[float]
"""What a feature has: byte strings, whole numbers or floats."""


class BadRecord(ValueError):
    """A record is damaged; the message is a reason for the quarantine."""


def _table() -> tuple[int, ...]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (POLYNOMIAL if value & 1 else 0)
        found.append(value)
    return tuple(found)


TABLE = _table()


def masked_crc(content: bytes) -> int:
    """Return the masked CRC-32C of TFRecord files."""
    crc, table = 0xFFFFFFFF, TABLE
    for byte in content:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def read_records(stream: BinaryIO) -> Iterator[bytes | BadRecord]:
    """Yield the content of each record, or what is wrong with it; after a damaged length or end the file ends."""
    while head := stream.read(12):
        length, crc = struct.unpack("<QI", head) if len(head) == 12 else (0, -1)
        if len(head) < 12:
            yield BadRecord("truncated record")
            return
        if masked_crc(head[:8]) != crc:
            yield BadRecord("wrong checksum of a length: the rest of the file is not read")
            return
        if length > MAX_FILE:
            yield BadRecord(f"a record of more than {MAX_FILE:,} bytes: the rest of the file is not read")
            return
        content, tail = stream.read(length), stream.read(4)
        if len(content) < length or len(tail) < 4:
            yield BadRecord("truncated record")
            return
        good = masked_crc(content) == struct.unpack("<I", tail)[0]
        yield content if good else BadRecord("wrong checksum of a record")


@dataclass
class SequenceExample:
    """The features of a record: those of the whole by name, and those of its steps, a list by name."""

    context: dict[str, Value] = field(default_factory=dict)
    lists: dict[str, list[Value]] = field(default_factory=dict)


def parse_sequence_example(content: bytes) -> SequenceExample:
    """Parse a record.

    Raises:
        BadRecord: it is no SequenceExample.
    """
    found = SequenceExample()
    try:
        for number, part in _messages(content):
            if number == 1:
                found.context |= {name: _feature(value) for name, value in _entries(part)}
            elif number == 2:
                for name, value in _entries(part):
                    found.lists[name] = [_feature(step) for number, step in _messages(value) if number == 1]
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise BadRecord("not a SequenceExample") from error
    return found


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise BadRecord("not a SequenceExample")


def _fields(content: bytes) -> Iterator[tuple[int, int, bytes | int]]:
    """Yield number, wire type and value of each field of a message."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        wire, value = key & 7, 0
        if wire == VARINT:
            value, at = _varint(content, at)
            yield key >> 3, wire, value
            continue
        if wire == LENGTH:
            size, at = _varint(content, at)
        else:
            size = {FIXED64: 8, FIXED32: 4}.get(wire, -1)
        if not 0 <= size <= len(content) - at:
            raise BadRecord("not a SequenceExample")
        yield key >> 3, wire, content[at : at + size]
        at += size


def _messages(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the fields that have a length."""
    return ((number, value) for number, wire, value in _fields(content) if wire == LENGTH and isinstance(value, bytes))


def _entries(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and value of each entry of a map."""
    for number, entry in _messages(content):
        if number == 1:
            parts: Mapping[int, bytes] = dict(_messages(entry))
            yield parts.get(1, b"").decode(), parts.get(2, b"")


def _feature(content: bytes) -> Value:
    """Return the values of a Feature: of its BytesList (1), FloatList (2) or Int64List (3)."""
    for kind, part in _messages(content):
        if kind == 1:
            return [value for number, value in _messages(part) if number == 1]
        if kind == 2:
            values = [value for number, _, value in _fields(part) if number == 1 and isinstance(value, bytes)]
            return [number for value in values for (number,) in struct.iter_unpack("<f", value)]
        if kind == 3:
            return [number for value in _fields(part) if value[0] == 1 for number in _whole_numbers(value[2])]
    return []


def _whole_numbers(value: bytes | int) -> Iterator[int]:
    """Yield the numbers of a field of an Int64List, packed or single; negative ones as their two's complement."""
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        yield number
