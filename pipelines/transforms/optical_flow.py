"""Optical flow: two frames and the motion of each pixel of the first; file formats and views."""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from perceiver.config import Config, Factors, Size
from pipelines.transforms import BadSample
from pipelines.transforms.decode import Picture, decode_image, to_image, to_picture
from pipelines.transforms.resize import Pixels

FLO_MAGIC = b"PIEH"
"""The start of a .flo file: 202021.25 as little-endian float32."""
UNKNOWN = 1e9
"""Middlebury's convention: a longer flow is unknown."""

Flow = NDArray[np.float32]
Valid = NDArray[np.bool_]


class FlowViewConfig(Config):
    """Random changes to training pairs: both frames alike, the flow with them. The crop is `data.image_size`.

    Evaluations have the centre crop of that size, or of `eval_size`; what exceeds the frames has no known flow.
    """

    flip: bool = Field(default=False, description="mirror left and right with probability 0.5")
    scale: Factors = Field(default=(1.0, 1.0), description="range of the zoom factor, uniform")
    eval_size: tuple[Size, Size] | None = Field(
        default=None,
        description="height and width of the frames in evaluations if they are not image_size, such as [436, 1024] of "
        "Sintel; the model answers larger frames in tiles",
    )


@dataclass(frozen=True)
class Pair:
    """Two frames (H, W, C), the flow (2, H, W) between them in pixels, x first, and where it is known (H, W)."""

    first: Picture
    second: Picture
    flow: Flow
    valid: Valid


def pack(files: Sequence[bytes], kind: str) -> bytes:
    """Return first frame, second frame and flow unchanged in one uncompressed archive.

    `kind` is the format of the flow, `flo` or `png`.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in zip(("first", "second", f"flow.{kind}"), files, strict=True):
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def decode_flow(stored: bytes, channels: int, max_pixels: int) -> Pair:
    """Decode the archive of `pack`.

    Raises:
        BadSample: a frame or the flow is damaged or too large, or their sizes differ.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(stored)) as archive:
            entries = archive.infolist()
            if (
                [entry.filename for entry in entries[:2]] != ["first", "second"]
                or len(entries) != 3
                or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            ):
                raise BadSample("not two frames and a flow")
            first, second, flow = (archive.read(entry) for entry in entries)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise BadSample(f"not two frames and a flow: {error}") from error
    frames = [decode_image(part, channels, max_pixels) for part in (first, second)]
    field, valid = read_flo(flow, max_pixels) if entries[2].filename == "flow.flo" else read_kitti(flow, max_pixels)
    shapes = [frames[0].shape[:2], frames[1].shape[:2], field.shape[1:]]
    if len(set(shapes)) > 1:
        sizes = [f"{width}x{height}" for height, width in shapes]
        raise BadSample(f"frames and flow of different sizes: {', '.join(sizes)}")
    return Pair(frames[0], frames[1], field, valid)


def read_flo(encoded: bytes, max_pixels: int) -> tuple[Flow, Valid]:
    """Read flow (2, H, W) and validity (H, W) from a Middlebury .flo file.

    Raises:
        BadSample: another file, truncated, or too large by its header.
    """
    if len(encoded) < 12 or encoded[:4] != FLO_MAGIC:
        raise BadSample("not a .flo file")
    width, height = np.frombuffer(encoded, "<i4", 2, 4).tolist()
    if width < 1 or height < 1 or width * height > max_pixels:
        raise BadSample(f"a flow of {width}x{height}: wanted up to {max_pixels} pixels")
    if len(encoded) < 12 + 8 * width * height:
        raise BadSample("truncated .flo file")
    values = np.frombuffer(encoded, "<f4", 2 * width * height, 12).reshape(height, width, 2).transpose(2, 0, 1)
    valid: Valid = np.all(np.isfinite(values) & (np.abs(values) < UNKNOWN), axis=0, keepdims=False)
    return np.where(valid, values, 0).astype(np.float32), valid


