"""Parts of the page and statistics of one sample, for each kind of feature."""

import base64
import io
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from perceiver.report.figures import image_uri, montage
from perceiver.report.page import CardPart, data_uri
from perceiver.text_ids import BETWEEN
from pipelines.features.audio import clip
from pipelines.features.boxes import Corners
from pipelines.transforms.audio import AudioViewConfig, Sound
from pipelines.transforms.decode import Picture, to_image
from pipelines.transforms.mask import mask_colours
from pipelines.transforms.media import Media, frames_at
from pipelines.transforms.optical_flow import Pair
from pipelines.transforms.points import normalised

POINTS, CHARACTERS = 2048, 600
"""Most points of a cloud and characters of a text on the page."""
HEARD_S, HEARD_RATE = 5.0, 24_000
"""Limits of the sound on the page; longer recordings are cut, higher rates resampled."""
LINES, BOX_COLOUR = 250, (255, 0, 255)
"""A box's line has this fraction of the longer side of the picture, at least a pixel."""
SPECTROGRAM_WIDTH, FLOOR_DB = 320, 80.0
"""Pixels, and decibels below the loudest that are black."""
NUMBERS, PLOTTED, PLOT_HEIGHT = 8, 8, 80
"""Of a series: numbers that are written, channels that are drawn, and pixels."""
FRAMES, FRAME_HEIGHT, STRIP_WIDTH = 6, 120, 960
WHEEL = (0, 15, 21, 25, 36, 49, 55)
HUES = ((1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0, 0))
"""Places of red, yellow, green, cyan, blue and magenta on the wheel of flow's colours, which starts to the right."""
PLAYABLE, PLAYED_BYTES = {"h264", "vp8", "vp9", "av1"}, 1_000_000
"""Codecs that browsers play; larger videos are shown as frames only."""


def show(kind: str, stored: Any, decoded: Any) -> list[CardPart]:
    """Return the parts that show a feature's value, stored and decoded; none for labels, which are written.

    Of a recording, those streams that were opened.
    """
    match kind:
        case "image":
            return [CardPart("picture", image_uri(to_image(decoded)), f"{decoded.shape[1]} × {decoded.shape[0]}")]
        case "text":
            shown = decoded.replace(BETWEEN, " | ")
            cut = shown if len(shown) <= CHARACTERS else shown[:CHARACTERS] + "…"
            return [CardPart("text", cut, f"{len(decoded):,} characters")]
        case "answer":
            return [CardPart("text", decoded, "the answer")] if decoded else []
        case "answers":
            return [CardPart("text", " | ".join(decoded), f"{len(decoded)} right answers")] if decoded else []
        case "points":
            # Spread over the stored order, in a cube of -127 to 127.
            chosen = decoded[np.linspace(0, len(decoded) - 1, min(len(decoded), POINTS)).astype(int), :3]
            coarse = np.round(127 * normalised(chosen)).astype(np.int8)
            return [CardPart("points", base64.b64encode(coarse.tobytes()).decode(), f"{len(decoded):,} points")]
        case "series":
            return [CardPart("strip", image_uri(_plot(decoded), STRIP_WIDTH), _numbers(decoded))]
        case "embeddings":
            picture = Image.fromarray(np.ascontiguousarray(decoded.T)).resize((SPECTROGRAM_WIDTH, decoded.shape[1]))
            return [CardPart("strip", image_uri(picture), f"{len(decoded)} segments × {decoded.shape[1]} values")]
        case "audio":
            return _show_audio(decoded)
        case "video":
            return _show_video(stored, decoded)
        case "media":
            pictures = _show_video(stored, decoded) if decoded.height else []
            return pictures + (_show_audio(decoded) if decoded.rate else [])
        case "segmentation":
            image = to_image(decoded.picture).convert("RGB")
            return [strip([image, mask_colours(decoded.mask)], f"{image.width} × {image.height}, image and mask")]
        case "flow":
            images = [to_image(frame).convert("RGB") for frame in (decoded.first, decoded.second)]
            longest = float(np.hypot(*decoded.flow)[decoded.valid].max(initial=0.0))
            note = f"{_size(decoded)}, up to {longest:.3g} pixels of motion"
            return [strip([*images, flow_colours(decoded.flow, decoded.valid)], note)]
    return []


