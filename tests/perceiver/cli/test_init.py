"""`perceiver init DATA`: a recipe for each kind of data, which passes the checks of `perceiver train`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from cluster.draft.length import fit_length, random_batch, step_seconds
from cluster.draft.recipe import Draft, Machine, draft_recipe
from cluster.draft.text import recipe_text
from cluster.recipe.config import build_recipe, load_recipe
from cluster.recipe.preflight import CheckedModel, check_recipe
from perceiver.cli.init import command
from perceiver.config import UserError
from perceiver.factory import build_model
from perceiver.tasks import build_task, output_count
from pipelines.features import (
    AudioFeature,
    EmbeddingsFeature,
    FlowFeature,
    ImageFeature,
    LabelFeature,
    LabelsFeature,
    MediaFeature,
    PointsFeature,
    SegmentationFeature,
    SeriesFeature,
    TargetFeature,
    TextFeature,
    VideoFeature,
)
from pipelines.inspect.sizes import sample_sizes
from pipelines.shards.manifest import Manifest, ShardInfo, Split
from pipelines.shards.statistics import Spectrogram, SpectrogramStatistics, Statistics
from tests.pipelines.toys import write_images as write_shards

CPU = Machine(cpus=2)
GREY = Statistics(mean=(0.4,), std=(0.2,), samples=9)
SOUND = SpectrogramStatistics(
    mean=(-2.0,),
    std=(3.0,),
    samples=9,
    spectrogram=Spectrogram(rate=16_000, window=2048, hop=1024, bins=80, low=80, high=7600),
)
LABEL = {"label": LabelFeature()}
NUMBERS = TargetFeature(names=("height", "weight"), mean=(1.0, 2.0), std=(1.0, 1.0))


def manifest(features: dict[str, Any], samples: int = 4000, **more: Any) -> Manifest:
    """Return a manifest of data that are not there, with a test split unless others are given."""
    sizes = more.pop("splits", {"train": samples, "test": 400})
    splits = {
        name: Split(shards=(ShardInfo(name=f"{name}.parquet", rows=rows, rows_per_group=rows, bytes=rows),))
        for name, rows in sizes.items()
    }
    facts = {"name": "toy", "licence": "none", "source": "made up", "classes": ("a", "b", "c")}
    return Manifest(features=features, splits=splits, **facts | more)


def draft(data: Manifest, sizes: Any = None, machine: Machine = CPU, workers: int | None = 2) -> Draft:
    """Return the recipe for data, without its length."""
    return draft_recipe("data/toy", data, sizes or {}, machine, workers)


def checked(data: Manifest, found: Draft) -> CheckedModel:
    """Return the recipe after the checks of a run."""
    return check_recipe(build_recipe(found.tree), lambda url, options: data)


KINDS: dict[str, tuple[Manifest, dict[str, Any], str, str]] = {
    "image": (
        manifest({"image": ImageFeature(channels=1, size=(12, 12)), **LABEL}, statistics={"image": GREY}),
        {},
        "image",
        "classification",
    ),
    "photographs": (
        manifest({"image": ImageFeature(channels=3), "label": LabelsFeature()}),
        {"image": {"height": [90.0, 100.0], "width": [120.0, 70.0]}},
        "image",
        "tagging",
    ),
    "row": (manifest({"series": SeriesFeature(channels=3, length=1), "target": NUMBERS}), {}, "series", "regression"),
    "series": (
        manifest({"series": SeriesFeature(channels=2), **LABEL}),
        {"series": {"steps": [300.0, 500.0]}},
        "series",
        "classification",
    ),
    "embeddings": (
        manifest({"embeddings": EmbeddingsFeature(segments=5, channels=12), "label": LabelsFeature()}),
        {},
        "embeddings",
        "tagging",
    ),
    "points": (manifest({"points": PointsFeature(features=3), **LABEL}), {}, "points", "classification"),
    "audio": (
        manifest(
            {"audio": AudioFeature(), **LABEL},
            statistics={"audio": Statistics(mean=(0.0,), std=(0.1,), samples=9)},
            spectrograms=(SOUND,),
        ),
        {"audio": {"seconds": [1.0, 1.0], "rate": [16_000.0]}},
        "mel",
        "classification",
    ),
    "unmeasured audio": (manifest({"audio": AudioFeature(), **LABEL}), {}, "mel", "classification"),
    "video": (manifest({"video": VideoFeature(size=(48, 64)), **LABEL}), {}, "video", "classification"),
    "media": (
        manifest({"media": MediaFeature(channels=1), "label": LabelsFeature()}),
        {"media": {"seconds": [0.5], "rate": [16_000.0], "height": [30.0], "width": [40.0]}},
        "multimodal",
        "tagging",
    ),
    "text": (manifest({"text": TextFeature()}), {"text": {"bytes": [90.0, 100.0]}}, "text", "masked_language"),
    "labelled text": (manifest({"text": TextFeature(), **LABEL}), {}, "text", "classification"),
    "several": (
        manifest(
            {
                "image": ImageFeature(channels=3, size=(12, 12)),
                "label_colour": LabelFeature(classes=("red", "blue")),
                "target": NUMBERS,
            },
            classes=(),
        ),
        {},
        "image",
        "multitask",
    ),
    "masks": (
        manifest({"image": SegmentationFeature(channels=3, size=(12, 12))}),
        {},
        "image",
        "segmentation",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_recipe_of_each_kind_of_data_passes_the_checks_of_a_run(name: str) -> None:
    data, sizes, inputs, task = KINDS[name]
    found = draft(data, sizes)
    tree = found.tree
    assert (tree["model"]["inputs"]["kind"], tree["task"]["kind"]) == (inputs, task)
    model = checked(data, found)
    length = fit_length(4000, 400, tree["train"]["global_batch"], seconds=0.1, minutes=2)
    full = found.with_length(length.train, length.steps)
    text = recipe_text(full, model, length, CPU, 0.1, "toy.yaml")
    assert yaml.safe_load(text) == full.tree, "the text is the recipe"
    recipe = build_recipe(yaml.safe_load(text))
    assert check_recipe(recipe, lambda url, options: data).parameters == model.parameters
    batch = random_batch(model, 2, torch.device("cpu"))
    net = build_model(model.recipe.model, classes=output_count(model.recipe.task, len(data.classes)))
    loss = build_task(model.recipe.task, classes=len(data.classes)).loss(net, batch)
    assert loss.loss_sum.isfinite()


def test_sizes_come_from_the_data() -> None:
    data, sizes, _, _ = KINDS["photographs"]
    tree = draft(data, sizes).tree
    assert tree["data"]["image_size"] == tree["model"]["inputs"]["size"] == [64, 64]
    assert tree["model"]["inputs"]["front_end"] == "patch" and len(tree["model"]["inputs"]["mean"]) == 3
    data, sizes, _, _ = KINDS["audio"]
    inputs = draft(data, sizes).tree["model"]["inputs"]
    assert (inputs["rate"], inputs["samples"], inputs["window"]) == (16_000, 15 * 1024, 2048)
    assert draft(*KINDS["text"][:2]).tree["data"]["text_length"] == 128
    assert draft(KINDS["labelled text"][0]).tree["model"]["inputs"]["front_end"] == "conv"
    assert draft(*KINDS["series"][:2]).tree["data"]["series"] == {"length": 490}
    assert draft(*KINDS["media"][:2]).tree["data"]["video"] == {"frames": 8, "fps": 16.0, "size": [28, 28]}


def test_measured_statistics_are_used() -> None:
    for name in ("image", "audio"):
        inputs = draft(*KINDS[name][:2]).tree["model"]["inputs"]
        assert inputs["mean"] == inputs["std"] == "data"
    assert "mean" not in draft(*KINDS["unmeasured audio"][:2]).tree["model"]["inputs"]


def test_the_model_fits_the_number_of_samples_and_the_machine() -> None:
    features = {"image": ImageFeature(channels=1, size=(12, 12)), **LABEL}
    few, many = manifest(features, 200), manifest(features, 80_000)
    assert draft(few).tree["model"]["latent_channels"] == 32
    assert draft(few).tree["train"]["global_batch"] <= 50
    assert draft(many).tree["model"]["latent_channels"] == 64
    wide = draft(many, machine=Machine(8, 2, 80.0), workers=None)
    assert wide.tree["model"]["latent_channels"] == 256
    assert wide.tree["cluster"] == {"workers": 2, "gpus_per_worker": 1}
    assert checked(many, wide).parameters > checked(many, draft(many)).parameters


def test_a_split_of_another_name_is_evaluated_and_a_missing_one_is_stated() -> None:
    features = {"image": ImageFeature(channels=1, size=(12, 12)), **LABEL}
    assert draft(manifest(features, splits={"train": 100, "val": 20})).tree["data"]["eval_split"] == "val"
    only = manifest(features, splits={"train": 100})
    found = draft(only)
    assert found.tree["data"]["eval_split"] == "train" and "no held-out split" in found.notes["data"][0]
    checked(only, found)


def test_other_inputs_are_named() -> None:
    found = draft(manifest({"image": ImageFeature(channels=1, size=(12, 12)), "text": TextFeature(), **LABEL}))
    assert found.tree["model"]["inputs"]["kind"] == "image"
    assert any("not used: text" in note for note in found.notes["data"])


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"image": ImageFeature(channels=1, size=(12, 12))}, "no task fits"),
        (LABEL, "no feature of toy is an input"),
        ({"flow": FlowFeature(), **LABEL}, "recipes/train/flow.yaml"),
    ],
)
def test_features_that_nothing_fits_are_refused(features: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        draft(manifest(features))


def test_the_length_fits_the_minutes() -> None:
    length = fit_length(4000, 1000, 100, seconds=0.1, minutes=1)
    assert length.train["epochs"] == 14 and length.steps == 560
    assert 0.8 <= length.minutes <= 1 and length.train["eval_every"] == 3 and not length.capped
    short = fit_length(1_000_000, 50_000, 100, seconds=1.0, minutes=1)
    assert short.train["steps"] == short.steps == 10 and short.minutes > 1 and short.train["eval_every"] < 1
    assert fit_length(100, 10, 10, seconds=0.001, minutes=100).capped


def test_names_of_classes_stay_in_their_comment() -> None:
    features = {"image": ImageFeature(channels=1, size=(12, 12)), **LABEL}
    data = manifest(features, classes=("a\nname: b", "c\u2028seed: 3\ufffe", "\x1b[31m"))
    found = draft(data)
    length = fit_length(100, 10, 10, seconds=1.0, minutes=1)
    full = found.with_length(length.train, length.steps)
    assert yaml.safe_load(recipe_text(full, checked(data, found), length, CPU, 1.0, "x.yaml")) == full.tree


def test_the_sizes_of_samples_are_measured_and_damaged_ones_left_out(tmp_path: Path) -> None:
    data = write_shards(tmp_path, {"train": [10]}, bad=(3,))
    sizes = sample_sizes(str(tmp_path), data, "train")
    assert sizes["image"] == {"height": [8] * 9, "width": [8] * 9} and not sizes["label"]


def test_the_command_writes_a_recipe_and_never_over_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cluster.draft.length.step_seconds", lambda checked: 0.1)
    write_shards(tmp_path / "data/pictures", {"train": [40], "test": [8]})
    done = CliRunner().invoke(command, ["data/pictures", "--minutes", "1", "--workers", "1"], catch_exceptions=False)
    assert done.exit_code == 0 and len(done.output.splitlines()) == 3
    assert "perceiver train pictures.yaml" in done.output
    text = (tmp_path / "pictures.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=pictures.schema.json\n")
    assert (tmp_path / "pictures.schema.json").is_file()
    recipe = load_recipe("pictures.yaml")
    assert recipe.name == "pictures" and recipe.cluster.workers == 1
    assert check_recipe(recipe).parameters > 0
    with pytest.raises(UserError, match=r"pictures\.yaml exists"):
        CliRunner().invoke(command, ["data/pictures"], catch_exceptions=False)
    assert (tmp_path / "pictures.yaml").read_text() == text


def test_a_schema_of_the_user_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cluster.draft.length.step_seconds", lambda checked: 0.1)
    write_shards(tmp_path / "data/pictures", {"train": [40], "test": [8]})
    words, schema = ["data/pictures", "--minutes", "1", "--workers", "1"], tmp_path / "pictures.schema.json"
    schema.write_text('{"title": "mine"}')
    with pytest.raises(UserError, match=r"pictures\.schema\.json exists"):
        CliRunner().invoke(command, words, catch_exceptions=False)
    assert schema.read_text() == '{"title": "mine"}' and not (tmp_path / "pictures.yaml").exists()
    assert CliRunner().invoke(command, [*words, "-o", "other.yaml"], catch_exceptions=False).exit_code == 0
    (tmp_path / "other.yaml").unlink()  # its own schema is no obstacle
    assert CliRunner().invoke(command, [*words, "-o", "other.yaml"], catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "give prepared data"), (["data/x", "--quickstart"], "give prepared data"), (["data/x"], "does not exist")],
)
def test_a_command_without_data_is_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(command, words, catch_exceptions=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "1e9"])
def test_minutes_out_of_range_are_refused(minutes: str) -> None:
    assert CliRunner().invoke(command, ["data/x", "--minutes", minutes]).exit_code == 2


def test_a_step_is_timed(tmp_path: Path) -> None:
    found = draft_recipe(str(tmp_path), write_shards(tmp_path, {"train": [40], "test": [8]}), {}, CPU, 2)
    assert step_seconds(check_recipe(build_recipe(found.tree)), most_s=0.0) > 0
