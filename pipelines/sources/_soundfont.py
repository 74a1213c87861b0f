"""SoundFont 2 files: reading their tables and playing single notes, in NumPy.

A note plays the recorded samples of its key: each is resampled (with soxr) from its own pitch to the key's, looped if
the font requires it, and multiplied by the font's volume envelope. Filters, modulators, LFOs and reverberation are not
implemented. Source: SoundFont Technical Specification 2.04 (generator numbers in chapter 8.1.2).
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from perceiver.config import UserError

Generators = dict[int, int]

INSTRUMENT, KEY_RANGE, VELOCITY_RANGE, SAMPLE = 41, 43, 44, 53
START, END, LOOP_START, LOOP_END = (0, 4), (1, 12), (2, 45), (3, 50)
"""Generators of the fine and coarse (32,768 samples) offsets of a sample's points."""
ATTENUATION, COARSE, FINE, LOOPED, SCALE, ROOT = 48, 51, 52, 54, 56, 58
DELAY, ATTACK, HOLD, DECAY, SUSTAIN, RELEASE, HOLD_BY_KEY, DECAY_BY_KEY = 33, 34, 35, 36, 37, 38, 39, 40
ADDED = {ATTENUATION, COARSE, FINE, SCALE, DELAY, ATTACK, HOLD, DECAY, SUSTAIN, RELEASE, HOLD_BY_KEY, DECAY_BY_KEY}
"""Generators that a preset adds to its instrument's value; the others apply in instruments only."""
DEFAULTS = {SCALE: 100, ROOT: -1, DELAY: -12000, ATTACK: -12000, HOLD: -12000, DECAY: -12000, RELEASE: -12000}
SILENCE_CB = 1000
"""Attenuation in centibels that counts as silence."""

HEADER = np.dtype([("name", "S20"), ("program", "<u2"), ("bank", "<u2"), ("bag", "<u2"), ("rest", "V12")])
INST = np.dtype([("name", "S20"), ("bag", "<u2")])
BAG = np.dtype([("generator", "<u2"), ("modulator", "<u2")])
GENERATOR = np.dtype([("kind", "<u2"), ("amount", "<i2")])
SAMPLES = np.dtype(
    {
        "names": ["name", "start", "end", "loop_start", "loop_end", "rate", "root", "correction", "link", "kind"],
        "formats": ["S20", "<u4", "<u4", "<u4", "<u4", "<u4", "u1", "i1", "<u2", "<u2"],
    }
)
TABLES = {"phdr": HEADER, "pbag": BAG, "pgen": GENERATOR, "inst": INST, "ibag": BAG, "igen": GENERATOR, "shdr": SAMPLES}


@dataclass(frozen=True)
class SoundFont:
    """The tables of a font; `presets` maps (bank, program) to zones."""

    wave: NDArray[np.int16]
    samples: NDArray[Any]
    presets: Mapping[tuple[int, int], list[Generators]]
    instruments: list[list[Generators]]

    def zones(self, bank: int, program: int, key: int, velocity: int) -> Iterator[Generators]:
        """Yield the generators of every sample that this key plays; none if the preset is silent there."""
        for outer in self.presets.get((bank, program), []):
            if _within(outer, key, velocity):
                for inner in self.instruments[outer[INSTRUMENT]]:
                    if _within(inner, key, velocity):
                        zone = {**DEFAULTS, **inner}
                        yield {**zone, **{kind: zone.get(kind, 0) + outer[kind] for kind in ADDED & outer.keys()}}


def read_font(content: bytes) -> SoundFont:
    """Read a SoundFont 2 file, or raise `UserError`."""
    try:
        chunks = dict(_chunks(content, 0, len(content)))
        table = {name: np.frombuffer(chunks[name.encode()], kind) for name, kind in TABLES.items()}
        wave = np.frombuffer(chunks[b"smpl"], "<i2")
    except (KeyError, ValueError, struct.error) as error:
        raise UserError(f"not a SoundFont 2 file: {error!r}; wanted a complete .sf2 file") from error
    outer = _zones(table["phdr"], table["pbag"], table["pgen"], INSTRUMENT)
    presets = {
        (int(row["bank"]), int(row["program"])): zones for row, zones in zip(table["phdr"][:-1], outer, strict=True)
    }
    return SoundFont(wave, table["shdr"], presets, _zones(table["inst"], table["ibag"], table["igen"], SAMPLE))


def _chunks(content: bytes, start: int, stop: int) -> Iterator[tuple[bytes, bytes]]:
    while start + 8 <= stop:
        name, size = struct.unpack_from("<4sI", content, start)
        if name in (b"RIFF", b"LIST"):
            yield from _chunks(content, start + 12, start + 8 + size)
        else:
            yield name, content[start + 8 : start + 8 + size]
        start += 8 + size + size % 2


