"""Raw data with the names and layouts that the documentation's commands assume, a few samples of each."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.prepare import PrepareConfig, prepare
from tests.pipelines.raw import flo, off, tar, write
from tests.pipelines.recordings import media_file, ramp, sound_file, tone
from tests.pipelines.toys import digits_archive, png

PHOTOS = [f"{index:02d}.jpg" for index in range(24)]
ROOT = Path(__file__).parents[1]


def photo(index: int, size: tuple[int, int] = (40, 48), kind: str = "JPEG") -> bytes:
    """Return a picture of noise, dark if its number is even."""
    noise = np.random.default_rng(index).integers(0, 100, (*size, 3)) + 120 * (index % 2)
    return png(noise.astype(np.uint8), kind)


def text_of(header: str, rows: list[list[object]]) -> bytes:
    """Return a CSV."""
    stream = io.StringIO()
    csv.writer(stream).writerows([header.split(","), *rows])
    return stream.getvalue().encode()


def photos(root: Path) -> None:
    """Write folders of classes."""
    write(root / "photos", {f"{['dark', 'light'][i % 2]}/{name}": photo(i) for i, name in enumerate(PHOTOS)})


def tables(root: Path) -> None:
    """Write CSVs with the pictures and sounds that they name."""
    write(root, {name: photo(index) for index, name in enumerate(PHOTOS)})
    numbered = list(enumerate(PHOTOS))
    write(
        root,
        {
            "houses.csv": text_of("photo,price,width", [[name, 100 + i, 5.5 + i % 7] for i, name in numbered]),
            "shoes.csv": text_of(
                "photo,colour,kind,price",
                [[name, ("red", "blue")[i % 2], ("boot", "sandal")[i // 2 % 2], 20 + i] for i, name in numbered],
            ),
            "plants.csv": text_of(
                "photo,species,plant",
                [[name, ("fern", "moss")[i % 2], f"plant {i // 4 % 4}{i % 2}"] for i, name in numbered],
            ),
            "patients.csv": text_of(
                "age,pressure,outcome", [[30 + i, 110 + 3 * (i % 5), ("well", "ill")[i % 2]] for i in range(30)]
            ),
            "songs/songs.csv": text_of(
                "path,tags,part",
                [[f"{i}.flac", "jazz;live" if i % 2 else "jazz", ("train", "test")[i % 3 == 0]] for i in range(9)],
            ),
        }
        | {f"songs/{i}.flac": sound_file(tone(200 + 50 * i, 0.5, 8000), 8000) for i in range(9)},
    )


def hubs(root: Path) -> None:
    """Write Parquet files as data hubs store them."""
    pictures = {"image": [{"bytes": photo(i), "path": None} for i in range(12)], "label": [i % 2 for i in range(12)]}
    sounds = {
        "audio": [{"bytes": sound_file(tone(200 + 50 * i, 0.5, 8000), 8000), "path": None} for i in range(12)],
        "intent": [("pay", "call")[i % 2] for i in range(12)],
        "speaker_id": [f"speaker {i // 2}" for i in range(12)],
    }
    for folder, columns in (("hub", pictures), ("pets", pictures), ("speech", sounds)):
        for split in ("train", "validation") if columns is pictures else ("train",):
            (root / folder / "data").mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), root / folder / f"data/{split}-00000-of-00001.parquet")


def image_sets(root: Path) -> None:
    """Write ImageNet's folders and WebDataset's tars."""
    synsets = ("n01440764", "n02119789")
    write(
        root / "ILSVRC",
        {
            f"{split}/{synsets[i % 2]}/{name}": photo(i)
            for split in ("train", "val")
            for i, name in enumerate(PHOTOS[:6])
        },
    )
    members = {
        f"{i:06d}{end}": value for i in range(8) for end, value in ((".jpg", photo(i)), (".cls", b"%d" % (i % 2)))
    }
    write(root / "tars", {"train-000000.tar": tar(dict(members)), "val-000000.tar": tar(dict(members))})


def media(root: Path) -> None:
    """Write sounds, videos, and the lists of AudioSet and Kinetics, with clips of two thirds of AudioSet's segments."""
    clip = media_file(list(range(0, 400, 40)), list(range(0, 250, 25)), sound=ramp(0.4, 16_000))
    for index in range(6):
        kind = ("cat", "dog")[index % 2]
        write(root / "recordings", {f"{kind}/{index}.wav": sound_file(tone(200 + index, 0.5, 8000), 8000, "WAV")})
        write(root / "videos", {f"{kind}/{index}.mkv": clip})
    names = [f"-{index:08d}_Y" for index in range(24)]
    rows = [f'{name}, {30 * i}.000, {30 * i + 10}.000, "/m/{i % 5:05x}"' for i, name in enumerate(names)]
    lists = {"balanced_train_segments.csv": rows[:16], "eval_segments.csv": rows[16:]}
    classes = text_of("index,mid,display_name", [[i, f"/m/{i:05x}", f"Sound {i}"] for i in range(527)])
    write(
        root / "AudioSet", {name: ("# YTID\n" * 3 + "\n".join(lines) + "\n").encode() for name, lines in lists.items()}
    )
    write(root / "AudioSet", {"class_labels_indices.csv": classes})
    write(root / "AudioSet/clips", {f"{name}.mkv": clip for i, name in enumerate(names) if i % 6})
    for split, part in (("train", names[:8]), ("validate", names[8:12])):
        rows = [[("zumba", "yoga")[i % 2], name, 0, 10, split] for i, name in enumerate(part)]
        write(root / "Kinetics", {f"{split}.csv": text_of("label,youtube_id,time_start,time_end,split", rows)})
        write(root / "Kinetics", {f"{split}/{name}_000000_000010.mkv": clip for name in part})


