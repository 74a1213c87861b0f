"""A run in a process of its own, so that the calling program is free: `perceiver.train(..., async_=True)`."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import yaml

from perceiver.api.run_record import Run, RunError
from perceiver.config import UserError

if TYPE_CHECKING:
    from cluster.recipe.config import Recipe
    from cluster.record.run_folder import RunFolder


class BackgroundRun:
    """A run that trains in a process of its own: `perceiver train` with the recipe that the caller gave.

    It does not end with the calling program. It uses the caller's Ray if that is initialised.

    Attributes:
        run: the run, whose folder exists once the process has checked the recipe.
        pid: of the process.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(
        self, folder: "RunFolder", recipe: "Recipe", words: list[str], environment: dict[str, str], total_steps: int
    ) -> None:
        self.run, self.total_steps = Run(folder.url), total_steps
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  read by `wait`
        # A file without a name, since the recipe may have secrets.
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            yaml.safe_dump(recipe.model_dump(mode="json"), file, sort_keys=False)
            file.flush()
            file.seek(0)
            command = [sys.executable, "-P", "-m", "perceiver_train", "train", f"/dev/fd/{file.fileno()}", *words]
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=(file.fileno(),),
                start_new_session=True,  # Ctrl-C is for the calling program
            )
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.poll() is None

    def progress(self) -> dict[str, Any]:
        """Return the newest recorded metrics: `step`, `total_steps`, `train/loss`, `eval/accuracy`, ... Does not wait.

        `step` is 0 before the first recorded step.
        """
        found: dict[str, Any] = {"step": 0}
        for row in self.run.history:
            found |= row
        return {**found, "total_steps": self.total_steps}

    def stop(self) -> None:
        """Let the run save a checkpoint and stop. Returns at once; `wait` returns when it has."""
        if self.running:
            self._process.send_signal(signal.SIGINT)

    def wait(self, timeout: float | None = None) -> Run:
        """Wait for the end of the process and return the run; its `status` is `finished` or `stopped`.

        Args:
            timeout: seconds; None waits for as long as it takes.

        Raises:
            UserError: the run was refused.
            RunError: it failed.
            TimeoutError: the time is over; the run continues.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.run.folder} is still training after {timeout} s") from None
        if code in (0, 130):
            return self.run
        self._output.seek(0)
        lines = [line.strip() for line in self._output if line.strip()]
        reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        reason = (reasons or lines or [f"the process ended with code {code}"])[-1]
        if code == 2:
            raise UserError(reason)
        raise RunError(f"{self.run.folder}: {reason}", self.run)


def start(recipe: "Recipe", run: str | None, *, resume: bool) -> BackgroundRun:
    """Start a process that trains a recipe.

    Raises:
        UserError: there is no such run, or the data cannot be read; later problems are raised by `BackgroundRun.wait`.
    """
    from cluster.record.run_folder import choose_run
    from cluster.runtime.session import CONTINUE_COMMAND
    from pipelines.feed.ingest import load_data

    samples = load_data(recipe.data).split(recipe.data.train_split).samples
    folder = choose_run(recipe.output, recipe.name, resume, run)
    if not resume and "://" not in folder.url:
        folder.local.mkdir(parents=True, exist_ok=True)  # the next call takes another name
    stored = folder.location("recipe.yaml")
    again = shlex.join(["perceiver", "train", stored, "--resume", "--run", folder.name])
    environment = {**os.environ, **_ray_address(), CONTINUE_COMMAND: os.environ.get(CONTINUE_COMMAND) or again}
    words = ["--run", folder.name, *(["--resume"] if resume else [])]
    return BackgroundRun(folder, recipe, words, environment, recipe.train.total_steps(samples))


def _ray_address() -> dict[str, str]:
    """Return the variable that names the Ray of this process, if it has initialised one."""
    from cluster.runtime.session import is_joined

    if not is_joined():
        return {}
    import ray

    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
