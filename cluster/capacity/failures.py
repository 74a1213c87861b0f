"""How often jobs fail: rates that were published, and a user's own."""

import math
from dataclasses import dataclass

from perceiver.config import UserError

HOURS_DAY, RSC_NODE_DEVICES = 24, 8
MOST_HOURS = 1e12


@dataclass(frozen=True)
class FailureRate:
    """A rate of failures that end a job.

    Attributes:
        name: name of the source, or ``given``.
        device_hours: mean device hours between two failures.
        basis: where the figure is from, in one line.
    """

    name: str
    device_hours: float
    basis: str


def _node_days(failures: float) -> float:
    """Return the device hours per failure for a number of failures per thousand node-days."""
    return RSC_NODE_DEVICES * HOURS_DAY * 1000 / failures


KOKOLIS = "Kokolis et al., arXiv 2410.21680"
SOURCES = {
    rate.name: rate
    for rate in (
        FailureRate(
            "llama3",
            54 * HOURS_DAY * 16_384 / 419,
            "419 unexpected interruptions in 54 days on 16,384 H100: The Llama 3 Herd of Models, arXiv 2407.21783, "
            "section 3.3.4",
        ),
        FailureRate(
            "rsc1", _node_days(6.50), f"6.50 failures per thousand node-days of 8 A100, Meta's RSC-1: {KOKOLIS}"
        ),
        FailureRate(
            "rsc2", _node_days(2.34), f"2.34 failures per thousand node-days of 8 A100, Meta's RSC-2: {KOKOLIS}"
        ),
        FailureRate("rsc1024", 7.9 * 1024, f"7.9 h between failures of jobs on 1,024 A100, Meta's clusters: {KOKOLIS}"),
    )
}
"""The published rates. That of whole jobs, rsc1024, is higher than the one of nodes, rsc1, gives for 128 nodes (28.8 h
between failures): it includes what the rate of nodes leaves out."""
DEFAULT = "llama3"


def failure_rate(wanted: str) -> FailureRate:
    """Return a published rate by its name, or one's own.

    Args:
        wanted: a key of `SOURCES`, or device hours per failure.

    Raises:
        UserError: it is neither.
    """
    if wanted in SOURCES:
        return SOURCES[wanted]
    try:
        hours = float(wanted.replace(",", ""))
    except ValueError:
        hours = math.nan
    if not 1 <= hours <= MOST_HOURS:
        raise UserError(
            f"--failures {wanted}: wanted one of {', '.join(SOURCES)}, or the device hours per failure of your own "
            f"cluster, from 1 to {MOST_HOURS:g}: 54 days on 16,384 devices with 419 failures are 50700"
        )
    return FailureRate("given", hours, "given by --failures")
