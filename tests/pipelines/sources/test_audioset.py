"""AudioSet's layout, from lists and media files to batches, and the recipes for it checked against it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.preflight import check_data
from perceiver.config import UserError
from pipelines.feed.ingest import DataConfig, EvalShare, eval_batches
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import load_manifest
from pipelines.transforms.audio import AudioViewConfig
from pipelines.transforms.clip import ClipConfig
from pipelines.transforms.video import VideoViewConfig
from tests.pipelines.recordings import real_video, sound_file, tone

CLASSES = 527
RECIPES = Path(__file__).parents[3] / "recipes" / "train"


def video_id(number: int) -> str:
    """Return eleven characters, some of them special ones."""
    return f"-{number:08d}_Y"


def write_lists(folder: Path, train: int, test: int) -> None:
    """Write lists and classes as Google publishes them: comments, spaces after commas, quoted labels."""
    mids = [f"/m/{number:05x}" for number in range(CLASSES)]
    with (folder / "class_labels_indices.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["index", "mid", "display_name"])
        writer.writerows([number, mid, f"Sound, no. {number}"] for number, mid in enumerate(mids))
    lines = [
        "# Segments csv created Sun Mar  5 10:54:31 2017",
        "# num_ytids=1",
        "# YTID, start_seconds, end_seconds, positive_labels",
    ]
    for name, numbers in (("balanced_train", range(train)), ("eval", range(100, 100 + test))):
        rows = [f'{video_id(n)}, {30 * n}.000, {30 * n + 10}.000, "{mids[n]},{mids[5 * n % CLASSES]}"' for n in numbers]
        (folder / f"{name}_segments.csv").write_text("\n".join(lines + rows) + "\n")


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Write seven clips to train on, two without a file, and four to test on: FLAC files named as downloaders do."""
    write_lists(tmp_path, 7, 4)
    for number in [0, 1, 2, 3, 4, 100, 101, 102, 103]:
        name = [
            f"{video_id(number)}.flac",
            f"Y{video_id(number)}.flac",
            f"{video_id(number)}_{30000 * number}.flac",
            f"{video_id(number)}_{30 * number}.000_{30 * number + 10}.000.flac",
        ][number % 4]
        (tmp_path / "clips").mkdir(exist_ok=True)
        (tmp_path / "clips" / name).write_bytes(sound_file(tone(200 + number, 2, 16_000), 16_000))
    (tmp_path / "clips" / f"{video_id(2)}_7000.flac").write_bytes(b"another clip of the same video")
    return tmp_path


def test_sound_clips_with_missing_files(sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 of 11 .*no media file"):
        prepare("audioset", str(sounds), str(tmp_path / "refused"), PrepareConfig(options={"media": "audio"}))
    config = PrepareConfig(options={"media": "audio"}, max_bad_fraction=0.2)
    manifest = prepare("audioset", str(sounds), str(tmp_path / "out"), config)
    assert len(manifest.classes) == CLASSES and manifest.classes[3] == "Sound, no. 3" and manifest.rejected == 2
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 5, "test": 4}
    data = DataConfig(
        url=str(tmp_path / "out"),
        executor="inline",
        clip=ClipConfig(eval_clips=3),
        audio=AudioViewConfig(rate=16_000, samples=16_000),
    )
    batch = next(eval_batches(data, manifest, EvalShare("train", 5), "cpu"))
    assert batch["valid"].all() and batch["audio"].shape == (5, 3, 16_000)
    for labels, sound in zip(batch["label"], batch["audio"], strict=True):
        number = min(int(n) for n in labels.nonzero())
        pitch = np.abs(np.fft.rfft(sound[1].numpy() * np.hanning(16_000))).argmax()
        found = {n for n in range(6) if {n, 5 * n} == {int(k) for k in labels.nonzero()}}
        assert len(found) == 1 and pitch == 200 + found.pop() and number < 6


def test_names_of_classes_come_from_the_ontology_too(sounds: Path, tmp_path: Path) -> None:
    (sounds / "class_labels_indices.csv").unlink()
    with pytest.raises(UserError, match=r"class_labels_indices\.csv.*ontology\.json"):
        prepare("audioset", str(sounds), str(tmp_path / "out"), PrepareConfig(options={"media": "audio"}))
    entries = [{"id": f"/m/{number:05x}", "name": f"Name {number}", "restrictions": []} for number in range(110)]
    entries.insert(0, {"id": "/m/0dgw9r", "name": "Human sounds", "restrictions": ["abstract"]})
    (sounds / "ontology.json").write_text(json.dumps(entries))
    config = PrepareConfig(options={"media": "audio", "train": "balanced"}, max_bad_fraction=0.3)
    assert prepare("audioset", str(sounds), str(tmp_path / "out"), config).classes[:2] == ("Name 0", "Name 1")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"media": "smell"}, "option media=smell: wanted one of audio, video, both"),
        ({"media": "video"}, "no media files"),
        ({"train": "some"}, "option train=some"),
    ],
)
def test_unusable_data_are_refused(sounds: Path, tmp_path: Path, options: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        prepare("audioset", str(sounds), str(tmp_path / "out"), PrepareConfig(options=options))


def audioset_recipe(name: str, url: str) -> Recipe:
    """Return a recipe of the repository with other data."""
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    values["data"]["url"] = url
    return build_recipe(values)


def test_the_recipes_fit_the_layout(tmp_path: Path) -> None:
    """Real video with sound in AudioSet's layout passes the checks of the full-scale recipes and gives batches."""
    write_lists(tmp_path, 2, 2)
    for number in (0, 1, 100, 101):
        (tmp_path / f"{video_id(number)}.mp4").write_bytes(real_video())
    prepare("audioset", str(tmp_path), str(tmp_path / "out"))
    manifest = load_manifest(str(tmp_path / "out"))
    for name in ("audioset_av", "audioset_mel"):
        recipe = audioset_recipe(name, str(tmp_path / "out"))
        check_data(recipe, manifest)
        assert recipe.data.clip.eval_clips == 16 and recipe.data.video.seconds == recipe.data.audio.seconds == 1.28
    small = DataConfig(
        url=str(tmp_path / "out"),
        executor="inline",
        clip=ClipConfig(eval_clips=2),
        video=VideoViewConfig(size=(16, 16)),
    )
    batch = next(eval_batches(small, manifest, EvalShare("test", 2), "cpu"))
    assert batch["video"].shape == (2, 2, 32, 3, 16, 16) and batch["audio"].shape == (2, 2, 61_440)
    assert batch["label"].sum().item() == 4
    recipe = audioset_recipe("audioset_av", str(tmp_path / "out"))
    wrong = recipe.model_copy(update={"data": recipe.data.model_copy(update={"audio": AudioViewConfig(samples=100)})})
    with pytest.raises(UserError, match=r"modalities\.audio\.samples = 61440.*data\.audio\.samples = 100"):
        check_data(wrong, manifest)
