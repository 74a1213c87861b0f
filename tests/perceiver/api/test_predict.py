"""`perceiver.predict` and `load_model(run).predict` for data that are not prepared; the model runs in this process."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import perceiver
from cluster.predict.unprepared import Places, open_places
from perceiver.cli import cli
from perceiver.export.weights import open_weights
from pipelines.prepare import prepare
from tests.cluster.predict.test_scoring import write_run
from tests.cluster.recipes import CLASSES, prepare_images, small_tree

TEXTS = ["Guten Morgen, wie geht es dir?", "the cat sat on the mat"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with raw images in `raw` and the prepared ones in `shards`."""
    folder = tmp_path_factory.mktemp("photos")
    prepare_images(folder, 4)
    return folder


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> str:
    tree = small_tree(tmp_path, str(photos / "shards"))
    return str(write_run(tmp_path / "runs" / "small-001", tree, 2))


@pytest.fixture
def text_run(tmp_path: Path) -> str:
    """Return a run on texts, of the task of its recipe."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("\n\n".join(f"{text} {number}" for number in range(9) for text in TEXTS))
    prepare("text", str(tmp_path / "raw"), str(tmp_path / "texts"))
    tree = small_tree(tmp_path, str(tmp_path / "texts"))
    tree["data"]["text_length"] = 64
    tree["model"] = {
        "kind": "perceiver_io",
        "inputs": {"kind": "text", "length": 64, "channels": 16},
        "decoder": {"kind": "tokens"},
        "latents": 4,
        "latent_channels": 16,
    }
    tree["task"] = {"kind": "masked_language"}
    return str(write_run(tmp_path / "runs" / "text-001", tree, 0))


def by_key(found: perceiver.Predictions) -> dict[str, list[float]]:
    return {row["key"]: row["probability"] for row in found}


def call(*words: Any) -> Any:
    result = CliRunner().invoke(cli, ["predict", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_files_are_predicted_like_prepared_data(run: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = perceiver.predict(run, photos / "shards", split="test", **{"data.executor": "inline"})
    wanted = by_key(prepared)
    monkeypatch.chdir(photos / "raw" / "test")
    names = sorted(map(str, Path().rglob("*.png")))
    assert {f"test/{name}" for name in names} == set(wanted)
    model = perceiver.load_model(run)
    for places in (".", "*/*.png", names, [Path(name) for name in reversed(names)]):
        found = perceiver.predict(run, places) if places == "." else model.predict(places)
        got = by_key(found)
        assert sorted(got) == names and not found.rejected
        for name in names:
            np.testing.assert_allclose(got[name], wanted[f"test/{name}"], rtol=1e-5)
    in_order = model.predict(list(reversed(names)))
    assert in_order.table["key"].to_pylist() == list(reversed(names))
    assert [row["label"] for row in in_order] == [CLASSES.index(name.split("/")[0]) for name in reversed(names)]
    one = model.predict(names[0])
    assert one.table["key"].to_pylist() == [names[0]] and "predict" not in str(model.state_dict().keys())


def test_what_cannot_be_used_is_named_and_counted(run: str, photos: Path, tmp_path: Path) -> None:
    good, broken, gone = photos / "raw" / "test" / "dark" / "0.png", tmp_path / "broken.png", tmp_path / "dead.png"
    broken.write_bytes(good.read_bytes()[:60])
    gone.symlink_to(tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    for number, path in enumerate((good, broken)):
        (tmp_path / "mine" / f"{number}.png").symlink_to(path)
    (tmp_path / "mine" / "2.png").symlink_to(tmp_path / "nowhere")
    found = perceiver.predict(run, tmp_path / "mine", to=tmp_path / "out")
    assert found.table["key"].to_pylist() == ["0.png"] and "label" not in found.table.column_names
    reasons = {each["key"]: each["reason"] for each in found.rejected}
    assert reasons.keys() == {"1.png", "2.png"} and reasons["2.png"] == "a dead link" and reasons["1.png"]
    again = call(run, tmp_path / "mine", "--to", tmp_path / "out")
    assert "0 samples written, 3 in" in again.output and "2 could not be used" in again.output
    broken.write_bytes(good.read_bytes())
    with pytest.raises(perceiver.UserError, match="was written with content"):
        perceiver.predict(run, tmp_path / "mine", to=tmp_path / "out")


def test_tables_give_their_rows(run: str, photos: Path, tmp_path: Path) -> None:
    names = [f"{name}/{number}.png" for name in CLASSES for number in (0, 1)]
    wanted = by_key(perceiver.predict(run, [photos / "raw" / "test" / name for name in names]))
    table = photos / "raw" / "test" / "mine.csv"
    table.write_text("path,label\n" + "".join(f"{name},{name.split('/')[0]}\n" for name in [*names, "no/such.png"]))
    found = perceiver.predict(run, table, options={"image": "path"})
    assert found.table["key"].to_pylist() == [f"mine.csv#{number}" for number in range(1, 5)]
    assert found.rejected == ({"key": "mine.csv#5", "reason": "unreadable file: FileNotFoundError"},)
    np.testing.assert_allclose([row["probability"] for row in found], list(wanted.values()), rtol=1e-5)
    with pytest.raises(perceiver.UserError, match="image=COLUMN"):
        perceiver.predict(run, table)
    images = [(photos / "raw" / "test" / name).read_bytes() for name in names]
    cells = [images[0], images[1], None, images[3]]
    pq.write_table(pa.table({"image": cells, "label": [0, 0, 1, 1]}), tmp_path / "hub.parquet", row_group_size=3)
    hub = perceiver.predict(run, tmp_path / "hub.parquet")
    assert hub.table["key"].to_pylist() == [f"hub.parquet#{number}" for number in (1, 2, 4)]
    assert hub.table["label"].to_pylist() == [0, 0, 1] and hub.rejected[0]["reason"] == "no image"
    (photos / "raw" / "test" / "mine.csv").unlink()


def test_unprepared_data_are_read_on_this_machine(run: str, photos: Path) -> None:
    saved = open_weights(run)
    recipe = {**saved.recipe, "cluster": {**saved.recipe["cluster"], "address": "10.0.0.1:6379"}}
    places = Places([str(photos / "raw" / "test")])
    with open_places(replace(saved, recipe=recipe), places, workers=1) as (scoring, _):
        assert scoring.recipe.data.executor != "inline" and scoring.recipe.cluster.address is None


def test_the_command_prints_or_writes(run: str, photos: Path, tmp_path: Path) -> None:
    files = [photos / "raw" / "test" / name / "0.png" for name in CLASSES]
    lines = call(run, *files, "data.eval_crop=0.9").stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(map(str, files)) and lines[0].endswith("%")
    told = json.loads(call(run, *files, "--json").stdout)
    assert [row["key"] for row in told["predictions"]] == list(map(str, files)) and told["rejected"] == []
    told = json.loads(call(run, photos / "raw" / "test", "--to", tmp_path / "out", "--json").stdout)
    assert told == {"to": str(tmp_path / "out"), "samples": 4, "written": 4, "rejected": 0}


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["no-such-file.png"], "no-such-file.png does not exist"),
        (["*.nothing"], "no file has such a name"),
        (["empty"], "empty has no files that end in .jpg"),
        (["broken.csv"], "broken.csv has no rows"),
        (["broken.parquet"], "cannot be read as Parquet"),
        ([], "no data were given"),
        (["fifo.png"], "none of 1 samples could be read: 1 x not a regular file"),
    ],
)
def test_places_without_samples_are_refused(
    places: list[str], message: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.csv").write_text("image\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1nothing")
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(perceiver.UserError, match=message):
        perceiver.predict(run, places)


def test_masks_are_filled(text_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masked = ["The [MASK] sat.", "no mask", "a [MASK][MASK][MASK] b [MASK]", "[MASK]" + "long" * 20]
    found = perceiver.predict(text_run, texts=masked)
    assert found.table.column_names == ["sample_id", "key", "text", "words", "probability"]
    first, second, third = found
    assert first["text"] == f"The {first['words'][0]} sat." and 0 < first["probability"][0] <= 1
    assert (second["text"], second["words"]) == ("no mask", [])
    assert len(third["words"]) == 2 and third["text"] == "a {} b {}".format(*third["words"])
    assert found.rejected == ({"key": "text#4", "reason": "83 tokens with its masks, the model has 64"},)
    (tmp_path / "lines.txt").write_text("\n".join(masked[:2]))
    assert [row["text"] for row in perceiver.load_model(text_run).predict(tmp_path / "lines.txt")] == [
        first["text"],
        "no mask",
    ]
    assert call(text_run, "--text", masked[1]).stdout == "text#1  no mask\n"
    prepared = perceiver.predict(text_run, tmp_path / "texts", split="train", **{"data.executor": "inline"})
    assert {"prediction", "probability"} <= set(prepared.table.column_names), "tokens of prepared texts"