def clouds(root: Path) -> None:
    """Write meshes in folders of classes, and ModelNet's layout."""
    for kind in ("chair", "desk"):
        write(root / "scans", {f"{kind}/{kind}_{i}.off": off() for i in range(5)})
        write(
            root / "ModelNet40",
            {f"{kind}/{split}/{kind}_{i}.off": off() for split in ("train", "test") for i in range(2)},
        )


def texts(root: Path) -> None:
    """Write documents that blank lines separate, a table of pairs, and a task of GLUE."""
    pages = "\n\n".join(f"Document {i} of the corpus has a few words. " * (1 + i % 5) for i in range(60))
    write(root / "corpus", {"a.txt": pages.encode()})
    pairs = [[f"What is {i} + {i}?", f"It is {2 * i + i % 2}.", ("right", "wrong")[i % 2]] for i in range(30)]
    rows = "".join(f"{i}\tAnn ran {i} miles.\tAnn moved.\tentailment\n" for i in range(20))
    glue = {f"RTE/{name}.tsv": f"index\tsentence1\tsentence2\tlabel\n{rows}".encode() for name in ("train", "dev")}
    write(root, {"answers.csv": text_of("question,answer,verdict", [*pairs])})
    write(root / "GLUE", glue)


def flows(root: Path) -> None:
    """Write AutoFlow, FlyingChairs, and two scenes of MPI Sintel."""
    field = flo(np.ones((40, 48, 2), np.float32))
    for table in range(5):
        pair = {f"im{k}.png": photo(2 * table + k, kind="PNG") for k in (0, 1)}
        write(root / f"AutoFlow/static_40k_png_1_of_4/table_{table}_batch_0", pair | {"forward.flo": field})
    for index in range(1, 6):
        pair = {f"{index:05d}_img{k}.ppm": photo(2 * index + k, kind="PPM") for k in (1, 2)}
        write(root / "FlyingChairs_release/data", pair | {f"{index:05d}_flow.flo": field})
    write(root / "FlyingChairs_release", {"FlyingChairs_train_val.txt": b"1\n1\n1\n2\n1\n"})
    for scene in ("alley", "market"):
        frames = {
            f"{kind}/{scene}/frame_{i:04d}.png": photo(i, kind="PNG") for kind in ("clean", "final") for i in (1, 2, 3)
        }
        write(root / "Sintel/training", frames | {f"flow/{scene}/frame_{i:04d}.flo": field for i in (1, 2)})


RAW: tuple[Callable[[Path], None], ...] = (photos, tables, hubs, image_sets, media, clouds, texts, flows)


def write_all(root: Path) -> None:
    """Write all raw data below a folder, with the project's recipes."""
    for kind in RAW:
        kind(root)
    (root / "recipes").symlink_to(ROOT / "recipes")


def write_digits(root: Path) -> None:
    """Prepare a small data set of the digits' layout."""
    digits_archive(root / "digits.zip", per_class=20)
    prepare("digits", str(root / "digits.zip"), str(root / "data/digits"), PrepareConfig(parallel="off"))
