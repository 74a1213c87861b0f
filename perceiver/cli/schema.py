"""`perceiver schema`: the JSON schema of a recipe."""

import json

import click


@click.command(epilog="Example: perceiver schema > recipe.schema.json")
def command() -> int:
    """Print the JSON schema of a recipe.

    Editors complete and check a recipe with the YAML language server whose first line is
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from cluster.recipe.keys import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=1))
    return 0
