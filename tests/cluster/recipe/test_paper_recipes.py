"""The recipes at the papers' scale pass the checks with data in the public layouts."""

from pathlib import Path

import numpy as np
import pytest

from cluster.recipe.config import load_recipe
from cluster.recipe.preflight import check_recipe
from perceiver.config import UserError
from pipelines.feed.ingest import EvalShare, eval_batches, load_data
from pipelines.prepare import PrepareConfig, prepare
from tests.pipelines.raw import flo, off, write
from tests.pipelines.toys import png

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
IMAGES = {
    f"{split}/n0144076{i}/ILSVRC2012_val_{i:08d}.JPEG" if split == "val" else f"train/n0144076{i}/{i}.JPEG": png(
        PIXELS, "JPEG"
    )
    for split in ("train", "val")
    for i in range(4)
}
MESHES = {f"class{i}/{split}/{i}.off": off() for split in ("train", "test") for i in range(4)}
PAIRS = {
    f"data/{i}_{part}": content
    for i in range(4)
    for part, content in (
        ("img1.ppm", png(PIXELS, "PPM")),
        ("img2.ppm", png(PIXELS, "PPM")),
        ("flow.flo", flo(np.ones((40, 60, 2)))),
    )
}
TEXTS = {"train.txt": b"a document\n\n" * 30, "test.txt": b"another one"}

RECIPES = {
    "imagenet_perceiver": ("imagenet", IMAGES, 44_912_254 - 1025 * 996),
    "imagenet_perceiver_io": ("imagenet", IMAGES, 48_440_627 - 1025 * 996),
    "modelnet40": ("modelnet40", MESHES, 44_772_202 - 1025 * 36),
    "mlm_bytes": ("text", TEXTS, 201_108_230),
    "flow": ("flow", PAIRS, 41_057_134),
}
"""Source, raw files, and the parameters of the paper's model (without those of classes missing from the toy data)."""


def prepared(name: str, root: Path) -> str:
    """Prepare the recipe's data from raw files; return its folder."""
    source, files, _ = RECIPES[name]
    prepare(source, str(write(root / "src", files)), str(root / "out"), PrepareConfig(parallel="off"))
    return str(root / "out")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_the_data_of_their_source(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(f"recipes/train/{name}.yaml", [f"data.url={prepared(name, tmp_path)}"])
    assert check_recipe(recipe).parameters == RECIPES[name][2]
    data = recipe.data.model_copy(update={"executor": "inline"})
    [batch] = eval_batches(data, load_data(data), EvalShare(data.eval_split, 4), "cpu")
    assert batch["valid"].sum() == {"flow": 1, "mlm_bytes": 1}.get(name, 4)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("flow", "data.image_size=[368, 504]", "come as 368 x 504.*data.image_size"),
        ("flow", "task.kind=masked_language", "task.kind = 'masked_language' .*'text'.* flow"),
        ("mlm_bytes", "data.text_length=2050", "model.inputs.length = 2048.*data.text_length = 2050"),
        ("modelnet40", "task.kind=flow", "task.kind = 'flow' .*'flow'.* points, label"),
    ],
)
def test_a_mismatch_names_the_keys(tmp_path: Path, name: str, change: str, message: str) -> None:
    recipe = load_recipe(f"recipes/train/{name}.yaml", [f"data.url={prepared(name, tmp_path)}", change])
    with pytest.raises(UserError, match=message):
        check_recipe(recipe)
