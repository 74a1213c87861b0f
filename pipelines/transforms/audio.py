"""Audio: from encoded bytes to int16 samples of a clip at the wanted rate.

libsndfile reads WAV, FLAC, Ogg (Vorbis, Opus), MP3 and AIFF, FFmpeg other containers (MP4, WebM, ...). Only the clip is
decoded, so a recording may be long; damage outside the clip is not noticed.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
import soxr
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import Config, Size
from perceiver.storage import first_line
from pipelines.transforms import BadSample

Samples = NDArray[np.int16]
Found = NDArray[Any]
"""Samples of the source: int16, or float32 in -1 to 1."""

FULL_SCALE = 32768
MOST_RATE = 1_000_000
MOST_CHANNELS = 32
MARGIN_S = 0.02
"""Read beyond a clip's ends, so that resampling does not start from silence."""
UNKNOWN_SIZE = 0xFFFFFFFF
"""The size that streaming writers leave in a RIFF header."""


class AudioViewConfig(Config):
    """How sound is shown to the model, mono."""

    rate: int = Field(default=48_000, ge=100, le=MOST_RATE, description="samples per second; others are resampled")
    samples: Size = Field(default=61_440, description="samples of a clip (paper: 61,440, 1.28 s); silence at the end")
    channel: int | None = Field(default=None, ge=0, le=1000, description="channel to use; null: the mean of all")

    @property
    def seconds(self) -> float:
        """Return the length of a clip."""
        return self.samples / self.rate


@dataclass(frozen=True)
class Sound:
    """An open audio file, for one reader at a time.

    Attributes:
        file: the file.
        rate: samples per second.
        frames: samples of each channel.
        channels: their number.
    """

    file: soundfile.SoundFile
    rate: int
    frames: int
    channels: int

    @property
    def seconds(self) -> float:
        """Return the length of the recording."""
        return self.frames / self.rate


def open_sound(encoded: bytes, max_seconds: float) -> Sound | None:
    """Read the header; return None if libsndfile does not know the format.

    Raises:
        BadSample: empty, no samples, too long, truncated, a rate above 1 MHz, or more than 32 channels.
    """
    if not encoded:
        raise BadSample("0 bytes")
    try:
        file = soundfile.SoundFile(pa.BufferReader(encoded))  # reads a view without a copy
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError):
        return None
    sound = Sound(file, file.samplerate, file.frames, file.channels)
    check_length(sound.seconds if sound.frames < 2**62 else math.inf, max_seconds)
    check_rate(sound.rate, sound.channels)
    size = int.from_bytes(encoded[4:8], "little")
    if encoded[:4] == b"RIFF" and size != UNKNOWN_SIZE and size + 7 > len(encoded):
        raise BadSample("truncated: the file is shorter than its header states")
    return sound


def check_rate(rate: int, channels: int) -> None:
    """Raise `BadSample` for a rate or a number of channels that would take much memory."""
    if not 0 < rate <= MOST_RATE or not 0 < channels <= MOST_CHANNELS:
        raise BadSample(
            f"{channels} channels at {rate} samples per second: wanted up to {MOST_CHANNELS} at up to {MOST_RATE}"
        )


def check_length(seconds: float, max_seconds: float) -> None:
    """Raise `BadSample` for a recording that is empty or too long."""
    if seconds <= 0:
        raise BadSample("0 seconds of sound or pictures")
    if seconds > max_seconds:
        raise BadSample(f"longer than {max_seconds:g} seconds")


def sound_clip(sound: Sound, start: float, config: AudioViewConfig) -> Samples:
    """Return samples (T,) from `start` seconds on; before the recording's start and after its end there is silence.

    Raises:
        BadSample: damage in the clip, NaN or infinite samples, or a missing channel.
    """
    first, count = source_span(start, config, sound.rate)
    begin, end = min(max(first, 0), sound.frames), min(max(first + count, 0), sound.frames)
    try:
        sound.file.seek(begin)
        exact = sound.file.subtype == "PCM_16" and sound.channels == 1
        found = sound.file.read(end - begin, dtype="int16" if exact else "float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise BadSample(f"undecodable audio: {first_line(error).split('>')[-1].strip(': ')[:80]}") from error
    if len(found) < end - begin:
        raise BadSample("truncated: the sound is shorter than its header states")
    return finish(found, begin - first, count, start - first / sound.rate, sound.rate, config)


def source_span(start: float, config: AudioViewConfig, rate: int) -> tuple[int, int]:
    """Return the first sample (may be negative) and the number of samples to read for a clip at the source's rate."""
    if rate == config.rate:
        return round(start * rate), config.samples
    first = math.floor((start - MARGIN_S) * rate)
    return first, math.ceil((start + config.seconds + MARGIN_S) * rate) - first


def finish(found: Found, offset: int, count: int, lead: float, rate: int, config: AudioViewConfig) -> Samples:
    """Mix, pad, resample and cut the samples that were read.

    Args:
        found: (n, channels).
        offset: position of its first sample in the span.
        count: samples of the span, at the source's rate.
        lead: seconds from the span's start to the clip's.
        rate: of the source.
        config: rate, length and channel of the result.

    Raises:
        BadSample: NaN or infinite samples, or a missing channel.
    """
    mixed = _mono(found, config.channel)
    if len(mixed) < count:
        padded = np.zeros(count, mixed.dtype)
        padded[offset : offset + len(mixed)] = mixed
        mixed = padded
    if rate != config.rate:
        floats = mixed if mixed.dtype == np.float32 else mixed.astype(np.float32) / FULL_SCALE
        mixed = soxr.resample(floats, rate, config.rate, quality="HQ")
        skip = round(lead * config.rate)
        mixed = mixed[skip : skip + config.samples]
    if mixed.dtype != np.int16:
        scaled = mixed * np.float32(FULL_SCALE)
        mixed = np.clip(np.rint(scaled, out=scaled), -FULL_SCALE, FULL_SCALE - 1, out=scaled).astype(np.int16)
    if len(mixed) < config.samples:
        mixed = np.pad(mixed, (0, config.samples - len(mixed)))
    return mixed


def _mono(found: Found, channel: int | None) -> Found:
    if channel is not None and channel >= found.shape[1]:
        raise BadSample(f"channel {channel} of {found.shape[1]} is missing")
    if found.shape[1] == 1:
        mono = found[:, 0]
    elif channel is not None:
        mono = found[:, channel]
    else:
        mono = found @ np.full(found.shape[1], 1 / found.shape[1], np.float32)
    if mono.dtype == np.float32 and not np.isfinite(mono).all():
        raise BadSample("NaN or infinite samples")
    return mono
