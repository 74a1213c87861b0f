"""The trainer of a recipe for programs that use Ray Train: a `TorchTrainer` whose `fit` is a whole run."""

from collections.abc import Callable

import ray.train
from ray.train.torch import TorchTrainer

from cluster.recipe.config import Recipe
from cluster.run.worker import train_worker
from cluster.runtime.process_group import torch_config


class RecipeTrainer(TorchTrainer):
    """A `TorchTrainer` of a recipe.

    `fit` checks the recipe, chooses the run's folder, opens the MLflow run, trains with the trainer of
    `cluster.run.trainer.build_trainer`, and writes the report: that trainer alone would leave a run without its end.

    Args:
        recipe: the recipe.
        start: does all that, and returns Ray's result.
    """

    def __init__(self, recipe: Recipe, start: Callable[[], ray.train.Result]) -> None:
        cluster = recipe.cluster
        super().__init__(
            train_worker,
            torch_config=torch_config(cluster),
            scaling_config=ray.train.ScalingConfig(num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0),
        )
        self._start = start

    def fit(self) -> ray.train.Result:
        """Train; return Ray's result, with the metrics of the last evaluation and the newest checkpoint.

        Raises:
            UserError: a mistake in the recipe, the data or the resources.
            RunError: the run failed.
        """
        return self._start()
