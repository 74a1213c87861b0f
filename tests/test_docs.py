"""Commands in the documentation exist and have the options with which they are shown."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from perceiver.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each `perceiver` command in a page's blocks, but for abbreviated ones."""
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if found := re.match(r"\s*(?:\$ )?(perceiver \w.*)", line):
                for part in re.split(r" && | \| ", found[1]):
                    words = shlex.split(part, comments=True)
                    if words[:1] == ["perceiver"] and "..." not in words:
                        yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_with_which_they_are_shown(page: Path) -> None:
    for words in commands(page):
        command, context = cli, click.Context(cli)
        while isinstance(command, click.Group) and words:
            found = command.get_command(context, words[0])
            assert found is not None, f"{page.name}: no command {words[0]} in perceiver {' '.join(words)}"
            command, context, words = found, click.Context(found, parent=context), words[1:]
        try:
            command.make_parser(context).parse_args(args=list(words))
        except click.UsageError as error:
            raise AssertionError(f"{page.name}: {' '.join(words)}: {error.format_message()}") from None


def test_the_pages_have_commands() -> None:
    assert len([words for page in PAGES for words in commands(page)]) > 80
