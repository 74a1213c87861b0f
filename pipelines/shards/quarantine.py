"""The quarantine: samples that could not be used, by key and reason, counted against a budget."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder

QUARANTINE = "quarantine.parquet"
SCHEMA = pa.schema([("split", pa.string()), ("sample_id", pa.int64()), ("key", pa.string()), ("reason", pa.string())])
REASONS = 8
"""Number of reasons in a message."""


class Problem(NamedTuple):
    """A sample that could not be used; its id is -1 if `prepare` left it out."""

    split: str
    sample_id: int
    key: str
    reason: str


class Quarantine:
    """The bad samples of one rank.

    Args:
        max_fraction: share of bad samples above which `add` raises; see `data.max_bad_fraction`.
    """

    def __init__(self, max_fraction: float = 1.0) -> None:
        self.max_fraction = max_fraction
        self.problems: dict[tuple[str, int], Problem] = {}
        self.met = 0
        self.seen = 0

    def add(self, problems: list[Problem], *, met: int, seen: int, epoch_share: int) -> None:
        """Count a batch.

        Args:
            problems: those of the batch, also of bad samples that were met while looking for a replacement.
            met: rows of the batch whose own sample was bad.
            seen: rows of the batch.
            epoch_share: this rank's samples of an epoch; the budget is a share of at least so many.

        Raises:
            UserError: the budget is exceeded; the message counts the reasons.
        """
        self.seen += seen
        self.met += met
        self.problems.update({(problem.split, problem.sample_id): problem for problem in problems})
        if problems and self.met > math.ceil(self.max_fraction * max(self.seen, epoch_share)):
            raise UserError(
                f"{self.met} bad samples in {self.seen} read, more than data.max_bad_fraction"
                f" = {self.max_fraction:g} allows: {self.summary()}; repair the data or raise the budget"
            )

    def summary(self) -> str:
        """Return the reasons with their counts, commonest first, and an example."""
        return count_reasons(self.problems.values())

    def write(self, url: str, name: str = QUARANTINE) -> None:
        """Write the samples as a Parquet table (split, sample_id, key, reason) into a folder."""
        write_problems(open_folder(url), sorted(self.problems.values()), name)


def write_problems(folder: Folder, problems: Sequence[Problem], name: str = QUARANTINE) -> None:
    """Write problems as a Parquet table (split, sample_id, key, reason)."""
    table = pa.table({field: [getattr(problem, field) for problem in problems] for field in SCHEMA.names}, SCHEMA)
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream)
    folder.write(name, stream.getvalue().to_pybytes())


def count_reasons(problems: Collection[Problem]) -> str:
    """Return the reasons with their counts, commonest first, and an example."""
    counts = Counter(problem.reason for problem in problems)
    reasons = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common(REASONS))
    return f"{reasons} (for example {next(iter(problems)).key})" if counts else "none"
