"""`perceiver logs`: the log of a job."""

import click

from perceiver.cli._access import access_options, reach
from perceiver.tracking.printable import say, say_json, say_log


@click.command(epilog="Example: perceiver logs -f quickstart-1")
@click.argument("job")
@click.option(
    "-f", "--follow", "follow_it", is_flag=True, help="Keep printing until the job ends, and exit with its code."
)
@access_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line with the job and its log.")
def command(job: str, follow_it: bool, address: str | None, headers: str | None, verify: str, as_json: bool) -> int:
    """Print the log of a job.

    JOB is the name of a job, or that of a run, which stands for its newest job.
    """
    from cluster.jobs.commands import find_job, follow, logs

    server = reach(address, headers, verify)
    found = find_job(server, job)
    if as_json:
        if follow_it:
            found = follow(server, found, lambda text: None)
        say_json({**found.facts(), "log": logs(server, found)})
    elif follow_it:
        try:
            found = follow(server, found, say_log)
        except KeyboardInterrupt:
            say()
            say(f"the job keeps running; stop it with perceiver stop {found.name}")
            return 130
    else:
        say_log(logs(server, found))
    return found.code() if follow_it else 0
