"""Weakly labelled clips of digits and instrument notes: several classes per clip, a long tail, sound and sight.

A small stand-in for AudioSet. A sample is two seconds of video and sound. Class k is digit k and instrument family k
of `notes`. A clip has one to three classes; each is heard, as a note of 0.4 to 0.8 s at a random time, or seen, as a
digit that drifts over three to eight of the eight frames, or both. The labels do not say where or how. Noise and bar
are those of `av_digits`. In `train` class k is drawn in proportion to (k + 1)^-1.2, in `test` all classes are equally
frequent, as they nearly are in AudioSet's evaluation set. Digits and pitches are held out as in their sources. `val`
has more clips like those of `train`, of the same digits and pitches: what a method measures of its training.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pipelines.features import LabelsFeature, MediaFeature
from pipelines.sources import Listing, Sample, Unit, digits, notes, refuse_options
from pipelines.sources._common import item_seed, number, units_of
from pipelines.sources._soundfont import Note, SoundFont, play
from pipelines.sources.av_digits import BAR, LICENCE, LOUDNESS, ORIGIN, PIXEL_NOISE, SIDE, matroska, packages

CLASSES = len(notes.CLASSES)
FRAMES, FPS = 8, 4
SAMPLES = notes.RATE * FRAMES // FPS
MOST = 3
"""Most classes of a clip."""
TAIL = 1.2
"""Exponent of the classes' prior in `train`."""
HEARD, SEEN = 0.85, 0.5
"""Probability that a class is heard, and that it is seen, before clips without either are drawn again."""
NOTE_S = (0.4, 0.8)
SHOWN = (3, FRAMES)
"""Least and most frames in which a digit is seen."""
FADE = notes.RATE // 50
"""Samples over which a note ends, so that its end is no click."""


class Event(NamedTuple):
    """A class of a clip: whether it is heard and seen."""

    label: int
    heard: bool
    seen: bool


class Parts(NamedTuple):
    """What clips of a split are made of: the font, the pictures, and by class the notes and rows of pictures."""

    font: SoundFont
    images: NDArray[np.uint8]
    notes: Sequence[Sequence[notes.NoteId]]
    rows: Sequence[Sequence[int]]


def prior(split: str) -> NDArray[np.float64]:
    """Return the probability of each class (10,) to be drawn first."""
    weights = np.arange(1, CLASSES + 1) ** (0.0 if split == "test" else -TAIL)
    return weights / weights.sum()


def draw_events(split: str, rng: Generator) -> list[Event]:
    """Return the classes of a clip, each heard or seen."""
    labels = rng.choice(CLASSES, int(rng.integers(1, MOST + 1)), replace=False, p=prior(split))
    events = []
    for label in labels.tolist():
        heard, seen = False, False
        while not (heard or seen):
            heard, seen = (bool(value) for value in rng.random(2) < (HEARD, SEEN))
        events.append(Event(label, heard, seen))
    return events


def add_note(sound: NDArray[np.float64], font: SoundFont, place: notes.NoteId, rng: Generator) -> None:
    """Add a note to a clip (32000,), in place, at a random time; its root mean square is that of the noise."""
    seconds = float(rng.uniform(*NOTE_S))
    note = play(font, Note(*place[:3], seconds=seconds, held=seconds), notes.RATE).astype(np.float64)
    note *= LOUDNESS / max(float(np.sqrt(np.mean(note**2))), 1e-4)
    note[-FADE:] *= np.linspace(1, 0, FADE)
    start = int(rng.integers(0, SAMPLES - len(note) + 1))
    sound[start : start + len(note)] += note


