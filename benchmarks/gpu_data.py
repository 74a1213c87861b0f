"""Photographs and videos for the benchmarks of runs on a GPU: made in seconds, without a download.

The two photographs of scikit-learn, a random crop for each sample, with noise of its own so that none compresses like
another. They are made by several processes and prepared as `perceiver prepare` does.
"""

import concurrent.futures
import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10
SIZE = (500, 375)
QUALITY = 92
NOISE = 10.0
"""Standard deviation of the noise, in levels of 256: with `QUALITY` it makes files of about 100 KB, as ImageNet's."""
FRAME_SIZE, FRAMES, RATE = (320, 240), 50, 25
PAN = 3
"""Pixels that a video's view moves per frame."""


@cache
def photographs() -> list[Image.Image]:
    """Return the two photographs, 640 x 427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def jpeg(number: int) -> bytes:
    """Return a crop as JPEG, always the same for a number."""
    rng, image = np.random.default_rng(number), photographs()[number % 2]
    width = rng.uniform(0.6, 0.85) * image.width
    height = width * SIZE[1] / SIZE[0]
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    crop = image.resize(SIZE, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    pixels = np.asarray(crop) + rng.normal(0, NOISE, (*SIZE[::-1], 3)).astype(np.float32)
    sink = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(sink, "JPEG", quality=QUALITY)
    return sink.getvalue()


def video(number: int) -> bytes:
    """Return two seconds of a view that moves over a photograph, H.264 in Matroska, always the same for a number."""
    import av

    rng, image = np.random.default_rng(number), photographs()[number % 2]
    (width, height), top = FRAME_SIZE, int(rng.integers(image.height - FRAME_SIZE[1]))
    left = int(rng.integers(image.width - width - PAN * FRAMES))
    sink = io.BytesIO()
    with av.open(sink, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in range(FRAMES):
            at = left + PAN * frame
            container.mux(stream.encode(av.VideoFrame.from_image(image.crop((at, top, at + width, top + height)))))
        container.mux(stream.encode(None))
    return sink.getvalue()


def _write(make: Callable[[int], bytes], path: Path, number: int) -> int:
    content = make(number)
    path.write_bytes(content)
    return len(content)


def _paths(folder: Path, count: int, suffix: str) -> Iterator[Path]:
    for label in range(CLASSES):
        (folder / f"class-{label}").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        yield folder / f"class-{number % CLASSES}" / f"{number:06d}{suffix}"


def write_files(make: Callable[[int], bytes], folder: Path, count: int, suffix: str) -> float:
    """Write that many files in a folder per class, with a process for each core; return their mean size in bytes."""
    paths = list(_paths(folder, count, suffix))
    processes = max(1, min(len(os.sched_getaffinity(0)), count // 20))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
        sizes = list(pool.map(_write, [make] * count, paths, range(count), chunksize=10))
    return sum(sizes) / count


def prepare(source: str, raw: Path, target: Path, count: int) -> None:
    """Prepare a folder of that many files; a tenth, at least one per class, is held out as split `test`."""
    import perceiver

    perceiver.prepare(source, raw, target, progress=False, held_out=max(0.1, CLASSES / count))
