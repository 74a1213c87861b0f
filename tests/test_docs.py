"""Commands in the documentation have the options with which they are shown, and run.

A fence names its language. Above each fence of shell commands is a comment: `<!-- test: run -->` (run here, after the
other such blocks of its page), `<!-- test: run slow -->`, `<!-- test: run slow, with KEY=VALUE -->` (the key is added
to `perceiver train`, to make it shorter), or `<!-- test: no: REASON -->`.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cluster.recipe.resources import ClusterConfig
from cluster.runtime.local import start_ray
from perceiver.cli import cli
from tests import documented_data

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


FENCE = re.compile(r"(?:^ *<!-- test: ([^\n]+) -->\n)?^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LANGUAGES = {"bash", "console", "text", "python", "yaml", "toml", "json"}


@dataclass
class Block:
    """A fenced block of a page; `marker` is the text of the comment above it."""

    marker: str
    language: str
    content: str

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each `perceiver` command, but for abbreviated ones."""
        for line in re.sub(r"\\\n\s*", " ", self.content).splitlines():
            if found := re.match(r"\s*(?:\$ )?(perceiver \w.*)", line):
                for part in re.split(r" && | \| ", found[1]):
                    words = shlex.split(part, comments=True)
                    if words[:1] == ["perceiver"] and "..." not in words:
                        yield words[1:]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page."""
    return [Block(*found) for found in FENCE.findall(page.read_text(encoding="utf-8"))]


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command of a page."""
    for block in blocks(page):
        yield from block.commands()


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_shell_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, (
            f"{page.name}: a fence of the language {block.language!r}: {block.content[:60]}"
        )
        if block.language == "bash":
            wanted = re.fullmatch(r"run|run slow(, with [\w.]+=\w+)?|no: .{15,}", block.marker)
            assert wanted, f"{page.name}: no `<!-- test: ... -->` above {block.content[:60]}"
            for path in re.findall(r"tests/[\w/]+(?:\.py)?", block.marker):
                assert (ROOT / path).exists(), f"{page.name}: {path} does not exist"
        else:
            assert not block.marker, f"{page.name}: only blocks of shell commands are run: {block.content[:60]}"
    assert len(re.findall(r"^ *```\w", page.read_text(encoding="utf-8"), re.MULTILINE)) == len(blocks(page))


def run_blocks(page: str, marker: str) -> int:
    """Run the marked blocks of a page in the current folder; return how many commands there were."""
    count = 0
    for block in blocks(next(path for path in PAGES if path.name == page)):
        kind, _, key = block.marker.partition(", with ")
        if kind == marker:
            lines = [line for line in re.sub(r"\\\n", " ", block.content).splitlines() if line.strip()]
            found = list(block.commands())
            assert len(found) == len(lines), f"{page}: only lines with one perceiver command are run: {block.content}"
            for words in found:
                words += [key] if key and words[0] == "train" else []
                done = CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)
                assert not done.return_value, f"{page}: {words}: exit code {done.return_value}: {done.output[-2000:]}"
                count += 1
    return count


def test_commands_prepare_the_data_that_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documented_data.write_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_blocks("data.md", "run") >= 20


@pytest.fixture
def ray_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start Ray in the folder of the commands, which all use it: each would otherwise start a local instance."""
    monkeypatch.chdir(tmp_path)
    session = start_ray(ClusterConfig())
    yield
    session.stop(tmp_path / "ray")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_of_trained_runs(tmp_path: Path, ray_here: None) -> None:
    """With a few digits, so that a run takes seconds."""
    documented_data.write_all(tmp_path)
    documented_data.write_digits(tmp_path)
    words = ["train", "recipes/train/quickstart.yaml", "train.epochs=1", "cluster.workers=1", "tracking.enabled=false"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)
    assert not done.return_value, done.output[-2000:]
    assert run_blocks("models.md", "run slow") == 6
    assert run_blocks("README.md", "run slow") == 3
    assert run_blocks("scaling.md", "run slow") == 1