def add_digit(frames: NDArray[np.float64], image: NDArray[np.uint8], rng: Generator) -> None:
    """Add a digit (28, 28) that drifts over some successive frames (8, 32, 32), in place."""
    count = int(rng.integers(SHOWN[0], SHOWN[1] + 1))
    first, room = int(rng.integers(0, FRAMES - count + 1)), SIDE - image.shape[0]
    start, end = rng.integers(0, room + 1, 2), rng.integers(0, room + 1, 2)
    for step in range(count):
        top, left = np.rint(start + (end - start) * step / (count - 1)).astype(int)
        part = frames[first + step, top : top + image.shape[0], left : left + image.shape[1]]
        np.maximum(part, image / 255, out=part)


def compose(events: Sequence[Event], parts: Parts, rng: Generator) -> tuple[bytes, list[str]]:
    """Return a clip as Matroska, and for each event where its note and its digit come from."""
    sound, frames = np.zeros(SAMPLES), np.zeros((FRAMES, SIDE, SIDE))
    origins = []
    for event in events:
        used = []
        if event.heard:
            place = parts.notes[event.label][int(rng.integers(len(parts.notes[event.label])))]
            add_note(sound, parts.font, place, rng)
            used.append(f"TimGM6mb.{'.'.join(map(str, place[:3]))}")
        if event.seen:
            row = parts.rows[event.label][int(rng.integers(len(parts.rows[event.label])))]
            add_digit(frames, parts.images[row], rng)
            used.append(f"mnist_5k.{row}")
        origins.append("+".join(used))
    bar = int(rng.integers(SIDE // 2 - BAR // 2 - 2, SIDE // 2 - BAR // 2 + 3))
    frames[:, :, bar : bar + BAR] = 0
    frames += rng.normal(0, PIXEL_NOISE, frames.shape)
    sound += rng.normal(0, LOUDNESS, SAMPLES)
    pixels = (frames.clip(0, 1) * 255).round().astype(np.uint8)
    return matroska(pixels, np.rint(sound.clip(-1, 1) * 32767).astype(np.int16), FPS), origins


class WeakAV:
    """The source. Options: `clips` (6,000) to train on, `held_out` (1,500) to test on, `validation` (500) in `val`."""

    title = "8,000 clips with several weak labels and a long tail, audio and video (from the packages of av_digits)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the clips; `src` is a folder with both packages' files, downloaded if None."""
        counts = {"clips": ("train", 6000), "held_out": ("test", 1500), "validation": ("val", 500)}
        refuse_options(options, tuple(counts))
        packages(src)
        rows = {split: list(range(number(options, name, count))) for name, (split, count) in counts.items()}
        units = units_of(rows, shard_rows, "rows", src=src, seed=seed)
        classes = tuple(f"{digit} or {family}" for digit, family in enumerate(notes.CLASSES))
        features = {"media": MediaFeature(channels=1, size=(SIDE, SIDE)), "label": LabelsFeature()}
        return Listing("weak_av", features, classes, LICENCE, ORIGIN, units)

    def samples(self, unit: Unit) -> Iterator[Sample]:
        """Compose and encode the unit's clips; the key names the parts of each class."""
        seed, parts = unit.content["seed"], split_parts(unit)
        for row in unit.content["rows"]:
            rng = np.random.default_rng(item_seed(seed, f"weak_av/{unit.split}/{row}"))
            events = draw_events(unit.split, rng)
            media, origins = compose(events, parts, rng)
            labels = [event.label for event in events]
            yield {"key": f"weak_av/{unit.split}/{row}/{','.join(origins)}", "media": media, "label": sorted(labels)}


def split_parts(unit: Unit) -> Parts:
    """Return the notes and pictures of the unit's split; `val` has those of `train`."""
    split = "test" if unit.split == "test" else "train"
    pixels, fonts = packages(unit.content["src"])
    images, labels = digits.read_archive(pixels)
    font = notes.soundfont(fonts)
    places = notes.split_notes(font, 0)[split]
    rows = digits.stratified_split(labels, unit.content["seed"])[split]
    return Parts(
        font,
        images,
        [[place for place in places if place[3] == label] for label in range(CLASSES)],
        [[row for row in rows if labels[row] == label] for label in range(CLASSES)],
    )


source = WeakAV()
