"""The options by which the job verbs reach a cluster, under the names that Ray's own commands use."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cluster.jobs.server import JobServer


def access_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--address``, ``--headers`` and ``--verify`` to a command."""
    for option in reversed(
        [
            click.option(
                "--address",
                metavar="URL",
                help="The cluster's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the "
                "local cluster.",
            ),
            click.option("--headers", metavar="JSON", help="HTTP headers for a proxy; default: RAY_JOB_HEADERS."),
            click.option(
                "--verify",
                default="true",
                show_default=True,
                metavar="FLAG|FILE",
                help="Check TLS certificates, or against those in FILE.",
            ),
        ]
    ):
        function = option(function)
    return function


def reach(address: str | None, headers: str | None, verify: str) -> "JobServer":
    """Connect to the cluster that the options mean.

    Raises:
        UserError: there is none, or it does not let us in.
    """
    from cluster.jobs.server import Access, connect

    return connect(Access(address, headers, verify))
