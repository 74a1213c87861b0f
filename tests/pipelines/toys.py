"""Small data sets for the tests of the data pipeline: generated quickly, without downloads."""

import gzip
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from perceiver.storage import open_folder
from pipelines.features import ImageFeature, LabelFeature
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, ShardInfo, Split, arrow_schema, load_manifest, save_manifest
from pipelines.sources.digits import MEMBER

CLASSES = 4


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Encode pixels (H, W) or (H, W, 3)."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def numbered_image(number: int, side: int = 8) -> np.ndarray:
    """Return a picture whose first two pixels are the bytes of its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side), dtype=np.uint8)
    pixels[0, :2] = number % 256, number // 256
    return pixels


def write_images(
    folder: Path,
    splits: dict[str, list[int]],
    *,
    rows_per_group: int = 5,
    bad: tuple[int, ...] = (),
    side: int = 8,
    apart: bool = False,
    start: int = 0,
) -> Manifest:
    """Write a prepared data set of numbered images; `splits` gives the rows of each shard, `bad` the ids to damage.

    With `apart`, the numbers of a split continue those of the one before; otherwise each split counts from `start`.
    """
    features = {"image": ImageFeature(channels=1, size=(side, side)), "label": LabelFeature()}
    target = open_folder(str(folder))
    found = {}
    number = 0
    for split, sizes in splits.items():
        infos: list[ShardInfo] = []
        number = number if apart else start
        for shard, size in enumerate(sizes):
            with ShardWriter(target, f"{split}-{shard}.arrow", arrow_schema(features), rows_per_group) as writer:
                for _ in range(size):
                    image = png(numbered_image(number, side))
                    writer.write(
                        [
                            {
                                "key": f"{split}/{number}",
                                "label": number % CLASSES,
                                "image": image[:40] if number in bad else image,
                            }
                        ]
                    )
                    number += 1
                info = writer.close()
            assert info is not None
            infos.append(info)
        found[split] = Split(shards=tuple(infos))
    manifest = Manifest(
        name="toy", features=features, classes=tuple("abcd"), splits=found, licence="none", source="made up"
    )
    save_manifest(manifest, target)
    return manifest


def read_shard(path: Path) -> pa.Table:
    """Return a shard's rows as any Arrow reader reads them."""
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def flip(path: Path) -> None:
    """Change one byte of the first image of a shard."""
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PNG") + 20] ^= 255
    path.write_bytes(raw)


def write_parquet_shard(path: Path, table: pa.Table, rows_per_group: int) -> ShardInfo:
    """Write a shard of format version 1; return its entry in the manifest."""
    binary = {field.name: "none" if pa.types.is_binary(field.type) else "zstd" for field in table.schema}
    pq.write_table(
        table,
        path,
        row_group_size=rows_per_group,
        use_dictionary=False,
        compression=binary,
        write_statistics=False,
        write_page_checksum=True,
    )
    raw = path.read_bytes()
    return ShardInfo(
        name=path.name,
        rows=table.num_rows,
        rows_per_group=rows_per_group,
        bytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
    )


def to_format_1(folder: Path) -> Manifest:
    """Rewrite a prepared folder as it was before: Parquet files, no index in the manifest."""
    manifest = load_manifest(str(folder))
    splits = {}
    for name, split in manifest.splits.items():
        infos = []
        for shard in split.shards:
            path = folder / shard.name
            infos.append(write_parquet_shard(path.with_suffix(".parquet"), read_shard(path), shard.rows_per_group))
            path.unlink()
        splits[name] = Split(shards=tuple(infos))
    old = manifest.model_copy(update={"format_version": 1, "splits": splits})
    save_manifest(old, open_folder(str(folder)))
    return old


def digits_archive(path: Path, per_class: int = 20) -> np.ndarray:
    """Write a file laid out like the package of the digits; return its table (n, 785)."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, 256, (10 * per_class, 785))
    table[:, -1] = np.repeat(np.arange(10), per_class)
    text = "\n".join(",".join(map(str, row)) for row in table) + "\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, gzip.compress(text.encode()))
    return table
