"""ImageNet: class folders and the original tars give the same samples and labels."""

from pathlib import Path

import numpy as np
import pytest

from perceiver.config import UserError
from pipelines.prepare import PrepareConfig, prepare
from pipelines.sources.imagenet import ImageNet
from tests.pipelines.raw import tar, write
from tests.pipelines.test_prepare import rows_of
from tests.pipelines.toys import png

SYNSETS = ("n02119789", "n01440764", "n09835506")
OFF = PrepareConfig(parallel="off", shard_rows=4)
WORDS = b"n01440764 tench, Tinca tinca\nn02119789 kit fox, Vulpes macrotis\nn09835506 ballplayer, baseball player\n"
TRAIN = {
    synset: {f"{synset}_{i}.JPEG": png(np.full((5, 6, 3), 10 * number + i, np.uint8), "JPEG") for i in range(3)}
    for number, synset in enumerate(SYNSETS)
}
VAL = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": png(np.full((5, 6, 3), 100 + i, np.uint8), "JPEG") for i in range(4)}
LABELS = [SYNSETS[i] for i in (2, 0, 1, 0)]
SOLUTION = "ImageId,PredictionString\n" + "\n".join(
    f"ILSVRC2012_val_{i:08d},{LABELS[i - 1]} 1 2 3 4 " for i in (3, 1, 4, 2)
)

FOLDERS = {f"train/{synset}/{name}": image for synset, images in TRAIN.items() for name, image in images.items()}
LAYOUTS = {
    "folders": FOLDERS
    | {f"val/{label}/{name}": image for label, (name, image) in zip(LABELS, VAL.items(), strict=True)},
    "kaggle": {f"ILSVRC/Data/CLS-LOC/{name}": image for name, image in FOLDERS.items()}
    | {f"ILSVRC/Data/CLS-LOC/val/{name}": image for name, image in VAL.items()}
    | {"LOC_val_solution.csv": SOLUTION.encode(), "LOC_synset_mapping.txt": WORDS},
    "tars": {
        "ILSVRC2012_img_train.tar": tar({f"{synset}.tar": tar(dict(images)) for synset, images in TRAIN.items()}),
        "ILSVRC2012_img_val.tar": tar(dict(VAL)),
        "synset_words.txt": WORDS,
        "imagenet_2012_validation_synset_labels.txt": "\n".join(LABELS).encode(),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(tmp_path: Path, layout: str) -> None:
    src = write(tmp_path / "src", LAYOUTS[layout])
    manifest = prepare("imagenet", str(src), str(tmp_path / "out"), OFF)
    assert [name.split()[0] for name in manifest.classes] == sorted(SYNSETS)
    if layout != "folders":
        assert manifest.classes[0] == "n01440764 tench"
    rows = {split: rows_of(tmp_path / "out", manifest, split) for split in manifest.splits}
    assert {row["key"]: row["image"] for row in rows["train"]} == {
        f"train/{synset}/{name}": image for synset, images in TRAIN.items() for name, image in images.items()
    }
    assert all(manifest.classes[row["label"]].split()[0] in row["key"] for row in rows["train"])
    assert {row["image"]: manifest.classes[row["label"]].split()[0] for row in rows["val"]} == dict(
        zip(VAL.values(), LABELS, strict=True)
    )
    assert [shard.rows for shard in manifest.splits["train"].shards] == [4, 4, 1]
    assert len({row["label"] for row in rows["train"][:4]}) > 1, "a tar in the order of its classes is shuffled"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"imagenet_2012_validation_synset_labels.txt": b"n01440764\n"},
            "1 lines .*4 images",
        ),
        ({"imagenet_2012_validation_synset_labels.txt": b"490\n361\n171\n2\n"}, "such as n01440764"),
        ({"imagenet_2012_validation_synset_labels.txt": None}, "validation images without labels: add LOC_val"),
        ({"ILSVRC2012_img_val.tar": b"x" * 2000}, "truncated"),
        ({"ILSVRC2012_img_train.tar": tar({"n01440764.tar": b"y" * 700})}, "n01440764.tar in .*truncated"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, change: dict[str, bytes | None], message: str) -> None:
    files = {name: content for name, content in (LAYOUTS["tars"] | change).items() if content is not None}
    with pytest.raises(UserError, match=message):
        prepare("imagenet", str(write(tmp_path / "src", files)), str(tmp_path / "out"), OFF)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ImageNet"):
        prepare("imagenet", str(write(tmp_path / "src", {"cat/a.jpg": b""})), str(tmp_path / "out"), OFF)
    with pytest.raises(UserError, match="imagenet .*train/"):
        ImageNet().listing(None, seed=0, shard_rows=1, options={})


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    src = write(tmp_path / "src", LAYOUTS["folders"])
    [unit, *_] = list(ImageNet().listing(str(src), seed=0, shard_rows=50, options={}).units)
    (src / unit.content["items"][0][1]).unlink()
    first, *others = list(ImageNet().samples(unit))
    assert first.reason == "unreadable file: FileNotFoundError" and len(others) == 8  # type: ignore[union-attr]
