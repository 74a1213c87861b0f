"""A search as a job: the files to upload, and whether its trials fit on the cluster."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster.jobs.config import JobSpec, Submission
from cluster.jobs.package import named_files, path_in_package, recipe_files
from cluster.recipe.file import read_tree
from cluster.recipe.placement import Node
from tune.config import Search, build_search
from tune.search.resources import divide
from tune.search_file import INLINE, read_search


def is_search(work: str | Mapping[str, Any]) -> bool:
    """Return whether a file, or a tree, is a search: it has the key recipe or space, which no recipe has."""
    return not {"recipe", "space"}.isdisjoint(read_tree(work) if isinstance(work, str) else work)


def searching(wanted: Submission) -> JobSpec:
    """Return the job that runs a search."""
    tree, base, where = read_search(wanted.recipe, wanted.overrides)
    search = build_search(tree, base, where, wanted.recipe)
    inline = tree["recipe"] == INLINE
    files = [*recipe_files(wanted.recipe), *([] if inline else recipe_files(where)), *named_files(base)]
    found = inline or _found(wanted.recipe, str(tree["recipe"]), where)
    found_by = [] if found else [f"recipe={path_in_package(where)}"]
    return JobSpec(
        "tune", search.recipe, search.config.name, {**base, "search": tree}, files, partial(_fit, search), found_by
    )


def _found(search_file: str, recipe: str, where: str) -> bool:
    """Return whether the unchanged key `recipe` of the search file leads to the recipe in the package."""
    sibling = Path(path_in_package(search_file)).parent / recipe
    return path_in_package(where) in (os.path.normpath(sibling), os.path.normpath(recipe))


def _fit(search: Search, nodes: Sequence[Node]) -> None:
    """Refuse a cluster on which no trial fits, or fewer at a time than the search requires."""
    if search.recipe.cluster.autoscaling:
        return
    total = {name: sum(node.resources.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    divide(search.recipe, search.config.concurrency, search.config.trials, total["CPU"], total["GPU"])
