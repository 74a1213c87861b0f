"""The driver of a table: its rows are the trials of a search, and their results the table."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.recipe.branches import branch_of, other_inputs
from cluster.recipe.file import apply_override, read_tree
from perceiver.accounting import account, count_input_positions
from perceiver.config import UserError
from perceiver.tasks import output_count
from perceiver.tracking.printable import say, say_json
from tune.config import Search, build_search
from tune.report.numbers import workers
from tune.search.checks import Checker
from tune.search.conclude import finish_run, machine, say_ending, settle
from tune.search.dry_run import estimate, say_estimate, say_resources
from tune.search.launch import find_slots, run_search, set_environment
from tune.search.state import SearchLaunch, SearchPlan, SearchStart
from tune.search_file import RECIPE_KEYS, flat, head_key, recipe_path
from tune.space.space import Values, with_values
from tune.tables.config import PaperTable, Row, Scale, ScaleName, load_table
from tune.tables.outputs import NOT_RUN, TableReport, aligned, cells, head, markdown, write_json, write_page
from tune.tables.results import Cost, judge, results

log = logging.getLogger(__name__)

SEARCH_KEYS = ("concurrency", "max_failures")
FILES = ("table.md", "table.html", "table.json", "trials.json", "search.yaml")


@dataclass(frozen=True)
class TableRun:
    """A table at one scale, with the number of seeds.

    Attributes:
        table: the table.
        scale: name of the scale.
        seeds: their number; each row is trained with seeds 0, 1, ...
        theirs: recipe keys that the user sets for all rows, dotted.
    """

    table: PaperTable
    scale: ScaleName
    seeds: int
    theirs: Mapping[str, Any]

    @property
    def common(self) -> Scale:
        """Return the settings that all rows share."""
        return self.table.config.scale(self.scale)

    @property
    def run(self) -> list[Row]:
        """Return the rows that are trained."""
        return self.table.config.run_rows(self.scale)

    def values(self, row: Row, seed: int = 0) -> Values:
        """Return a trial's values: its seed, and the row's changes except keys that the user sets for all rows."""
        changes = self.table.config.changes(row, self.scale) or {}
        return {key: value for key, value in changes.items() if key not in self.theirs} | {"seed": seed}

    def trials(self) -> list[tuple[Row, int]]:
        """Return row and seed of each trial: all rows with one seed, then all with the next."""
        return [(row, seed) for seed in range(self.seeds) for row in self.run]

    def origins(self) -> dict[int, dict[str, int]]:
        """Return the numbers of the trials that parts of a trial's model start from, by the trial's number."""
        numbers = {(row.name, seed): number for number, (row, seed) in enumerate(self.trials())}
        return {
            numbers[row.name, seed]: {part: numbers[origin, seed] for part, origin in row.start.items()}
            for row, seed in self.trials()
            if row.start
        }


def reproduce(
    name: str,
    overrides: Sequence[str] = (),
    *,
    scale: ScaleName = "small",
    seeds: int | None = None,
    resume: bool = False,
    run: str | None = None,
    as_json: bool = False,
    dry_run: bool = False,
) -> int:
    """Train the rows of a table and compare them with the paper; return the exit code (0, 1, 130 stopped).

    Args:
        name: of the table, or its file.
        overrides: ``key=value`` for the recipes of all rows; ``concurrency`` and ``max_failures`` as in a search.
        scale: small data from Python packages, or the papers' data.
        seeds: number of seeds of each row; default: the table's.
        resume: continue the newest start of this table and scale, or ``run``.
        run: name of the output folder.
        as_json: print the outcome as one JSON line at the end.
        dry_run: print rows and resources, and end.

    Raises:
        UserError: no such table, a mistake in it or in the overrides, missing data, too few resources.
    """
    rows, search_keys, base, where = read_rows(load_table(name), scale, seeds, overrides)
    set_environment()
    search = build_rows(rows, search_keys, base, where)
    checker = Checker(search)
    costs = check_rows(checker, rows)
    trials = rows.trials()
    known = [rows.values(row, seed) for row, seed in trials]
    slots = find_slots(search, known)
    if dry_run:
        _say_plan(rows, SearchPlan(search, checker, slots, known), costs)
        return 0
    labels = tuple(f"{row.name}, seed {seed}" for row, seed in trials)
    resolved = {row.name: rows.values(row) | ({"start": row.start} if row.start else {}) for row in rows.run}
    plan = SearchPlan(search, checker, slots, known, labels, resolved, rows.origins())
    options = ["--scale", scale, *(["--seeds", str(seeds)] if seeds else [])]
    command = shlex.join(["perceiver", "reproduce", name, *options, *overrides])
    start = SearchStart(command, resume, run, as_json, "raise --seeds to continue")
    return run_search(plan, start, lambda launch, outcome: _conclude(launch, outcome, rows, costs))


def read_rows(
    table: PaperTable, scale: ScaleName, seeds: int | None, overrides: Sequence[str]
) -> tuple[TableRun, dict[str, Any], dict[str, Any], str]:
    """Return the rows, the user's keys of the search, the base recipe's tree, and its file."""
    common, trees = table.config.scale(scale), {True: {}, False: {}}
    for override in overrides:
        head = head_key(override)
        if head == "seed":
            raise UserError(f"override {override!r}: each row is trained with seeds 0, 1, ...: set --seeds instead")
        if head not in (*RECIPE_KEYS, *SEARCH_KEYS):
            raise UserError(
                f"override {override!r}: unknown key {head}; wanted a key of the recipes ({', '.join(RECIPE_KEYS)}), "
                f"{' or '.join(SEARCH_KEYS)}"
            )
        apply_override(trees[head in SEARCH_KEYS], override)
    theirs = flat(trees[False])
    where = recipe_path(common.recipe, table.path)
    base = with_values(read_tree(where), flat(common.overrides) | theirs)
    return TableRun(table, scale, seeds or common.seeds, theirs), trees[True], base, where


def build_rows(rows: TableRun, search_keys: Mapping[str, Any], base: Mapping[str, Any], where: str) -> Search:
    """Return the search whose trials the rows are: a grid without a scheduler."""
    tree = {
        **search_keys,
        "name": f"{rows.table.config.name}-{rows.scale}",
        "recipe": where,
        "overrides": rows.common.overrides,
        "space": {"seed": {"kind": "grid", "values": list(range(rows.seeds))}},
        "search": {"kind": "grid"},
        "metric": rows.common.metric,
        "mode": rows.common.mode,
        "trials": len(rows.trials()),
    }
    return build_search(tree, base, where, rows.table.path)


def check_rows(checker: Checker, rows: TableRun) -> dict[str, Cost]:
    """Check each row's recipe on its data; return what the models cost, by the rows' names."""
    search, costs = checker.search, {}
    models: dict[str, Any] = {}
    if row := next((row for row in rows.run if row.start and "train.init_from" in rows.theirs), None):
        origins = ", ".join(row.start.values())
        raise UserError(f"override train.init_from: row {row.name} starts from the rows {origins}: remove it")
    _check_data(checker, rows)
    for row in rows.run:
        try:
            recipe, model = checker.recipe(rows.values(row))
            models[row.name] = recipe.model
            _check_start(rows, row, models)
            classes = output_count(recipe.task, len(model.manifest.classes)) or None
            found = account(recipe.model, classes=classes)
            field = count_input_positions(recipe.model, classes=classes) if rows.table.config.input_rf else None
        except UserError as error:
            reason = str(error).removeprefix(f"{search.source}: ")
            raise UserError(f"{rows.table.path}: row {row.name}: {reason}") from None
        if recipe.cluster != search.recipe.cluster:
            raise UserError(
                f"{rows.table.path}: row {row.name} changes cluster, which all rows share: set it for all rows"
            )
        costs[row.name] = Cost(found.parameters, found.forward_flops, field)
    return costs


def _check_start(rows: TableRun, row: Row, models: Mapping[str, Any]) -> None:
    """Refuse a row that starts from one that is not run, or whose model has other inputs than the branch."""
    for part, origin in row.start.items():
        if origin not in models:
            raise UserError(f"start.{part} is row {origin}, which is not run at this scale: wanted one that is")
        branch = branch_of(models[row.name], part)
        if branch is not None and (found := other_inputs(branch, models[origin])):
            key, ours, theirs = found
            raise UserError(
                f"start.{part} is row {origin} with {key} = {theirs}, model.{part} has {ours}: set the same"
            )


def _check_data(checker: Checker, rows: TableRun) -> None:
    """Refuse missing data with the command that prepares it."""
    data = checker.search.recipe.data
    try:
        checker.manifest(data.url, data.storage_options)
    except UserError as error:
        reason = str(error).split(": make it with")[0]
        fix = "make it with" if rows.scale == "small" else "set data.url=URL to your data, prepared with"
        raise UserError(f"{reason}: {fix} `{rows.common.prepare}`") from None


def _say_plan(rows: TableRun, plan: SearchPlan, costs: Mapping[str, Cost]) -> None:
    config = rows.table.config
    say(f"{config.title} ({config.source}), {rows.scale} scale: {rows.common.data}")
    say_resources(plan.search, plan.slots)
    steps = {row.name: plan.checker.total_steps(rows.values(row))[0] for row in rows.run}
    samples = plan.search.recipe.train.global_batch * sum(steps.values()) / len(steps)
    say(say_estimate(estimate(plan.search, plan.slots, samples, plan.total)))
    seeds = f"{rows.seeds} seed{'s' * (rows.seeds > 1)}"
    say(f"{plan.total} trials: {len(rows.run)} rows with {seeds} each")
    lines = [head(config), *(cells(result, config) for result in results(config, rows.scale, [], costs))]
    told = ["steps", *(f"{steps[row.name]:,}" if row.name in steps else NOT_RUN for row in config.rows)]
    planned = [(*line[:2], told[i], *line[4:-1]) for i, line in enumerate(lines)]
    for line in aligned(planned[0], planned[1:]):
        say(line)


def _conclude(launch: SearchLaunch, outcome: dict[str, Any], rows: TableRun, costs: Mapping[str, Cost]) -> int:
    """Write the table and the last MLflow entries; print how to continue; return the exit code."""
    record, folder, say = launch.record, launch.folder, launch.console.say
    status = settle(launch, outcome)
    config = rows.table.config
    found = results(config, rows.scale, record.trials, costs)
    judged = judge(config, found, rows.common.mode)
    where = machine_words(launch)
    report = TableReport(config, rows.scale, found, judged, launch.start.command, where, record.seconds, status)
    folder.write("table.md", markdown(report))
    folder.write("table.html", write_page(report))
    folder.write("table.json", write_json(report))
    finish_run(launch, status, FILES)
    if any(result.scores for result in found):
        say("")
        for line in aligned(head(config), [cells(result, config) for result in found]):
            say(line)
        for one in judged:
            say(f"{one.verdict}: {one.claim.text} ({one.reason})")
    say(f"table       {folder.location('table.html')} (.md, .json)")
    if launch.start.as_json:
        say_json({"status": status, "table": folder.location("table.json"), "error": outcome.get("error")})
    return say_ending(launch, status, outcome)


def machine_words(launch: SearchLaunch) -> str:
    """Return the machine or cluster and the number of concurrent trials, on which wall times depend."""
    cluster, slots = launch.search.recipe.cluster, launch.slots
    where = machine()
    if cluster.resolved_address():
        where = f"a cluster of {slots.share.cpus * slots.concurrency:g} CPUs"
    gpus = cluster.workers * cluster.gpus_per_worker
    each = f"{workers(launch.search.recipe)}" + (f" and {gpus:g} GPUs" if gpus else "")
    return f"{where}; {slots.concurrency} trials at a time, {each} each"
