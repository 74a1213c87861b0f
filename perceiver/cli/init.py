"""`perceiver init`: a recipe to start from, in the current folder."""

from pathlib import Path

import click

from perceiver.tracking.printable import say

QUICKSTART = "quickstart.yaml"


@click.command(
    epilog="""\b
Example:
  perceiver init --quickstart && perceiver train quickstart.yaml"""
)
@click.option("--quickstart", is_flag=True, help="Write quickstart.yaml, and prepare its data in data/digits.")
def command(quickstart: bool) -> int:
    """Write a recipe into the current folder, for editors with the JSON schema of its keys.

    A recipe that is there already is not changed; prepared data are kept.
    """
    from perceiver.config import UserError

    if not quickstart:
        raise UserError("init: nothing to write: give --quickstart")
    write_quickstart(Path(QUICKSTART))
    say(f"{QUICKSTART}: train it with perceiver train {QUICKSTART}; perceiver keys lists its keys")
    return 0


def write_quickstart(target: Path) -> None:
    """Write the quickstart's recipe and its schema next to each other, and prepare its data.

    Raises:
        UserError: the recipe exists, or the data cannot be downloaded.
    """
    import json

    from cluster.recipe.file import packaged_file, read_tree
    from cluster.recipe.keys import recipe_schema
    from perceiver.config import UserError
    from pipelines.prepare import prepare
    from pipelines.shards.manifest import MANIFEST

    if target.exists():
        raise UserError(f"{target} exists: move it, or train it with perceiver train {target}")
    source = packaged_file(f"train/{QUICKSTART}")
    url = read_tree(source)["data"]["url"]
    if not Path(url, MANIFEST).exists():
        prepare("digits", None, url, note=lambda line: say(f"  {line}"))
    schema = target.with_suffix(".schema.json")
    schema.write_text(json.dumps(recipe_schema(), indent=1) + "\n", encoding="utf-8")
    header = f"# yaml-language-server: $schema={schema.name}\n"
    target.write_text(header + source.read_text(encoding="utf-8"), encoding="utf-8")
