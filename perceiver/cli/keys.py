"""`perceiver keys`: all keys of a recipe."""

import click

from perceiver.tracking.printable import say, say_json


@click.command(
    epilog="""\b
Examples:
  perceiver keys optim
  perceiver keys model.inputs --json"""
)
@click.argument("section", default="")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per key.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the page docs/keys.md.")
def command(section: str, as_json: bool, as_markdown: bool) -> int:
    """List the keys of a recipe.

    Prints type, default and meaning of each key, or of those below SECTION (such as `optim` or `model.inputs`). `*`
    stands for any name or number. A section with several kinds has the keys of its kind, which are named in brackets.
    """
    from dataclasses import asdict

    from cluster.recipe.keys import markdown, recipe_keys
    from perceiver.config import UserError

    if as_markdown:
        click.echo(markdown(), nl=False)
        return 0
    keys = recipe_keys(section)
    if not keys:
        sections = dict.fromkeys(key.name.split(".")[0] for key in recipe_keys())
        raise UserError(f"keys: no section or key {section!r}; the sections are {', '.join(sections)}")
    for key in keys:
        if as_json:
            say_json(asdict(key))
            continue
        where = f"  [{' '.join(key.where)}]" if key.where else ""
        default = f", default {key.default}" if key.default else ""
        say(f"{key.name}  ({key.type}{default}){where}")
        if key.description:
            say(f"    {key.description}")
    return 0
