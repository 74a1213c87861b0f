"""``perceiver stop``: end a job so that it can go on."""

import json

import click

from perceiver.cli._access import access_options, reach


@click.command(epilog="Example: perceiver stop quickstart-1")
@click.argument("job")
@access_options
@click.option("--json", "as_json", is_flag=True, help="Print the job as one JSON line.")
def command(job: str, address: str | None, headers: str | None, verify: str, as_json: bool) -> int:
    """Stop JOB (or the newest job of a run) and wait until it has saved its checkpoint.

    Exit code 0 if it ended in good order, 1 if it was killed before it had saved (the checkpoint before that counts).
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
        click.echo(json.dumps({**ended.facts(), "saved": saved, "lines": lines}))
    else:
        click.echo("\n".join(lines))
        click.echo(f"job {ended.name} {ended.status}" + ("" if saved else " before it had saved a checkpoint"))
        if found.recipe:
            run = f" --run {found.run}" if found.run else ""
            click.echo(f"go on with: perceiver submit {found.recipe}{run}")
    return 0 if saved else 1
