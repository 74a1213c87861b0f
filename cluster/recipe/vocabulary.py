"""The vocabulary of a model that answers in words: the words of the training answers."""

from collections.abc import Iterator
from typing import Any

from cluster.recipe.config import Recipe, kind_of
from perceiver.baselines.gpv import count_words
from perceiver.config import UserError
from pipelines.shards.manifest import Manifest
from pipelines.shards.reader import Reader

MOST_WORDS = 100_000


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
