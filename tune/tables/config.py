"""The table file: rows as recipes at two scales, the papers' results, and their claims."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from cluster.recipe.file import explain, packaged, read_tree
from perceiver.config import Config, Name, Shift, UserError
from perceiver.train.config import PartName
from tune.config import Mode
from tune.search_file import flat
from tune.space.space import Values

ScaleName = Literal["small", "full"]
FOLDER = "recipes/papers"


class Scale(Config):
    """What all rows of a table share at one scale."""

    recipe: str = Field(description="the base recipe: a path from here, or from the table's folder")
    data: str = Field(description="description of the data")
    prepare: str = Field(description="the command that prepares the data")
    overrides: dict[str, Any] = Field(default={}, description="keys of the base recipe to change, nested or dotted")
    metric: str = Field(default="accuracy", description="metric of the evaluations that is compared")
    mode: Mode = Field(default="max", description="whether larger or smaller is better")
    seeds: int = Field(default=1, ge=1, le=1000, description="number of seeds without --seeds")


class Row(Config):
    """A row: the paper's result, and the changed keys of the base recipe."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=100, description="name in claims")
    label: str = Field(description="name in the table")
    paper: Shift | None = Field(default=None, description="the paper's result")
    source: str = Field(default="", description="origin of the result, if not that of the table")
    full: dict[str, Any] | None = Field(default=None, description="keys to change with the papers' data; null: not run")
    small: dict[str, Any] | None = Field(default=None, description="keys to change on small data; null: not run")
    start: dict[PartName, str] = Field(
        default={}, description="rows whose runs with the same seed parts of the model start from, by the part's name"
    )
    note: str = Field(default="", description="a remark, or why it is not run")


class Claim(Config):
    """A claim of a paper about rows, to be compared with our results."""

    text: str = Field(description="the claim in words")
    better: str | None = Field(default=None, description="name of a row ...")
    than: str | None = Field(default=None, description="... that is better than this one")
    above: Shift | None = Field(default=None, description="... or than this number")
    by: Shift = Field(default=0, description="at least by this many points; negative: at most so many behind")
    same: tuple[str, str] | None = Field(default=None, description="names of two rows that differ only by chance")
    metric: str | None = Field(default=None, description="metric that is compared, if not that of the table")

    @model_validator(mode="after")
    def _one_kind(self) -> "Claim":
        against = (self.than is not None) + (self.above is not None)
        if against != (self.better is not None) or (self.same is None) == (self.better is None):
            raise ValueError("wanted either better with than or above, or same with two rows")
        return self

    @property
    def rows(self) -> tuple[str, ...]:
        """Return the names of the rows."""
        return self.same or tuple(name for name in (self.better, self.than) if name is not None)


class TableConfig(Config):
    """A table file."""

    name: Name = Field(description="prefix of the output folders")
    title: str = Field(description="the heading")
    source: str = Field(description="paper and table of the results")
    figure: str = Field(description="metric of the paper's results, with the unit")
    open: list[str] = Field(default=[], description="settings that the papers do not give, with ours")
    input_rf: bool = Field(
        default=False, description="whether to show how many inputs a unit after the first mixing layer depends on"
    )
    also: tuple[str, ...] = Field(default=(), description="more metrics of the evaluations that are shown")
    full: Scale = Field(description="with the user's own copy of the papers' data")
    small: Scale = Field(description="with data from Python packages, in minutes on two CPU cores")
    rows: list[Row] = Field(min_length=1, description="the rows, in the table's order")
    claims: list[Claim] = Field(default=[], description="the paper's claims")

    @model_validator(mode="after")
    def _known_rows(self) -> "TableConfig":
        names = [row.name for row in self.rows]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two rows have the name {twice[0]!r}: rename one")
        for claim in self.claims:
            if unknown := [name for name in claim.rows if name not in names]:
                raise ValueError(f"claim {claim.text!r}: no row {unknown[0]!r}{_near(unknown[0], names)}")
        for place, row in enumerate(self.rows):
            for part, origin in row.start.items():
                if origin not in names[:place]:
                    raise ValueError(f"row {row.name}: start.{part} is {origin!r}; wanted a row above it")
        return self

    def scale(self, name: ScaleName) -> Scale:
        """Return a scale."""
        return self.small if name == "small" else self.full

    def run_rows(self, scale: ScaleName) -> list[Row]:
        """Return the rows that are trained at a scale."""
        return [row for row in self.rows if self.changes(row, scale) is not None]

    def changes(self, row: Row, scale: ScaleName) -> Values | None:
        """Return the recipe keys that a row changes, dotted; None if it is not run."""
        keys = row.small if scale == "small" else row.full
        return None if keys is None else flat(keys)

    @property
    def others(self) -> tuple[str, ...]:
        """Return the metrics that are shown or compared besides that of the table."""
        return tuple(dict.fromkeys([*self.also, *(claim.metric for claim in self.claims if claim.metric)]))


@dataclass(frozen=True)
class PaperTable:
    """A table and its file."""

    config: TableConfig
    path: str


def load_table(name: str) -> PaperTable:
    """Read a table by its name, or by the path of a file, or raise `UserError`."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else tables().get(name)
    if path is None:
        known = list(tables())
        raise UserError(f"no table {name!r}{_near(name, known) or '; perceiver reproduce --list names them'}")
    tree = read_tree(path)
    try:
        return PaperTable(TableConfig.model_validate(tree), str(path))
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, TableConfig)}") from None


def tables() -> dict[str, Path]:
    """Return the tables by name: those of the current folder, else those of the installation."""
    return {path.stem: path for path in sorted(packaged(FOLDER).glob("*.yaml"))}


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""
