"""Searches: `perceiver.tune`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perceiver.api.recipes import search_tree, set_up, words
from perceiver.api.run_record import Run, facts_of, place_of

if TYPE_CHECKING:
    from perceiver.api.recipes import SearchLike
    from tune.search_record import SearchRecord, TrialRecord


class SearchError(Exception):
    """A search that failed after its trials had started; the same call with `resume=True` continues it."""


@dataclass(frozen=True)
class SearchRun:
    """A search by its folder; everything is read from there when it is asked for.

    Attributes:
        folder: a path or an fsspec URL.
    """

    folder: str

    def __fspath__(self) -> str:
        return self.folder

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped` or `failed`."""
        return str(facts_of(self).get("status") or "")

    @property
    def record(self) -> "SearchRecord":
        """All trials with their values and evaluations."""
        from tune.search_record import load_record

        return load_record(place_of(self))

    @property
    def best(self) -> "TrialRecord | None":
        """The best trial; None without an evaluated one."""
        return self.record.best()

    @property
    def best_recipe(self) -> str | None:
        """The file of the best trial's recipe, for `perceiver.train`; None before the end."""
        return place_of(self).location("best.yaml") if place_of(self).exists("best.yaml") else None

    @property
    def report(self) -> str | None:
        """The HTML page; None before the end."""
        return place_of(self).location("report.html") if place_of(self).exists("report.html") else None

    @property
    def trials(self) -> list[Run]:
        """The runs of the trials, in order."""
        from tune.search_record import trial_name

        return [Run(f"{self.folder}/trials/{trial_name(trial.number)}") for trial in self.record.trials]


def tune(
    search: "SearchLike", *, run: str | None = None, resume: bool = False, progress: bool = True, **overrides: Any
) -> SearchRun:
    """Search over the keys of a recipe, as `perceiver tune` does.

    Args:
        search: the search file, or a dict with its keys, of which `recipe` is a file, a dict or a `Recipe`.
        run: name of the search's folder; default: the search's name and the next free number, with `resume` the newest.
        resume: continue a search.
        progress: print the progress to stdout.
        overrides: keys of the search or of its base recipe by dotted key.

    Raises:
        UserError: a mistake in the search, the recipe, the data or the resources, before anything starts.
        SearchError: it failed later.
        KeyboardInterrupt: it was stopped, after the running trials had saved a checkpoint.
    """
    set_up()
    from cluster.record.failures import EXIT_STOPPED
    from cluster.record.run_folder import choose_run
    from tune.config import build_search
    from tune.search.launch import launch_search
    from tune.search_file import SEARCH, read_search

    wanted, given = search_tree(search), words(overrides)
    tree, base, where = read_search(wanted, given)
    built = build_search(tree, base, where, wanted if isinstance(wanted, str) else SEARCH)
    folder = choose_run(built.recipe.output, built.config.name, resume, run)
    code = launch_search(wanted, given, resume=resume, run=folder.name, show="progress" if progress else "nothing")
    if code == EXIT_STOPPED:
        raise KeyboardInterrupt(f"{folder.url} was stopped: tune(..., resume=True) continues it")
    if code:
        raise SearchError(f"{folder.url} failed: see {folder.local / 'logs'}")
    return SearchRun(folder.url)
