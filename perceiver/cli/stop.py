"""`perceiver stop`: stop a job so that its run can be resumed."""

import click

from perceiver.cli._access import access_options, reach
from perceiver.tracking.printable import say, say_all, say_json


@click.command(epilog="Example: perceiver stop quickstart-1")
@click.argument("job")
@access_options
@click.option("--json", "as_json", is_flag=True, help="Print the job as one JSON line.")
def command(job: str, address: str | None, headers: str | None, verify: str, as_json: bool) -> int:
    """Stop a job after it has saved a checkpoint.

    JOB is the name of a job, or that of a run, which stands for its newest job. Exit code 0 if the checkpoint was
    saved, 1 if the job was killed before that (the run resumes from the previous checkpoint).
    """
    from cluster.jobs.commands import find_job, stop
    from perceiver.config import UserError

    server = reach(address, headers, verify)
    found = find_job(server, job)
    if not found.live:
        raise UserError(f"{found.name} has ended ({found.status}): there is nothing to stop")
    ended, lines = stop(server, found)
    told = any(line.startswith("stopped ") and " saved" in line for line in lines)
    saved = told or found.status == "PENDING" or ended.status == "SUCCEEDED"
    if as_json:
        say_json({**ended.facts(), "saved": saved, "lines": lines})
    else:
        say_all(lines)
        say(f"job {ended.name} {ended.status}" + ("" if saved else " before it had saved a checkpoint"))
        if found.recipe:
            run = f" --run {found.run}" if found.run else ""
            say(f"continue with: perceiver submit {found.recipe}{run}")
    return 0 if saved else 1
