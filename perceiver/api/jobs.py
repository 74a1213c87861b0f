"""Jobs on a Ray cluster: `perceiver.submit`."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver.api.recipes import read_recipe, recipe_tree, search_tree, set_up, words

if TYPE_CHECKING:
    from cluster.jobs.commands import Job
    from cluster.jobs.config import Submission
    from cluster.jobs.server import JobServer
    from cluster.recipe.config import Recipe
    from perceiver.api.recipes import RecipeLike, SearchLike

SUBMITTED = "submitted.yaml"
"""Name of the file of a job whose recipe or search is no file."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job of a Ray cluster.

    Attributes:
        name: its submission id.
        server: the cluster's job server.
        verb: what it runs, `train` or `tune`.
    """

    name: str
    server: "JobServer"
    verb: str = "train"

    @property
    def facts(self) -> dict[str, Any]:
        """Its state as `perceiver status --json` prints it: `name`, `status`, `run`, `output`, ..."""
        return self.job().facts()

    @property
    def status(self) -> str:
        """`PENDING`, `RUNNING`, `SUCCEEDED`, `FAILED` or `STOPPED`."""
        return self.job().status

    def logs(self) -> str:
        """Return the job's log so far."""
        from cluster.jobs.commands import logs

        return logs(self.server, self.job())

    def stop(self) -> str:
        """Stop the job after it has saved a checkpoint, wait for that, and return its status."""
        from cluster.jobs.commands import stop

        return stop(self.server, self.job())[0].status

    def wait(self, progress: bool = True) -> str:
        """Wait for the end of the job and return its status.

        Args:
            progress: print the job's log to stdout.
        """
        from cluster.jobs.commands import follow
        from perceiver.tracking.printable import say_log

        return follow(self.server, self.job(), say_log if progress else lambda text: None).status

    def job(self) -> "Job":
        """Ask the cluster for the job's state."""
        from cluster.jobs.commands import find_job

        return find_job(self.server, self.name)


def submit(
    recipe: "RecipeLike | SearchLike",
    *,
    address: str | None = None,
    headers: str | None = None,
    verify: str = "true",
    run: str | None = None,
    progress: bool = True,
    submission: "dict[str, Any] | None" = None,
    **overrides: Any,
) -> SubmittedJob:
    """Submit a training run or a search as a job of a Ray cluster, as `perceiver submit --no-wait` does.

    Args:
        recipe: a recipe (a file, a dict or a `Recipe`) or a search (a file, or a dict as for `perceiver.tune`).
        address: of the cluster's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the
            local cluster.
        headers: JSON of HTTP headers for a proxy; default: RAY_JOB_HEADERS.
        verify: whether to verify TLS certificates, or a file of certificates.
        run: name of the run, continued if it exists; default: the recipe's name.
        progress: print notes about paths and secrets to stdout.
        submission: further fields of `cluster.jobs.config.Submission`, such as `{"install": True}`.
        overrides: values by dotted key.

    Raises:
        UserError: a mistake in the recipe, the cluster does not answer, or the job does not fit on it.
    """
    set_up()
    from cluster.jobs.config import Submission
    from cluster.jobs.server import Access, connect

    is_file = isinstance(recipe, str | os.PathLike)
    changes = words(overrides)
    with contextlib.nullcontext(os.fspath(recipe)) if is_file else _written(recipe, changes) as path:
        wanted = Submission(recipe=path, overrides=changes, run=run, sent=not is_file, **(submission or {}))
        return start_job(wanted, lambda: connect(Access(address, headers, verify)), progress=progress)


@contextlib.contextmanager
def _written(recipe: "Mapping[str, Any] | Recipe", overrides: list[str]) -> Iterator[str]:
    """Write a recipe, or a search with the sections of its recipe, into a temporary file; yield its path.

    Raises:
        UserError: a mistake in it.
    """
    import yaml

    from cluster.recipe.file import read_tree
    from tune.config import build_search
    from tune.search.submission import is_search
    from tune.search_file import SEARCH, read_search

    tree = recipe_tree(recipe)
    if is_search(tree):
        tree: Any = search_tree(tree)
        build_search(*read_search(tree, overrides), SEARCH)
        if isinstance(tree["recipe"], str):  # relative to the current folder
            tree["recipe"] = read_tree(tree["recipe"])
    else:
        tree = read_recipe(tree, overrides).model_dump(mode="json")
    text = yaml.safe_dump(json.loads(json.dumps(tree, default=os.fspath)), sort_keys=False)
    with tempfile.TemporaryDirectory(prefix="perceiver-submit-") as folder:
        path = Path(folder, SUBMITTED)
        path.write_text(text, encoding="utf-8")
        yield str(path)


def start_job(
    wanted: "Submission", reach: "Callable[[], JobServer]", *, progress: bool, search: bool = False
) -> SubmittedJob:
    """Submit a job.

    Args:
        wanted: the request.
        reach: connects to the cluster, once the recipe is found to be sound.
        progress: print notes.
        search: treat the file as a search; otherwise its keys decide.
    """
    from cluster.jobs.submit import submit, training
    from perceiver.tracking.printable import say
    from tune.search.submission import is_search, searching

    work = searching(wanted) if search or is_search(wanted.recipe) else training(wanted)
    server = reach()
    name = submit(server, wanted, work, say if progress else lambda line: None)
    return SubmittedJob(name, server, work.verb)
