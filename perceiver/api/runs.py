"""Training runs: `perceiver.train`, `resume`, `build_trainer`."""

import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from perceiver.api.recipes import read_recipe, set_up, words
from perceiver.api.run_record import Run, RunError, facts_of, place_of
from perceiver.config import UserError

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from cluster.recipe.config import Recipe
    from cluster.run.result import RunEnd
    from perceiver.api.background import BackgroundRun
    from perceiver.api.recipes import Place, RecipeLike


@overload
def train(
    recipe: "RecipeLike",
    *,
    data: "Place | None" = None,
    run: str | None = None,
    progress: bool = True,
    async_: Literal[False] = False,
    **overrides: Any,
) -> Run: ...


@overload
def train(
    recipe: "RecipeLike",
    *,
    data: "Place | None" = None,
    run: str | None = None,
    progress: bool = True,
    async_: Literal[True],
    **overrides: Any,
) -> "BackgroundRun": ...


def train(
    recipe: "RecipeLike",
    *,
    data: "Place | None" = None,
    run: str | None = None,
    progress: bool = True,
    async_: bool = False,
    **overrides: Any,
) -> "Run | BackgroundRun":
    """Train the model of a recipe, as `perceiver train` does.

    Uses the Ray that the calling program has initialised, and leaves it running; otherwise the recipe's. In the main
    thread, Ctrl-C and SIGTERM save a checkpoint, and raise KeyboardInterrupt.

    Args:
        recipe: a file, a dict or a `Recipe`.
        data: the prepared data, in place of the recipe's `data.url`.
        run: name of the run's folder; default: the recipe's name and the next free number.
        progress: print the progress to stdout; nothing else is printed.
        async_: return at once; the run trains in a process of its own (see `BackgroundRun`).
        overrides: values by dotted key, such as `**{"train.epochs": 5}`.

    Raises:
        UserError: a mistake in the recipe, the data or the resources, before any worker starts.
        RunError: the run failed later.
    """
    return _start(recipe, words(overrides, data), run, resume=False, progress=progress, background=async_)


@overload
def resume(
    run: "Place",
    *,
    recipe: "RecipeLike | None" = None,
    progress: bool = True,
    async_: Literal[False] = False,
    **overrides: Any,
) -> Run: ...


@overload
def resume(
    run: "Place",
    *,
    recipe: "RecipeLike | None" = None,
    progress: bool = True,
    async_: Literal[True],
    **overrides: Any,
) -> "BackgroundRun": ...


def resume(
    run: "Place",
    *,
    recipe: "RecipeLike | None" = None,
    progress: bool = True,
    async_: bool = False,
    **overrides: Any,
) -> "Run | BackgroundRun":
    """Continue a run from its newest checkpoint that verifies, as `perceiver train --resume` does.

    Args:
        run: a `Run` or its folder.
        recipe: as for `train`; default: the one in the run's folder.
        progress: see `train`.
        async_: see `train`.
        overrides: keys that change, such as `**{"train.epochs": 10}`.

    Raises:
        UserError, RunError: see `train`; also if the run's recipe has secrets, which are not stored: give them as
            overrides or give `recipe`.
    """
    folder = place_of(run)
    changes = {**overrides, "output": folder.output}
    if recipe is None:
        facts_of(run)
        recipe = Run(folder.url).recipe
        _check_secrets(folder.url, recipe, overrides)
    return _start(recipe, words(changes), folder.name, resume=True, progress=progress, background=async_)


def _check_secrets(folder: str, tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuse a stored recipe whose secrets are not given again."""
    from perceiver.tracking.redaction import MASK, leaves

    hidden = [key for key, value in leaves(tree) if isinstance(value, str) and MASK in value]
    missing = [key for key in hidden if not any(key == name or key.startswith(f"{name}.") for name in overrides)]
    if missing:
        raise UserError(
            f"{folder}/recipe.yaml: {missing[0]} was a secret, which is not stored: give it as an override, or give the"
            " recipe"
        )


def build_trainer(
    recipe: "RecipeLike",
    *,
    data: "Place | None" = None,
    run: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> "TorchTrainer":
    """Return the Ray Train trainer of a recipe. Its `fit` does what `train` does, and returns Ray's `Result`.

    `Result.metrics` are those of the last evaluation, with `step` and `checkpoint_uri`; `Result.checkpoint` is a folder
    with `checkpoint.json`, which names the checkpoint by step and URL.

    Args:
        recipe: see `train`.
        data: see `train`.
        run: see `train`.
        progress: see `train`.
        overrides: see `train`.

    Raises:
        UserError: a mistake in the recipe. `fit` raises it for data and resources, and `RunError`.
    """
    set_up()
    wanted = read_recipe(recipe, words(overrides, data))
    from cluster.run.recipe_trainer import RecipeTrainer

    def start() -> Any:
        end = _launch(wanted, _command(recipe, words(overrides, data)), run, False, progress)
        _finished(end)
        return end.result

    return RecipeTrainer(wanted, start)


def _start(
    recipe: "RecipeLike", overrides: list[str], run: str | None, *, resume: bool, progress: bool, background: bool
) -> "Run | BackgroundRun":
    set_up()
    wanted = read_recipe(recipe, overrides)
    if background:
        from perceiver.api.background import start

        return start(wanted, run, resume=resume)
    return _finished(_launch(wanted, _command(recipe, overrides), run, resume, progress))


def _launch(recipe: "Recipe", command: str | None, run: str | None, resume: bool, progress: bool) -> "RunEnd":
    from cluster.record.run_folder import choose_run
    from cluster.run.launch import launch_training

    folder = choose_run(recipe.output, recipe.name, resume, run)
    typed = command or shlex.join(["perceiver", "train", folder.location("recipe.yaml")])
    show = "progress" if progress else "nothing"
    return launch_training(recipe, command=typed, resume=resume, run=folder.name, show=show)


def _command(recipe: "RecipeLike", overrides: list[str]) -> str | None:
    """Return the command of the shell for a recipe, None for one that is no file."""
    if isinstance(recipe, str | os.PathLike):
        return shlex.join(["perceiver", "train", os.fspath(recipe), *overrides])
    return None


def _finished(end: "RunEnd") -> Run:
    """Return the run, or raise what stopped it."""
    run = Run(end.folder.url)
    if end.status == "stopped":
        raise KeyboardInterrupt(f"{run.folder} was stopped: perceiver.resume({run.folder!r}) continues it")
    if end.status == "refused":
        raise UserError(end.error)
    if end.code:
        raise RunError(f"{run.folder}: {end.error}; logs in {end.folder.local / 'logs'}", run)
    return run
