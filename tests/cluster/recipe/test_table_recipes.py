"""The recipes for tables fit a table of their columns, prepared by the command in their header."""

from pathlib import Path

import numpy as np
import pytest

from cluster.recipe.config import load_recipe
from cluster.recipe.preflight import check_recipe
from perceiver.factory import build_model
from perceiver.tasks import build_task, output_count
from pipelines.feed.ingest import EvalShare, eval_batches, load_data
from pipelines.prepare import PrepareConfig, prepare

COLUMNS = {"breast_cancer": 30, "diabetes": 10, "yeast": 103}
ANSWERS = {"breast_cancer": "label=target", "diabetes": "target=target", "yeast": "labels=labels"}

FIGURES = {"breast_cancer": {"accuracy"}, "diabetes": {"mae", "rmse", "r2"}, "yeast": {"mean_average_precision"}}


def table(name: str, rows: int = 40) -> str:
    """Return a CSV with the recipe's columns: random numbers and answers."""
    rng = np.random.default_rng(0)
    names = [f"Class{number}" for number in range(1, 15)]
    answers = {
        "breast_cancer": [str(row % 2) for row in range(rows)],
        "diabetes": [f"{25 + 7.5 * row}" for row in range(rows)],
        "yeast": [";".join({names[row % 14], names[row * 3 % 14]}) for row in range(rows)],
    }[name]
    column = ANSWERS[name].partition("=")[2]
    lines = [",".join([*(f"x{number}" for number in range(COLUMNS[name])), column])]
    numbers = rng.normal(50, 10, (rows, COLUMNS[name])).round(3)
    return "\n".join([*lines, *(",".join([*map(str, row), answers[at]]) for at, row in enumerate(numbers))]) + "\n"


@pytest.mark.parametrize("name", COLUMNS)
def test_the_recipe_fits_its_table(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.csv").write_text(table(name))
    option, _, column = ANSWERS[name].partition("=")
    config = PrepareConfig(options={"series": "all", option: column}, parallel="off")
    prepare("csv", str(tmp_path / f"{name}.csv"), str(tmp_path / "data"), config)
    recipe = load_recipe(f"recipes/train/{name}.yaml", [f"data.url={tmp_path}/data", "data.executor=inline"])
    recipe = check_recipe(recipe).recipe  # with the statistics and targets of the data
    data = load_data(recipe.data)
    outputs = output_count(recipe.task, len(data.classes))
    model = build_model(recipe.model, classes=outputs).eval()
    task = build_task(recipe.task, classes=outputs)
    [batch] = eval_batches(recipe.data, data, EvalShare("test", 8), "cpu")
    assert batch["series"].shape == (8, 1, COLUMNS[name])
    loss = task.loss(model, batch)
    assert task.count(batch) == 8 and loss.loss_sum.isfinite()
    assert FIGURES[name] <= task.summarise(loss.sums, 8.0).keys()
