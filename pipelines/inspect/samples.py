"""Recordings and optical flow on the page of `perceiver inspect`: spectrograms and players, frames, coloured motion."""

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from pipelines.features.audio import clip
from pipelines.inspect.pieces import SMALL, Piece, data_uri, picture
from pipelines.transforms.audio import AudioConfig, Sound
from pipelines.transforms.decode import to_image
from pipelines.transforms.media import Media, frames_at
from pipelines.transforms.optical_flow import Pair

HEARD_S = 5.0
"""Of longer recordings, what can be listened to."""
HEARD_RATE = 24_000
COLUMNS = 320
"""Width of a spectrogram in pixels."""
FLOOR_DB = 80.0
"""What lies further below the loudest is black."""
FRAMES, FRAME_HEIGHT = 6, 120
PLAYED_BYTES = 1_000_000
"""Larger videos are shown as frames only."""
PLAYABLE = {"h264", "vp8", "vp9", "av1"}
STRIP = 960
GAP = (128, 128, 128)


def show_audio(stored: Any, decoded: Sound | Media) -> list[Piece]:
    """Spectrogram and player of the beginning."""
    seconds = min(decoded.seconds, HEARD_S)
    rate = min(decoded.rate, HEARD_RATE)
    samples = clip(decoded, 0.0, AudioConfig(rate=rate, samples=max(1, round(seconds * rate))))
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, format="FLAC")
    cut = f", the first {HEARD_S:g} s of it here" if decoded.seconds > HEARD_S else ""
    note = f"{decoded.seconds:.3g} s at {decoded.rate / 1000:g} kHz, {decoded.channels} channel"
    return [
        picture(spectrogram(samples), f"{note}{'s' * (decoded.channels > 1)}{cut}", "strip", COLUMNS),
        Piece("audio", data_uri(sink.getvalue(), "audio/flac")),
    ]


def spectrogram(samples: NDArray[np.int16], window: int = 512) -> Image.Image:
    """Loudness over time (to the right) and frequency (upwards, all of it), in decibels below the loudest."""
    from matplotlib import colormaps

    wave = np.pad(samples.astype(np.float32), (window // 2, window // 2 + max(0, COLUMNS - len(samples))))
    starts = np.linspace(0, len(wave) - window, COLUMNS).astype(int)
    frames = wave[starts[:, None] + np.arange(window)] * np.hanning(window).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1)).T[::-1] ** 2
    peak = float(power.max())
    if peak == 0:
        return Image.new("RGB", (COLUMNS, window // 4))
    shade = 1 + 10 * np.log10(np.maximum(power / peak, 1e-12)) / FLOOR_DB
    pixels = (colormaps["magma"](np.clip(shade, 0, 1))[..., :3] * 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((COLUMNS, window // 4), Image.Resampling.BOX)


def measure_audio(decoded: Sound | Media) -> Mapping[str, float]:
    """Length and rate."""
    return {"seconds": decoded.seconds, "rate": decoded.rate}


def show_video(stored: Any, decoded: Media) -> list[Piece]:
    """Frames from beginning to end, and a player for a short file that browsers know."""
    times = decoded.seconds * (np.arange(FRAMES) + 0.5) / FRAMES
    images, index = frames_at(decoded, times, to_image, 3)
    note = f"{decoded.width} × {decoded.height}, {decoded.seconds:.3g} s, {decoded.fps:.3g} frames a second"
    pieces = [strip([images[number] for number in index], note)]
    codec = decoded.container.streams.video[0].codec_context.name
    if codec in PLAYABLE and len(stored) <= PLAYED_BYTES:
        kind = "video/mp4" if stored[4:8] == b"ftyp" else "video/webm"
        pieces.append(Piece("video", data_uri(stored, kind)))
    return pieces


def measure_video(decoded: Media) -> Mapping[str, float]:
    """Length, rate and size of the pictures."""
    return {
        "seconds": decoded.seconds,
        "frames a second": decoded.fps,
        "height": decoded.height,
        "width": decoded.width,
    }


def show_media(stored: Any, decoded: Media) -> list[Piece]:
    """The pictures, then the sound."""
    return [*show_video(stored, decoded), *show_audio(stored, decoded)]


def measure_media(decoded: Media) -> Mapping[str, float]:
    """Of pictures and sound."""
    return {**measure_video(decoded), "rate": decoded.rate}


def show_flow(stored: Any, decoded: Pair) -> list[Piece]:
    """Both frames and the flow between them; direction is hue, length is strength, unknown is grey."""
    longest = float(np.hypot(*decoded.flow)[decoded.valid].max(initial=0.0))
    frames = [
        *(to_image(frame).convert("RGB") for frame in (decoded.first, decoded.second)),
        flow_colours(decoded.flow, decoded.valid),
    ]
    height, width = decoded.valid.shape
    note = f"{width} × {height}, up to {longest:.3g} pixels of motion"
    return [strip(frames, note)]


def flow_colours(flow: NDArray[np.float32], valid: NDArray[np.bool_]) -> Image.Image:
    """Flow (2, H, W) as colours: hue is the direction, saturation the length against the longest, grey is unknown."""
    from matplotlib.colors import hsv_to_rgb

    across, down = np.where(valid, flow, 0)
    length = np.hypot(across, down)
    hue = (np.arctan2(-down, across) / (2 * np.pi)) % 1
    colours = hsv_to_rgb(np.stack([hue, length / max(float(length.max()), 1e-6), np.ones_like(hue)], axis=-1))
    return Image.fromarray((np.where(valid[..., None], colours, 0.5) * 255).astype(np.uint8))


def measure_flow(decoded: Pair) -> Mapping[str, float]:
    """Size, mean length of the flow, and the share where it is known."""
    known = np.hypot(*decoded.flow)[decoded.valid]
    height, width = decoded.valid.shape
    return {
        "height": height,
        "width": width,
        "known share": float(decoded.valid.mean()),
        "mean pixels of motion": float(known.mean()) if known.size else 0.0,
    }


def strip(images: list[Image.Image], note: str) -> Piece:
    """Pictures side by side as one piece; small ones are enlarged without smoothing."""
    return replace(picture(montage(images), note, "strip", STRIP), pixelated=images[0].height < SMALL)


def montage(images: list[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures side by side, all of one height."""
    height = min(FRAME_HEIGHT, max(image.height for image in images))
    fitted = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    whole = Image.new("RGB", (sum(image.width + gap for image in fitted) - gap, height), GAP)
    left = 0
    for image in fitted:
        whole.paste(image, (left, 0))
        left += image.width + gap
    return whole
