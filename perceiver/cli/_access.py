"""Options of the job commands for the connection to a cluster, named as in Ray's own commands."""

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
                help="Dashboard of the cluster, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the "
                "local cluster.",
            ),
            click.option("--headers", metavar="JSON", help="HTTP headers for a proxy; default: RAY_JOB_HEADERS."),
            click.option(
                "--verify",
                default="true",
                show_default=True,
                metavar="FLAG|FILE",
                help="Whether to verify TLS certificates, or a FILE of certificates to verify against.",
            ),
        ]
    ):
        function = option(function)
    return function


def reach(address: str | None, headers: str | None, verify: str) -> "JobServer":
    """Connect to the cluster that the options name.

    Raises:
        UserError: the cluster does not answer or refuses access.
    """
    from cluster.jobs.server import Access, connect

    return connect(Access(address, headers, verify))