def _zones(rows: NDArray[Any], bags: NDArray[Any], generators: NDArray[Any], last: int) -> list[list[Generators]]:
    """Return the zones of each row but the last. A first zone without a target has the defaults of the others."""
    found = []
    for first, stop in zip(rows["bag"][:-1], rows["bag"][1:], strict=True):
        zones, common = [], {}
        for bag in range(int(first), int(stop)):
            part = generators[bags["generator"][bag] : bags["generator"][bag + 1]]
            zone = dict(zip(part["kind"].tolist(), part["amount"].tolist(), strict=True))
            if last in zone:
                zones.append({**common, **zone})
            elif bag == first:
                common = zone
        found.append(zones)
    return found


def _within(zone: Generators, key: int, velocity: int) -> bool:
    return all(
        (zone[kind] & 0xFF) <= value <= ((zone[kind] >> 8) & 0xFF)
        for kind, value in ((KEY_RANGE, key), (VELOCITY_RANGE, velocity))
        if kind in zone
    )


@dataclass(frozen=True)
class Note:
    """One key of one preset.

    Attributes:
        bank, program: of the preset.
        key: MIDI key, 60 is middle C.
        velocity: 1 to 127.
        seconds: length of the result.
        held: seconds until the key is released.
    """

    bank: int
    program: int
    key: int
    velocity: int = 100
    seconds: float = 1.0
    held: float = 0.8


def play(font: SoundFont, note: Note, rate: int) -> NDArray[np.float32]:
    """Return the note as (seconds * rate,) samples of about -1 to 1; zeros if the preset has no sound at this key."""
    total = np.zeros(round(note.seconds * rate), np.float32)
    for zone in font.zones(note.bank, note.program, note.key, note.velocity):
        voice = _voice(font, zone, note, rate)
        gain = 10 ** (-(zone.get(ATTENUATION, 0) * 0.4) / 200) * (note.velocity / 127) ** 2
        total[: len(voice)] += gain * voice[: len(total)] * _envelope(zone, note, rate, min(len(voice), len(total)))
    return total


def _voice(font: SoundFont, zone: Generators, note: Note, rate: int) -> NDArray[np.float32]:
    """Return one sample at the note's pitch and at the wanted rate, looped up to the note's length."""
    header = font.samples[zone[SAMPLE] & 0xFFFF]
    start, end, loop_start, loop_end = (
        int(header[name]) + zone.get(fine, 0) + 32768 * zone.get(coarse, 0)
        for name, (fine, coarse) in (("start", START), ("end", END), ("loop_start", LOOP_START), ("loop_end", LOOP_END))
    )
    root = zone[ROOT] if zone[ROOT] >= 0 else min(int(header["root"]), 127)
    cents = (note.key - root) * zone[SCALE] + 100 * zone.get(COARSE, 0) + zone.get(FINE, 0) + int(header["correction"])
    speed = float(header["rate"]) * 2 ** (cents / 1200)
    wave = font.wave[start:end].astype(np.float32) / 32768
    needed = int(note.seconds * speed) + 64
    if zone.get(LOOPED, 0) & 1 and start <= loop_start < loop_end <= end and len(wave) < needed:
        turn = wave[loop_start - start : loop_end - start]
        times = -(-(needed - (loop_end - start)) // len(turn))
        wave = np.concatenate([wave[: loop_end - start], np.tile(turn, max(0, times))])
    return soxr.resample(wave[:needed], speed, rate, quality="HQ")


def _envelope(zone: Generators, note: Note, rate: int, length: int) -> NDArray[np.float32]:
    """Return the volume envelope: delay, linear attack, hold, then decay, sustain and release linear in decibels."""
    seconds = {kind: 2 ** (zone[kind] / 1200) for kind in (DELAY, ATTACK, HOLD, DECAY, RELEASE)}
    for kind, by_key in ((HOLD, HOLD_BY_KEY), (DECAY, DECAY_BY_KEY)):
        seconds[kind] *= 2 ** (zone.get(by_key, 0) * (60 - note.key) / 1200)
    time = np.arange(length) / rate
    peak = seconds[DELAY] + seconds[ATTACK]
    rise = np.clip((time - seconds[DELAY]) / seconds[ATTACK], 0, 1)
    fall = np.clip((time - peak - seconds[HOLD]) / seconds[DECAY], 0, None) * SILENCE_CB
    fall = np.minimum(fall, max(0, zone.get(SUSTAIN, 0)))
    fall += np.clip((time - note.held) / seconds[RELEASE], 0, None) * SILENCE_CB
    return (rise * 10 ** (-fall / 200) * (fall < SILENCE_CB)).astype(np.float32)
