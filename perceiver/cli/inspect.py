"""``perceiver inspect``: what a prepared folder holds, and whether it is sound."""

import click


@click.command(
    epilog="""\b
Examples:
  perceiver inspect data/digits
  perceiver inspect s3://bucket/photos --verify --json"""
)
@click.argument("url")
@click.option("--verify", is_flag=True, help="Read every file and compare checksums, rows and schema.")
@click.option("--samples/--no-samples", default=True, help="Decode every sample: balance, doubles, unreadables.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON line.")
def command(url: str, verify: bool, samples: bool, as_json: bool) -> int:
    """Report on the prepared data at URL: schema, counts, class balance, sizes, doubles, unreadable samples.

    Exit code 1 if something is wrong with it.
    """
    from pipelines.inspect import describe, inspect

    found = inspect(url, verify=verify, samples=samples)
    click.echo(found.model_dump_json() if as_json else "\n".join(describe(found)))
    return 0 if found.sound else 1