def show_boxes(picture: Picture, boxes: Corners) -> list[CardPart]:
    """Return the part that shows an image with its boxes, drawn around what they contain."""
    image = to_image(picture).convert("RGB")
    line = max(1, max(image.size) // LINES)
    pen = ImageDraw.Draw(image)
    for left, top, right, bottom in boxes.round().astype(int).tolist():
        pen.rectangle((left - line, top - line, right + line - 1, bottom + line - 1), outline=BOX_COLOUR, width=line)
    note = f"{image.width} × {image.height}, {len(boxes)} box" + "es" * (len(boxes) != 1)
    return [CardPart("picture", image_uri(image), note)]


def measure(kind: str, decoded: Any) -> dict[str, float]:
    """Return the quantities of a decoded value by name; none for labels, which are counted."""
    match kind:
        case "image":
            return {"height": decoded.shape[0], "width": decoded.shape[1]}
        case "text" | "answer":
            return {"characters": len(decoded), "bytes": len(decoded.encode())}
        case "answers":
            return {"answers": len(decoded)}
        case "boxes":
            return {} if decoded is None else {"boxes": len(decoded)}
        case "points":
            extent = decoded[:, :3].max(axis=0) - decoded[:, :3].min(axis=0)
            return {"points": len(decoded), "longest side": float(extent.max())}
        case "series":
            return {"steps": len(decoded), "smallest": float(decoded.min()), "largest": float(decoded.max())}
        case "embeddings":
            return {"segments": len(decoded)}
        case "audio":
            return {"seconds": decoded.seconds, "rate": decoded.rate}
        case "video" | "media":
            size = {"height": decoded.height, "width": decoded.width}
            sound = {"rate": decoded.rate} if kind == "media" else {}
            return {"seconds": decoded.seconds, "frames per second": decoded.fps, **size, **sound}
        case "segmentation":
            return {"height": decoded.mask.shape[0], "width": decoded.mask.shape[1]}
        case "flow":
            known = np.hypot(*decoded.flow)[decoded.valid]
            height, width = decoded.valid.shape
            motion = float(known.mean()) if known.size else 0.0
            share = float(decoded.valid.mean())
            return {"height": height, "width": width, "known share": share, "mean pixels of motion": motion}
    return {}


def _numbers(steps: NDArray[np.float32]) -> str:
    """Return size and first numbers of a series, (length, channels)."""
    first = ", ".join(f"{value:.4g}" for value in steps.ravel()[:NUMBERS])
    return f"{len(steps):,} × {steps.shape[1]}: {first}" + ", …" * (steps.size > NUMBERS)


def _plot(steps: NDArray[np.float32]) -> Image.Image:
    """Return the channels of a series over time, each from its smallest to its largest; of one step, its channels."""
    lines = steps if len(steps) > 1 else steps.T
    size = lines.max(0) - lines.min(0)
    height = (lines - lines.min(0)) / np.where(size > 0, size, 1)
    picture = np.full((PLOT_HEIGHT, SPECTROGRAM_WIDTH), 255, np.uint8)
    across = np.linspace(0, len(lines) - 1, SPECTROGRAM_WIDTH)
    for channel in height.T[:PLOTTED]:
        rows = np.interp(across, np.arange(len(lines)), channel)
        picture[np.round((1 - rows) * (PLOT_HEIGHT - 1)).astype(int), np.arange(SPECTROGRAM_WIDTH)] = 0
    return Image.fromarray(picture)


def _show_audio(decoded: Sound | Media) -> list[CardPart]:
    """Return spectrogram and player of the beginning."""
    seconds, rate = min(decoded.seconds, HEARD_S), min(decoded.rate, HEARD_RATE)
    samples = clip(decoded, 0.0, AudioViewConfig(rate=rate, samples=max(1, round(seconds * rate))))
    note = f"{decoded.seconds:.3g} s at {decoded.rate / 1000:g} kHz, {decoded.channels} channel"
    note += "s" * (decoded.channels > 1) + f", the first {HEARD_S:g} s here" * (decoded.seconds > HEARD_S)
    return heard(samples, rate, note)


def heard(samples: NDArray[np.int16], rate: int, note: str) -> list[CardPart]:
    """Return spectrogram and player of samples (T,)."""
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, format="FLAC")
    image = image_uri(spectrogram(samples), SPECTROGRAM_WIDTH)
    return [CardPart("strip", image, note), CardPart("audio", data_uri(sink.getvalue(), "audio/flac"))]