def read_kitti(encoded: bytes, max_pixels: int) -> tuple[Flow, Valid]:
    """Read flow (2, H, W) and validity (H, W) from KITTI's 16-bit PNG: 2**15 + 64 times x and y, and whether known.

    Raises:
        BadSample: another file, truncated, of other channels, or too large by its header.
    """
    if encoded[:8] != b"\x89PNG\r\n\x1a\n" or len(encoded) < 33:
        raise BadSample("the flow is not a PNG file")
    width, height = np.frombuffer(encoded, ">u4", 2, 16).tolist()
    if width * height > max_pixels:
        raise BadSample(f"a flow of {width}x{height}: wanted up to {max_pixels} pixels")
    if encoded[24:26] != b"\x10\x02":
        raise BadSample("the flow is not a 16-bit RGB image")
    values = _decode_rgb48(encoded).astype(np.float32)
    valid = values[..., 2] > 0
    flow = (values[..., :2].transpose(2, 0, 1) - 2**15) / 64
    return np.where(valid, flow, 0).astype(np.float32), valid


def _decode_rgb48(encoded: bytes) -> NDArray[np.uint16]:
    """Decode 16-bit RGB (H, W, 3), which Pillow would reduce to 8 bits."""
    import av
    from av.error import FFmpegError

    try:
        frames = av.VideoCodecContext.create("png", "r").decode(av.Packet(encoded))
        return np.asarray(frames[0].to_ndarray(format="rgb48le"), np.uint16)
    except (FFmpegError, IndexError) as error:
        raise BadSample("the PNG file of the flow is damaged") from error


def training_view(
    pair: Pair, size: tuple[int, int], config: FlowViewConfig, rng: Generator
) -> tuple[Pixels, Flow, Valid]:
    """Return a random crop, zoomed and mirrored: frames (2, C, H, W), flow (2, H, W), valid (H, W)."""
    factor = rng.uniform(*config.scale)
    if factor != 1:
        pair = _zoomed(pair, factor)
    height, width = pair.valid.shape
    top, left = int(rng.integers(max(0, height - size[0]) + 1)), int(rng.integers(max(0, width - size[1]) + 1))
    frames, flow, valid = _cut(pair, size, top, left)
    if config.flip and rng.random() < 0.5:
        flow = flow[..., ::-1] * np.array([-1, 1], np.float32)[:, None, None]
        return frames[..., ::-1].copy(), flow, valid[..., ::-1].copy()
    return frames, flow, valid


def evaluation_view(pair: Pair, size: tuple[int, int]) -> tuple[Pixels, Flow, Valid]:
    """Return the centre crop of (height, width)."""
    height, width = pair.valid.shape
    return _cut(pair, size, max(0, height - size[0]) // 2, max(0, width - size[1]) // 2)


def _cut(pair: Pair, size: tuple[int, int], top: int, left: int) -> tuple[Pixels, Flow, Valid]:
    """Cut a window; where it exceeds the frames, they are black and the flow is unknown."""
    part = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    frames = np.stack([frame.transpose(2, 0, 1)[part] for frame in (pair.first, pair.second)])
    missing = [(0, wanted - got) for wanted, got in zip(size, frames.shape[-2:], strict=True)]
    return (
        np.pad(frames, [(0, 0), (0, 0), *missing]),
        np.pad(pair.flow[part], [(0, 0), *missing]),
        np.pad(pair.valid[part], missing),
    )


def _zoomed(pair: Pair, factor: float) -> Pair:
    """Resize a pair; a flow with gaps is taken from the nearest pixel, so that gaps do not leak into it."""
    before = pair.valid.shape
    height, width = (max(1, round(length * factor)) for length in before)
    rows, columns = ((np.arange(new) + 0.5) * old // new for new, old in zip((height, width), before, strict=True))
    nearest = np.ix_(rows.astype(int), columns.astype(int))
    ratio = np.array([width / before[1], height / before[0]], np.float32)
    if pair.valid.all():
        bilinear = Image.Resampling.BILINEAR
        parts = [np.asarray(Image.fromarray(part).resize((width, height), bilinear)) for part in pair.flow]
    else:
        parts = [part[nearest] for part in pair.flow]
    first, second = (
        to_picture(to_image(frame).resize((width, height), Image.Resampling.BICUBIC))
        for frame in (pair.first, pair.second)
    )
    return Pair(first, second, np.stack(parts) * ratio[:, None, None], pair.valid[nearest])
