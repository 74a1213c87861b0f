"""`perceiver jobs`: the jobs of a cluster."""

import click

from perceiver.cli._access import access_options, reach
from perceiver.tracking.printable import say_all, say_json


@click.command(epilog="Example: perceiver jobs --live")
@access_options
@click.option("--live", is_flag=True, help="List only jobs that have not ended.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per job.")
def command(address: str | None, headers: str | None, verify: str, live: bool, as_json: bool) -> int:
    """List the jobs of a cluster.

    Oldest first, with run, recipe and state.
    """
    from cluster.jobs.commands import list_jobs, table

    found = [job for job in list_jobs(reach(address, headers, verify)) if job.live or not live]
    if as_json:
        for job in found:
            say_json(job.facts())
    else:
        say_all(table(found))
    return 0
