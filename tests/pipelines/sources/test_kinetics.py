"""Kinetics' layout: lists and clips anywhere below a folder, missing and other files, and the recipe for it."""

from pathlib import Path

import pytest
import yaml

from cluster.recipe.config import build_recipe
from cluster.recipe.preflight import check_data, check_model
from perceiver.config import UserError
from pipelines.features import AudioFeature, LabelFeature, MediaFeature
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import load_manifest
from tests.pipelines.raw import write
from tests.pipelines.recordings import real_video
from tests.pipelines.sources.test_layouts import prepared

RECIPE = Path(__file__).parents[3] / "recipes" / "train" / "kinetics.yaml"
HEADER = "label,youtube_id,time_start,time_end,split"
IDS = ["---QUuC4vJs", "a_b_c_d_e_f", "0123456789A", "zzzzzzzzzzz"]


def lists(**rows: list[str]) -> dict[str, bytes]:
    """Return lists by split."""
    return {f"kinetics700_2020/{split}.csv": "\n".join([HEADER, *lines, ""]).encode() for split, lines in rows.items()}


LISTS = lists(
    train=[f"zumba,{IDS[0]},84,94,train", f'"abseiling, ""fast""",{IDS[1]},0,10,train', f"zumba,{IDS[2]},5,15,train"],
    validate=[f"zumba,{IDS[0]},184,194,validate"],
    test=[f"bowling,{IDS[3]},1,11,test"],
)
CLIPS = {
    f"train/zumba/{IDS[0]}_000084_000094.mp4": b"first",
    f"train/{IDS[1]}_000000_000010.MKV": b"second",
    f"val_256/{IDS[0]}_000184_000194.mp4": b"third",
    f"test/{IDS[3]}_000001_000011.webm": b"fourth",
}


def test_clips_are_found_by_video_and_time(tmp_path: Path) -> None:
    """Two clips of one video are in different splits; one has no file."""
    extra = {f"other/{IDS[3]}_000007_000017.mp4": b"x", "other/film.mp4": b"y", f"b/{IDS[3]}_000001_000011.mp4": b"z"}
    write(tmp_path / "src", LISTS | CLIPS | extra | {"notes.csv": b"a,b\n1,2\n"})
    found = prepared(tmp_path, "kinetics")
    assert found.manifest.classes == ('abseiling, "fast"', "bowling", "zumba")
    assert found.manifest.features == {"media": MediaFeature(), "label": LabelFeature()}
    assert found.samples == {"train": 2, "val": 1, "test": 1}
    assert found.rejected == {f"{IDS[2]}_000005_000015": "no media file"}
    rows = {key: (row["media"], row["label"]) for part in found.rows.values() for key, row in part.items()}
    assert rows == {
        f"{IDS[0]}_000084_000094": (b"first", 2),
        f"{IDS[1]}_000000_000010": (b"second", 0),
        f"{IDS[0]}_000184_000194": (b"third", 2),
        f"{IDS[3]}_000001_000011": (b"z", 1),
    }
    (left_out,) = [note for note in found.notes if note.startswith("left out")]
    for part in (
        "clips of no list: 1",
        "files not named after a clip: 1",
        "second files of a clip: 1",
        "tables not named",
    ):
        assert part in left_out


def test_sound_alone(tmp_path: Path) -> None:
    write(tmp_path / "src", LISTS | CLIPS)
    assert prepared(tmp_path, "kinetics", media="audio").manifest.features["audio"] == AudioFeature()


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (CLIPS, {}, "no list of the training clips"),
        (LISTS, {}, "no clips below"),
        (LISTS | CLIPS | {"train_more.csv": b"x"}, {}, "are both lists of train: remove one"),
        (
            CLIPS | {"train.csv": b"label,id\nzumba,x\n"},
            {},
            "has no column youtube_id, time_start, time_end",
        ),
        (
            CLIPS | {"train.csv": f"{HEADER}\nzumba,{IDS[0]},x,94,train\n".encode()},
            {},
            "line 2: wanted label",
        ),
        (CLIPS | {"train.csv": f"{HEADER}\n ,{IDS[0]},8,18,train\n".encode()}, {}, "line 2: wanted label"),
        (CLIPS | {"train.csv": f"{HEADER}\nzumba,{IDS[0]}\n".encode()}, {}, "line 2: wanted label"),
        (LISTS | CLIPS, {"media": "smell"}, "option media=smell"),
        (LISTS | CLIPS, {"held_out": "0.2"}, "unknown option 'held_out'"),
    ],
)
def test_unusable_data_are_refused(
    tmp_path: Path, files: dict[str, bytes], options: dict[str, str], message: str
) -> None:
    write(tmp_path / "src", files)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, "kinetics", **options)


@pytest.mark.parametrize("preset", ["", "_176x", "_352x"])
def test_the_recipe_fits_the_layout(tmp_path: Path, preset: str) -> None:
    """Real video with sound passes the checks of the full-scale recipe; its label's classes are those of the data."""
    labels = [f"class {number:03d},{IDS[0]},{number},{number + 10},train" for number in range(700)]
    write(
        tmp_path / "src",
        lists(train=labels, validate=[f"class 000,{IDS[1]},0,10,validate"])
        | {
            f"a/{IDS[0]}_000000_000010.mp4": real_video(),
            f"a/{IDS[1]}_000000_000010.mp4": real_video(),
        },
    )
    out = tmp_path / "out"
    prepare("kinetics", str(tmp_path / "src"), str(out), PrepareConfig(parallel="off", max_bad_fraction=1.0))
    values = yaml.safe_load(RECIPE.read_text())
    values["data"]["url"], values["model"] = str(out), {"preset": f"perceiver_io_kinetics{preset}"}
    recipe, manifest = build_recipe(values), load_manifest(str(out))
    check_data(recipe, manifest)
    check_model(recipe, manifest)
    assert recipe.data.video.seconds == recipe.data.audio.seconds == 0.64
