"""`python -m tests.cluster.run.whole_worker RECIPE [EPOCHS]...`: `train_worker` without Ray, once for each length.

Each is a process that is forked here, so that libraries are imported once. The later ones resume the run of the first.
"""

import sys
from functools import partial
from typing import Any

import torch

from cluster.recipe.config import Recipe, load_recipe
from cluster.record.run_folder import RunFolder
from cluster.run import worker
from cluster.worker.monitor import LocalMonitor
from cluster.worker.setup import WorkerRank
from perceiver.tracking.redaction import Unshown
from tests.forks import failed, import_what_a_step_imports, start_ranks

RUN = "small-001"


def work(recipe: Recipe) -> None:
    """Train as the only worker of a run; it must finish."""
    torch.set_num_threads(1)
    worker.find_rank = lambda runs, threads: WorkerRank(0, 1, 1, torch.device("cpu"))
    config: dict[str, Any] = {
        "recipe": Unshown(recipe.model_dump(mode="json")),
        "run": RUN,
        "monitor": LocalMonitor(),
        "mlflow": Unshown(None),
        "fence": None,
        "local": str(RunFolder(recipe.output, RUN).local),
        "threads": None,
        "runs": 1,
        "holders": (),
        "on_cluster": False,
    }
    found = worker.train_worker(config)
    assert found["status"] == "finished", found


def main(recipe_file: str, lengths: list[str]) -> int:
    """Train with each number of epochs, one after the other; return the number of runs that failed."""
    import_what_a_step_imports()
    recipes = [load_recipe(recipe_file, [f"train.epochs={length}"]) for length in lengths] or [load_recipe(recipe_file)]
    return sum(failed(start_ranks(partial(work, recipe), 1)) for recipe in recipes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
