"""Jobs on a Ray cluster: `perceiver.submit`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perceiver.api.recipes import set_up, words

if TYPE_CHECKING:
    from cluster.jobs.commands import Job
    from cluster.jobs.config import Submission
    from cluster.jobs.server import JobServer
    from perceiver.api.recipes import Place


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
    recipe: "Place",
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
        recipe: the file of a recipe or a search.
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

    wanted = Submission(recipe=os.fspath(recipe), overrides=words(overrides), run=run, **(submission or {}))
    return start_job(wanted, lambda: connect(Access(address, headers, verify)), progress=progress)


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
