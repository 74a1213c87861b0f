"""The vocabularies of a model that reads word pieces and answers in words: a file's, and those of the answers."""

from collections.abc import Iterator
from typing import Any, cast

from pydantic import ValidationError

from cluster.recipe.config import Recipe, kind_of
from perceiver.baselines.gpv import ReaderConfig, count_words
from perceiver.config import UserError
from perceiver.storage import first_line, invalid_key, open_url
from pipelines.shards.manifest import Manifest
from pipelines.shards.reader import Reader

MOST_WORDS = 100_000
MOST_BYTES = 10_000_000
"""Of a file of word pieces; BERT's have less than one million."""


def with_pieces(recipe: Recipe) -> Recipe:
    """Return the recipe with the word pieces of `model.reader.pieces_file` in place of the file.

    Raises:
        UserError: the file cannot be read, its word pieces are not those of the model, or a model that needs some has
            none.
    """
    reader: Any = getattr(recipe.model, "reader", None)
    if not isinstance(reader, ReaderConfig) or reader.kind != "bert" or reader.pieces:
        return recipe
    if reader.pieces_file is None:
        raise UserError(
            "model.reader.kind = bert without word pieces: set model.reader.pieces_file to the vocab.txt of the weights"
        )
    pieces = _read_pieces(reader.pieces_file)
    try:
        reader = ReaderConfig.model_validate({**reader.model_dump(), "pieces": pieces, "pieces_file": None})
    except ValidationError as error:
        raise UserError(f"model.reader.pieces_file = {reader.pieces_file}: {invalid_key(error)}") from None
    return recipe.model_copy(update={"model": cast(Any, recipe.model).model_copy(update={"reader": reader})})


def _read_pieces(url: str) -> tuple[str, ...]:
    """Return the lines of a file, of which the last may be empty."""
    try:
        fs, path = open_url(url)
        if (size := fs.size(path)) > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, wanted at most {MOST_BYTES:,}")
        lines = fs.cat_file(path).decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.reader.pieces_file = {url} cannot be read ({first_line(error)}): wanted a text file with a word "
            "piece per line, such as BERT's vocab.txt"
        ) from None
    return tuple(lines)


def with_words(recipe: Recipe, manifest: Manifest) -> Recipe:
    """Return the recipe with `model.words`, of a model that has an empty vocabulary.

    Raises:
        UserError: the data have no answers, too many different words, or longer answers than the model.
    """
    model: Any = recipe.model
    if getattr(model, "words", None) != ():
        return recipe
    if kind_of(manifest.features.get("answer")) != "answer":
        raise UserError(
            f"model.words is empty and {recipe.data.url} has no feature 'answer' to take words from: set data.url to"
            " data with answers, or model.words"
        )
    words, longest = count_words(training_answers(recipe, manifest), model.least_count)
    if longest >= model.length:
        raise UserError(
            f"model.length = {model.length}, but {recipe.data.url} has training answers of {longest} words and an end:"
            f" set model.length to at least {longest + 1}"
        )
    if not 0 < len(words) <= MOST_WORDS:
        raise UserError(
            f"{recipe.data.url} has {len(words):,} different words in its training answers that occur at least "
            f"{model.least_count} times, wanted 1 to {MOST_WORDS:,}: set model.least_count or model.words"
        )
    return recipe.model_copy(update={"model": model.model_copy(update={"words": words})})


def training_answers(recipe: Recipe, manifest: Manifest) -> Iterator[str]:
    """Yield the answers of the training split; damaged ones, which training quarantines, are left out.

    Each worker reads all of it at its start, unless the recipe has the words; a run's own recipe has them.
    """
    data = recipe.data
    split = manifest.split(data.train_split)
    reader = Reader.of(data.url, manifest, split, data.storage_options, policy=data.read)
    for shard, info in enumerate(split.shards):
        for number in range(len(info.group_sizes())):
            group = reader.row_groups({(shard, number)})[shard, number]
            for row in range(group.rows):
                try:
                    yield group.value("answer", row) or ""
                except UnicodeDecodeError:
                    continue
