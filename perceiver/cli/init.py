"""`perceiver init`: a recipe to start from, in the current folder."""

from pathlib import Path

import click

from perceiver.cli._types import LocalPath, Number
from perceiver.tracking.printable import say, say_all

QUICKSTART = "quickstart.yaml"
LONGEST = 100_000
"""Minutes, 69 days."""


@click.command(
    epilog="""\b
Examples:
  perceiver init --quickstart && perceiver train quickstart.yaml
  perceiver init data/digits --minutes 5 && perceiver train digits.yaml"""
)
@click.argument("data", required=False)
@click.option("-o", "--to", "target", type=LocalPath(), help="The recipe; default: the data's folder's name .yaml.")
@click.option("--minutes", type=Number(0.1, LONGEST), default=10, show_default=True, help="Time to train, about.")
@click.option(
    "--workers", type=click.IntRange(1, 100_000), help="Workers; default: this machine's GPUs, else its cores up to 4."
)
@click.option("--quickstart", is_flag=True, help="Write quickstart.yaml, and prepare its data in data/digits.")
def command(data: str | None, target: Path | None, minutes: float, workers: int | None, quickstart: bool) -> int:
    """Write a recipe into the current folder, for editors with the JSON schema of its keys.

    DATA is a folder that `perceiver prepare` wrote. Features, splits, sizes and statistics decide input and task; the
    model is that of the nearest recipe that comes with the package; a few steps of it are timed here, so that training
    takes about --minutes. A recipe that is there already is not changed, nor another schema; prepared data are kept.
    """
    from perceiver.config import UserError

    if quickstart == bool(data):
        raise UserError("init: give prepared data, such as perceiver init data/digits, or --quickstart")
    if quickstart:
        write_quickstart(target or Path(QUICKSTART))
        name = target or QUICKSTART
        say(f"{name}: train it with perceiver train {name}; perceiver keys lists its keys")
    else:
        say_all(write_for_data(str(data), target, minutes, workers))
    return 0


def write_for_data(url: str, target: Path | None, minutes: float, workers: int | None) -> list[str]:
    """Write a recipe for prepared data and its schema next to each other; return what it will do, in three lines.

    Raises:
        UserError: a file exists, there are no such data, no task or input fits their features, or they do not fit on
            this machine with as many workers.
    """
    from cluster.draft.length import fit_length, step_seconds
    from cluster.draft.recipe import draft_recipe, recipe_name, this_machine, training_split
    from cluster.draft.text import describe_length, recipe_text
    from cluster.recipe.config import build_recipe
    from cluster.recipe.preflight import check_machine, check_memory, check_recipe
    from perceiver.yaml_reader import parse_yaml
    from pipelines.inspect.sizes import sample_sizes
    from pipelines.shards.manifest import load_manifest

    manifest = load_manifest(url)
    target = target or Path(f"{recipe_name(url, manifest)}.yaml")
    check_new(target)
    machine = this_machine()
    draft = draft_recipe(url, manifest, sample_sizes(url, manifest, training_split(manifest)), machine, workers)
    checked = check_recipe(build_recipe(draft.tree, source=f"recipe for {url}"))
    if checked.recipe.cluster.resolved_address() is None:
        check_machine(checked.recipe)
        check_memory(checked.recipe, checked)
    seconds = step_seconds(checked)
    data, train = checked.recipe.data, checked.recipe.train
    samples, held_out = (manifest.split(name).samples for name in (data.train_split, data.eval_split))
    length = fit_length(samples, held_out, train.global_batch, seconds, minutes)
    text = recipe_text(draft.with_length(length.train, length.steps), checked, length, machine, seconds, str(target))
    check_recipe(build_recipe(parse_yaml(text.encode(), str(target)), source=str(target)))
    write_recipe(target, text)
    return [
        f"model   {draft.tree['model']['kind']} of {checked.parameters:,} parameters, from {draft.part.facts}",
        f"task    {draft.goal.facts}; {describe_length(length)}",
        f"train   perceiver train {target}",
    ]


def check_new(target: Path) -> None:
    """Refuse a recipe that exists, or whose schema would replace another file; the same schema is kept.

    Raises:
        UserError: the recipe exists, or a file with the schema's name and another content.
    """
    from perceiver.config import UserError
    from perceiver.storage import refusing

    schema = schema_file(target)
    if target.exists():
        raise UserError(f"{target} exists: move it, or train it with perceiver train {target}")
    with refusing(str(schema), "move it, or name another recipe with -o"):
        if schema.exists() and schema.read_bytes() != schema_text().encode():
            raise UserError(
                f"{schema} exists and differs from the schema of a recipe: move it, or name another recipe with -o"
            )


def schema_file(target: Path) -> Path:
    """Return the file of a recipe's schema."""
    return target.with_suffix(".schema.json")


def schema_text() -> str:
    """Return the JSON schema of a recipe, indented."""
    import json

    from cluster.recipe.keys import recipe_schema

    return json.dumps(recipe_schema(), indent=1) + "\n"


def write_recipe(target: Path, text: str) -> None:
    """Write a recipe, with a header by which editors find its JSON schema, and the schema next to it.

    Raises:
        UserError: the recipe or another schema exists, or the folder cannot be written to.
    """
    from perceiver.storage import refusing, write_whole

    check_new(target)
    schema = schema_file(target)
    with refusing(str(target), "give a file in a folder that exists, with -o"):
        write_whole(schema, schema_text())
        with target.open("x", encoding="utf-8") as file:
            file.write(f"# yaml-language-server: $schema={schema.name}\n{text}")


def write_quickstart(target: Path) -> None:
    """Write the quickstart's recipe and its schema next to each other, and prepare its data.

    Raises:
        UserError: the recipe or another schema exists, or the data cannot be downloaded.
    """
    from cluster.recipe.file import packaged_file, read_tree
    from pipelines.prepare import prepare
    from pipelines.shards.manifest import MANIFEST

    check_new(target)
    source = packaged_file(f"train/{QUICKSTART}")
    url = read_tree(source)["data"]["url"]
    if not Path(url, MANIFEST).exists():
        prepare("digits", None, url, note=lambda line: say(f"  {line}"))
    write_recipe(target, source.read_text(encoding="utf-8"))
