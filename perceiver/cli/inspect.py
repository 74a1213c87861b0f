"""`perceiver inspect`: a report on prepared data."""

from pathlib import Path

import click

from perceiver.cli._types import LocalPath
from perceiver.tracking.printable import say, say_all, say_json


@click.command(
    epilog="""\b
Examples:
  perceiver inspect data/digits
  perceiver inspect data/digits --html digits.html
  perceiver inspect s3://bucket/photos --verify --json"""
)
@click.argument("url")
@click.option("--verify", is_flag=True, help="Read every file and compare checksums, rows and schema.")
@click.option(
    "--samples/--no-samples", default=True, help="Decode every sample: class balance, duplicates, unreadable samples."
)
@click.option("--files", multiple=True, metavar="URL", help="Folder in another store that an index may name files of.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON line.")
@click.option(
    "--html",
    "page",
    type=LocalPath(),
    metavar="PAGE",
    help="Write an HTML page with samples to look at and listen to; one file.",
)
@click.option(
    "--show", default=24, show_default=True, type=click.IntRange(1, 1000), help="Samples per split on that page."
)
def command(
    url: str, verify: bool, samples: bool, files: tuple[str, ...], as_json: bool, page: Path | None, show: int
) -> int:
    """Report on prepared data.

    Prints the schema, counts, class balance, sizes, duplicates and unreadable samples of the data at URL. Exit code 1
    if a problem was found.
    """
    from pipelines.inspect.inspection import describe, inspect

    found = inspect(url, verify=verify, samples=samples, files=files)
    if as_json:
        say_json(found.model_dump(mode="json"))
    else:
        say_all(describe(found))
    if page is not None:
        from pipelines.inspect.page import write_page

        write_page(found, page, samples=show)
        say(f"page {page}", err=as_json)
    return 0 if found.sound else 1
