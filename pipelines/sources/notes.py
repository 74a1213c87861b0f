"""Instrument notes: 4,844 notes of one second at 16 kHz in ten families, played from the soundfont in pretty_midi.

Families are those of General MIDI; of each melodic program the keys 36 to 96 are played, of the drum kits every drum
once. Pitches are held out, not notes: the keys with (key // 2) % 5 == 2 form the split `test` in all families. The
soundfont (TimGM6mb, GPL-2) is downloaded; it is not part of this project.
"""

import io
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from pipelines.features import AudioFeature, Feature, LabelFeature, TargetFeature
from pipelines.packages import Package, fetch, read_member, read_once
from pipelines.sources import Listing, Sample, Unit, refuse_options
from pipelines.sources._common import choice, units_of
from pipelines.sources._soundfont import Note, SoundFont, play, read_font

PACKAGE = Package(
    "pretty_midi==0.2.11.post0",
    "pretty_midi-0.2.11.post0-py3-none-any.whl",
    "a3e2321736245a9c92259716d85a4762f16b7bde2f591fb0dba95bdb6e793d8a",
)
MEMBER = "pretty_midi/TimGM6mb.sf2"
RATE = 16_000
FAMILIES: Mapping[str, range] = {
    "piano": range(8),
    "chromatic percussion": range(8, 16),
    "organ": range(16, 24),
    "guitar": range(24, 32),
    "bass": range(32, 40),
    "strings": range(40, 52),
    "brass": range(56, 64),
    "reed": range(64, 72),
    "pipe": range(72, 80),
}
"""General MIDI programs; the tenth family is the drum kits, bank 128."""
DRUMS = 128
CLASSES = (*FAMILIES, "drums")
KEYS = range(36, 97)
LICENCE = "rendered from TimGM6mb.sf2 (GPL-2.0), carried by pretty_midi (MIT)"

NoteId = tuple[int, int, int, int]
"""Bank, program, key and class of a note."""


@read_once
def soundfont(path: str) -> SoundFont:
    """Read the font in the package's file."""
    return read_font(read_member(path, MEMBER, PACKAGE))


def held_out(key: int) -> bool:
    """Return whether notes of this key are in the split `test`."""
    return (key // 2) % 5 == 2


def all_notes(font: SoundFont) -> list[NoteId]:
    """Return every note of the data set, in order. Drums that several kits share are taken once."""
    notes: list[NoteId] = []
    for label, programs in enumerate(FAMILIES.values()):
        notes += [
            (0, program, key, label)
            for program in programs
            for key in KEYS
            if any(font.zones(0, program, key, Note.velocity))
        ]
    seen: set[str] = set()
    for program in sorted(program for bank, program in font.presets if bank == DRUMS):
        for key in range(128):
            zones = repr([key, *(sorted(zone.items()) for zone in font.zones(DRUMS, program, key, Note.velocity))])
            if "(" in zones and zones not in seen:
                seen.add(zones)
                notes.append((DRUMS, program, key, len(FAMILIES)))
    return notes


def render(font: SoundFont, place: NoteId) -> NDArray[np.int16]:
    """Return one second of a note, (16000,) int16."""
    bank, program, key, _ = place
    return np.clip(np.rint(play(font, Note(bank, program, key), RATE) * 32767), -32768, 32767).astype(np.int16)


def flac(samples: NDArray[np.int16]) -> bytes:
    """Encode samples (T,) at 16 kHz as FLAC."""
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, RATE, format="FLAC", subtype="PCM_16")
    return encoded.getvalue()


def split_notes(font: SoundFont, seed: int) -> dict[str, list[NoteId]]:
    """Return the notes of `train` and `test`, each shuffled."""
    splits: dict[str, list[NoteId]] = {"train": [], "test": []}
    for place in all_notes(font):
        splits["test" if held_out(place[2]) else "train"].append(place)
    for places in splits.values():
        random.Random(seed).shuffle(places)
    return splits


class Notes:
    """The source: notes and their family.

    Option: `label` (family; pitch: the target is the MIDI key in semitones, without drums; both: the family as
    `label_family` and the pitch).
    """

    title = "4,844 one-second notes of 10 instrument families (soundfont in the pretty_midi package)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the notes; `src` is a copy of the package's file, downloaded if None."""
        refuse_options(options, ("label",))
        kind = choice(options, "label", ("family", "pitch", "both"), "family")
        splits = split_notes(soundfont(str(src or fetch(PACKAGE))), seed)
        if kind != "family":
            splits = {split: [note for note in notes if note[0] != DRUMS] for split, notes in splits.items()}
        features: dict[str, Feature] = {
            "family": {"label": LabelFeature()},
            "pitch": {"target": TargetFeature(names=("pitch",))},
            "both": {
                "label_family": LabelFeature(classes=tuple(FAMILIES)),
                "target": TargetFeature(names=("pitch",)),
            },
        }[kind]
        classes, name = (CLASSES, "notes") if kind == "family" else ((), f"notes_{kind}")
        units = units_of(splits, shard_rows, "notes", path=src, kind=kind)
        features = {"audio": AudioFeature(), **features}
        return Listing(name, features, classes, LICENCE, f"{PACKAGE.requirement}, {MEMBER}", units)

    def samples(self, unit: Unit) -> Iterator[Sample]:
        """Play the unit's notes and encode them as FLAC."""
        font = soundfont(unit.content["path"] or str(fetch(PACKAGE)))
        for bank, program, key, label in unit.content["notes"]:
            audio = flac(render(font, (bank, program, key, label)))
            known: dict[str, Any] = {
                "family": {"label": label},
                "pitch": {"target": [float(key)]},
                "both": {"label_family": label, "target": [float(key)]},
            }[unit.content.get("kind", "family")]
            yield {"key": f"TimGM6mb/{bank}/{program}/{key}", "audio": audio, **known}


source = Notes()
