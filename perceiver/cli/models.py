"""`perceiver models`: the presets and their cost."""

import click

from perceiver.tracking.printable import say, say_json


@click.command(
    epilog="""\b
Examples:
  perceiver models
  perceiver models 'perceiver_io_*' --flops --json
  perceiver models perceiver_imagenet --recipe"""
)
@click.argument("pattern", default="*")
@click.option("--flops", is_flag=True, help="Also count the GFLOP of a forward pass, about 0.25 s per model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per model.")
@click.option("--recipe", "as_recipe", is_flag=True, help="Print the section `model:` with all keys, as YAML.")
def command(pattern: str, flops: bool, as_json: bool, as_recipe: bool) -> int:
    """List the model presets.

    Prints the parameters and the source of each preset whose name matches PATTERN. A recipe uses a preset with
    `model: {preset: NAME}` and may override keys. GFLOP are those of one sample by the plain path, multiplications and
    additions counted separately, as in the papers. In parentheses: why the papers print others, where they do.
    """
    import yaml

    from perceiver.accounting import preset_cost
    from perceiver.config import UserError
    from perceiver.factory import preset_config
    from perceiver.presets import PRESETS, list_models

    names = list_models(pattern)
    if not names:
        raise UserError(f"models: no preset matches {pattern!r}; `perceiver models` lists all")
    if as_recipe:
        for name in names:
            click.echo(f"# {name}: {PRESETS[name].note}")
            click.echo(
                yaml.safe_dump({"model": preset_config(name)[0].model_dump(mode="json")}, sort_keys=False), nl=False
            )
        return 0
    for name in names:
        preset = PRESETS[name]
        parameters, count = preset_cost(name, flops=flops)
        gflop = None if count is None else count / 1e9
        if as_json:
            facts = {"name": name, "parameters": parameters, "gflop": gflop, "classes": preset.classes}
            say_json({**facts, "source": preset.note, "remark": preset.remark})
        else:
            remark = f" ({preset.remark})" if preset.remark else ""
            cost = "" if gflop is None else f"{gflop:>9.1f} GFLOP"
            say(f"{name:<32}{parameters:>13,} parameters{cost}  {preset.note}{remark}")
    return 0
