"""`perceiver status`: the state of a job."""

import click

from perceiver.cli._access import access_options, reach
from perceiver.tracking.printable import say_all, say_json


@click.command(epilog="Example: perceiver status quickstart-1 --json")
@click.argument("job")
@access_options
@click.option("--json", "as_json", is_flag=True, help="Print the job as one JSON line.")
def command(job: str, address: str | None, headers: str | None, verify: str, as_json: bool) -> int:
    """Print the state of a job and the last line of its log.

    JOB is the name of a job, or that of a run, which stands for its newest job.
    Exit code: 0 while it runs or after it has succeeded, 1 or 2 if it failed, 130 if it was stopped.
    """
    from cluster.jobs.commands import find_job, logs, table

    server = reach(address, headers, verify)
    found = find_job(server, job)
    if as_json:
        say_json(found.facts())
    else:
        say_all(table([found]))
        last = [line for line in logs(server, found).splitlines() if line.strip()][-1:]
        say_all(last or [found.message or ""])
    return 0 if found.live else found.code()