def spectrogram(samples: NDArray[np.int16], window: int = 512) -> Image.Image:
    """Return loudness over time (to the right) and frequency (upwards, all of it), in decibels below the loudest."""
    from matplotlib import colormaps

    width = SPECTROGRAM_WIDTH
    wave = np.pad(samples.astype(np.float32), (window // 2, window // 2 + max(0, width - len(samples))))
    starts = np.linspace(0, len(wave) - window, width).astype(int)
    frames = wave[starts[:, None] + np.arange(window)] * np.hanning(window).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1)).T[::-1] ** 2
    level = 10 * np.log10(np.maximum(power / max(float(power.max()), 1e-12), 1e-12))
    pixels = (colormaps["magma"](np.clip(1 + level / FLOOR_DB, 0, 1))[..., :3] * 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, window // 4), Image.Resampling.BOX)


def _show_video(stored: Any, decoded: Media) -> list[CardPart]:
    """Return frames from beginning to end, and a player for a short file that browsers play."""
    times = decoded.seconds * (np.arange(FRAMES) + 0.5) / FRAMES
    images, index = frames_at(decoded, times, to_image, 3)
    note = f"{decoded.width} × {decoded.height}, {decoded.seconds:.3g} s, {decoded.fps:.3g} frames per second"
    parts = [strip([images[number] for number in index], note)]
    codec = decoded.container.streams.video[0].codec_context.name
    if codec in PLAYABLE and len(stored) <= PLAYED_BYTES:
        parts.append(CardPart("video", data_uri(stored, "video/mp4" if stored[4:8] == b"ftyp" else "video/webm")))
    return parts


def flow_colours(
    flow: NDArray[np.float32], valid: NDArray[np.bool_] | None = None, longest: float | None = None
) -> Image.Image:
    """Return flow in the colours of Baker et al. (IJCV 2011): hue is the direction, saturation the length.

    Args:
        flow: (2, H, W), horizontal first.
        valid: (H, W); grey where it is False.
        longest: the length of full saturation in pixels, as of another flow; None: that of the flow's longest.
    """
    known: NDArray[np.bool_] = np.isfinite(flow[0]) & np.isfinite(flow[1])
    known = known if valid is None else known & valid
    across, down = np.where(known, flow, 0)
    length = np.hypot(across, down)
    longest = float(length.max(initial=0)) if longest is None else longest
    saturation = np.minimum(length / max(longest, 1e-6), 1)[..., None]
    direction = (np.arctan2(-down, -across) / (2 * np.pi) + 0.5) % 1 * WHEEL[-1]
    hue = np.stack([np.interp(direction, WHEEL, channel) for channel in zip(*HUES, strict=True)], axis=-1)
    colours = 1 - saturation * (1 - hue)
    return Image.fromarray((np.where(known[..., None], colours, 0.5) * 255).astype(np.uint8))


def strip(images: list[Image.Image], note: str) -> CardPart:
    """Return images in a row, all of one height."""
    height = min(FRAME_HEIGHT, max(image.height for image in images))
    return CardPart("strip", image_uri(montage([images], height, (128, 128, 128), gap=4), STRIP_WIDTH), note)


def _size(pair: Pair) -> str:
    return f"{pair.valid.shape[1]} × {pair.valid.shape[0]}"
