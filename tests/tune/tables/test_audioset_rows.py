"""The full-scale rows of AudioSet's table fit data in AudioSet's layouts, with the published sizes."""

from typing import Any

import pytest
import yaml

from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.preflight import check_recipe
from perceiver.config import UserError
from pipelines.prepare import PrepareConfig, prepare
from tests.pipelines.recordings import real_video, sound_file, tone
from tests.pipelines.sources.test_audioset import RECIPES, video_id, write_lists
from tests.pipelines.sources.test_embeddings import example, record, values, write
from tune.space.space import with_values
from tune.tables.config import load_table
from tune.tables.launch import read_rows

EMBEDDINGS = {"gemmeke": 829_527, "kong18": 1_093_554, "yu": 2_630_619}
SOUND = {"ford": 24_581_583, "cnn14-mixup": 80_753_615, "cnn14-balanced": 80_753_615, "cnn14": 80_753_615}

SIGHT, JOINT = 85_231_185 + 2049 * 527, 143_589_870
FUSION = {
    "gblend-audio": 42_532_208 + 2049 * 527,
    "gblend-video": SIGHT,
    "gblend-naive": JOINT,
    "gblend": JOINT,
    "fayek-audio": 20_470_239,
    "fayek-video": 118_487_008,
    "fayek-average": 138_957_247 + 527,
    "fayek-regression": 138_957_247 + 555_985,
    "fayek": 138_957_247 + 1_111_970,
}


def row(name: str, **changes: Any) -> Recipe:
    """Return the recipe of a full-scale row."""
    rows, _, base, _ = read_rows(load_table("audioset"), "full", None, [])
    [found] = [one for one in rows.run if one.name == name]
    return build_recipe(with_values(base, {**rows.values(found), **changes}), source=name)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("embeddings")
    clips = [record(example(f"video{n:06}", list(range(n, 527)), values(n))) for n in range(4)]
    files = {"bal_train/a.tfrecord": b"".join(clips[:3]), "eval/a.tfrecord": clips[3]}
    prepare("audioset_embeddings", write(root / "src", files), str(root / "out"), PrepareConfig(parallel="off"))
    return str(root / "out")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("sounds")
    write_lists(root, 3, 2)
    for number in (0, 1, 2, 100, 101):
        (root / f"{video_id(number)}.flac").write_bytes(sound_file(tone(200 + number, 0.2, 16_000), 16_000))
    prepare("audioset", str(root), str(root / "out"), PrepareConfig(options={"media": "audio"}, parallel="off"))
    return str(root / "out")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("videos")
    write_lists(root, 2, 2)
    for number in (0, 1, 100, 101):
        (root / f"{video_id(number)}.mp4").write_bytes(real_video())
    prepare("audioset", str(root), str(root / "out"), PrepareConfig(parallel="off"))
    return str(root / "out")


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_rows_of_embeddings(name: str, embeddings: str) -> None:
    recipe = row(name, **{"data.url": embeddings})
    assert check_recipe(recipe).parameters == EMBEDDINGS[name]
    assert recipe.data.order == "balanced" and recipe.train.global_batch == 500 and recipe.optim.kind == "adam"


@pytest.mark.parametrize("name", SOUND)
def test_rows_of_sound(name: str, sounds: str) -> None:
    recipe = row(name)
    # The balanced order needs samples of all 527 classes.
    assert check_recipe(row(name, **{"data.url": sounds, "data.order": "shuffled"})).parameters == SOUND[name]
    assert recipe.data.clip.eval_clips == 1 and recipe.data.audio.seconds == 10 and recipe.train.steps == 600_000
    assert recipe.optim.amsgrad and not recipe.optim.weight_decay and recipe.optim.clip is None
    assert (recipe.data.order == "balanced") == (name != "cnn14")


@pytest.mark.parametrize("name", FUSION)
def test_rows_of_two_branches(name: str, videos: str) -> None:
    recipe = row(name)
    model = check_recipe(row(name, **{"data.url": videos}))
    assert model.parameters == FUSION[name]
    data = recipe.data
    assert data.clip.show != "both" or data.audio.seconds == data.video.seconds, "both ends aligned"
    if name in ("fayek", "fayek-average", "fayek-regression"):
        trained = {"fayek": 1_111_970, "fayek-regression": 555_985, "fayek-average": 527}[name]
        assert model.parameters - model.frozen == trained, "only the fusion is trained"
    task: Any = recipe.task
    if name == "gblend":
        assert task.blend == {"audio": 0.239, "video": 0.384, "joint": 0.377} and recipe.optim.kind == "sgd"


def test_the_branches_are_those_of_the_rows_they_start_from() -> None:
    table = load_table("audioset").config
    for scale in ("small", "full"):
        rows, _, base, _ = read_rows(load_table("audioset"), scale, None, [])  # type: ignore[arg-type]
        models: dict[str, Any] = {
            one.name: build_recipe(with_values(base, rows.values(one)), source=one.name).model for one in rows.run
        }
        for one in table.rows:
            for part, origin in one.start.items():
                assert models[one.name].branches[part.removeprefix("branches.")] == models[origin]
    assert rows.origins()[[one.name for one in rows.run].index("fayek")]


def test_the_recipe_of_cnn14_is_the_row_on_one_gpu(sounds: str) -> None:
    tree = yaml.safe_load((RECIPES / "audioset_cnn14.yaml").read_text())
    tree["data"] |= {"url": sounds, "order": "shuffled"}
    recipe, of_row = check_recipe(build_recipe(tree)).recipe, row("cnn14-mixup")
    for part in ("model", "task", "optim"):
        assert getattr(recipe, part) == getattr(of_row, part)
    inputs: Any = recipe.model
    assert (inputs.inputs.time_masks, inputs.inputs.time_width) == (2, 64)
    assert (inputs.inputs.frequency_masks, inputs.inputs.frequency_width) == (2, 8)


def test_embeddings_of_another_size_are_refused_with_both_keys(embeddings: str) -> None:
    changed = {"data.url": embeddings, "model.inputs": {"kind": "embeddings", "channels": 64}}
    recipe = row("kong18")
    tree = with_values(recipe.model_dump(mode="json"), changed)
    with pytest.raises(UserError, match=r"segments = 10 and channels = 64.*10 segments of 128 values"):
        check_recipe(build_recipe(tree))
