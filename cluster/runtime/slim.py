"""Ray Train's trainer without the actors that our runs have no use for.

Each of them is a Python process, a second or two to start, before the first step and again after each failure.
"""

from typing import Any

from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

DATASETS = "DatasetsCallback"
"""Hands out the trainer's datasets, through an actor; ours has none, since each worker makes its own."""
CLEANER = "PlacementGroupCleanerCallback"
"""Starts an actor that frees the workers' places should the controller die; a Ray of one's own ends with its driver."""


class SlimTrainer(DataParallelTrainer):
    """A trainer that leaves out some of Ray Train's own callbacks.

    Args:
        own_ray: whether Ray was started for this run alone.
    """

    def __init__(self, *arguments: Any, own_ray: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.left_out = {DATASETS, CLEANER} if own_ray else {DATASETS}

    def _create_default_callbacks(self) -> list[Any]:
        """See Ray Train, which offers no way to choose."""
        return [
            callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in self.left_out
        ]
