"""Runs whose number of workers follows the nodes: `cluster.min_workers`.

Ray Train's elastic policy decides; two things are ours. Only numbers of workers that share out the global batch are
taken, and where a node has joined the workers save and leave first, so that growing costs no step.
"""

import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

from cluster.recipe.placement import connected_nodes
from cluster.runtime.slim import SlimTrainer

LOOK_S = 15.0
"""Between two looks for nodes that have joined."""
AGAIN_S = 60.0
"""The workers are asked again to save and leave if they have not by then."""


class WholeShares(ElasticScalingPolicy):
    """Ray Train's elastic policy for some numbers of workers only.

    Args:
        scaling_config: from the smallest to the largest of the counts.
        counts: the numbers of workers that may train.
        monitor: through which the workers are asked to save and leave.
    """

    def __init__(self, scaling_config: Any, counts: Sequence[int], monitor: Any) -> None:
        super().__init__(scaling_config)
        self.counts, self.monitor = counts, monitor
        self._asked = -AGAIN_S

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Round down to a number that may train; nodes that have died are left out before Ray knows it.

        A group that is given a node that is not there any more waits for a minute before Ray decides anew.
        """
        labels = self.scaling_config.label_selector
        wanted = labels if isinstance(labels, Mapping) else {}
        need: Any = self.scaling_config._resources_per_worker_not_none
        room = sum(node.room(need) for node in connected_nodes(answering=True) if node.has(wanted))
        possible = min(super()._count_possible_workers(reserved_resources), room)
        return max((count for count in self.counts if count <= possible), default=0)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Ask the workers to leave for a larger group; workers that are well are never sent away for a smaller one."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        now = time.monotonic()
        grows = isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers
        if grows and now - self._asked > AGAIN_S:
            self._asked = now
            self.monitor.request_resize.remote()
        return NoopDecision()


class ElasticTrainer(SlimTrainer):
    """A trainer with `WholeShares` for a policy; Ray Train offers no way to name one."""

    def __init__(self, *arguments: Any, counts: Sequence[int], monitor: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.counts, self.monitor = counts, monitor

    def fit(self) -> Any:
        """See Ray Train's trainer."""
        with self._policy():
            return super().fit()

    @contextmanager
    def _policy(self) -> Iterator[None]:
        module: Any = importlib.import_module("ray.train.v2.api.data_parallel_trainer")
        usual = module.create_scaling_policy
        module.create_scaling_policy = lambda scaling_config: WholeShares(scaling_config, self.counts, self.monitor)
        try:
            yield
        finally:
            module.create_scaling_policy = usual
