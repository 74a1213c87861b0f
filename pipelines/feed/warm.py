"""Starting what the first batch would wait for, while the training workers are still starting themselves."""

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.feed.ingest import DataConfig
    from pipelines.shards.manifest import Manifest


def warm_up(tasks: int, data: "DataConfig", manifest: "Manifest") -> Any:
    """Start the processes of the data tasks and Ray Data's own actors in the background; returns a reference at once.

    On a busy machine this takes several seconds, which the first batch would otherwise wait for. None if it is not Ray
    Data that executes.

    Args:
        tasks: data tasks at a time over all workers.
        data: the recipe's `data:` section.
        manifest: see `load_data`.
    """
    if data.executor != "ray":
        return None
    import ray

    # Retrying or failing makes no difference to a run: the first batch starts whatever is missing.
    variables = _worker_variables()
    start = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": variables})(_run_small_dataset)
    modules = sorted({name for feature in manifest.features.values() for name in feature.imports(data)})
    return start.remote(tasks, data.cpus_per_task, variables, ["pipelines.feed.samples", *modules])


def _worker_variables() -> dict[str, str]:
    """The environment that Ray Train gives its workers: their data tasks take no process that was started without."""
    constants: Any = importlib.import_module("ray.train.v2._internal.constants")
    try:
        name, value = "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", constants.DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE
        return {name: value, **constants.get_env_vars_to_propagate()}
    except AttributeError:  # another version of Ray: the data tasks start processes of their own
        return {}


def _run_small_dataset(tasks: int, cpus_per_task: float, variables: dict[str, str], modules: list[str]) -> None:
    """Import what data tasks need, in so many of them at a time.

    Ray compares environments as texts, and writes one that was merged with the parent's in another way than one that
    was only given or inherited. Those of training workers are merged ones, hence the same variables again here.
    """
    import ray.data

    dataset = ray.data.from_items(list(range(tasks)), override_num_blocks=tasks)
    dataset = dataset.map_batches(
        partial(_import, modules=modules),
        num_cpus=cpus_per_task,
        runtime_env={"env_vars": variables},
        compute=ray.data.TaskPoolStrategy(size=tasks),
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.materialize()


def _import(batch: Any, modules: list[str]) -> Any:
    for name in modules:
        importlib.import_module(name)
    return batch
