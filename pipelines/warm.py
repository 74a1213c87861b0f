"""Starting what the first batch would wait for, while the training workers are still starting themselves."""

from typing import Any


def warm_up(tasks: int, cpus_per_task: float) -> Any:
    """Start the processes of the data tasks and Ray Data's own actors in the background; returns a reference at once.

    On a busy machine this takes several seconds, which the first batch would otherwise wait for.

    Args:
        tasks: data tasks at a time over all workers.
        cpus_per_task: as in the recipe's `data:` section.
    """
    import ray

    # Retrying or failing makes no difference to a run: the first batch starts whatever is missing.
    return ray.remote(num_cpus=0, max_retries=0)(_run_small_dataset).remote(tasks, cpus_per_task)


def _run_small_dataset(tasks: int, cpus_per_task: float) -> int:
    import ray.data

    dataset = ray.data.from_items(list(range(tasks)), override_num_blocks=tasks)
    dataset = dataset.map_batches(_import_tasks_needs, num_cpus=cpus_per_task,
                                  compute=ray.data.TaskPoolStrategy(size=tasks))
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset.count()


def _import_tasks_needs(batch: Any) -> Any:
    import pipelines.samples  # noqa: F401

    return batch
