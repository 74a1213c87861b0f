"""The targets of a task: what it takes from the data, and the checks that data and model have what it reads."""

from collections.abc import Mapping
from typing import Any, cast

from cluster.recipe.config import Recipe, kind_of
from cluster.recipe.inputs import input_sections
from cluster.recipe.vocabulary import with_pieces, with_words
from perceiver.config import UserError
from perceiver.factory import on_meta
from perceiver.tasks import Targets, TaskTarget, balanced, balanced_positives, label_key
from pipelines.shards.manifest import Manifest

TARGETS = {
    "classification": ("label", "label"),
    "tagging": ("label", "labels"),
    "regression": ("target", "target"),
    "segmentation": ("image", "segmentation"),
}
"""Name and kind of the feature that a task needs."""
AGAIN = {
    "target": "prepare the data with --option target=COLUMN",
    "segmentation": "prepare the data with masks (source csv with the column mask, or segmentation_folder)",
}
"""How data get features of a kind."""
DECODERS = {
    "masked_language": "tokens",
    "autoencoding": "multimodal",
    "flow": "flow",
    "multitask": "multitask",
    "segmentation": "pixels",
    "general": "general",
}
"""The decoder whose outputs a task reads; the other tasks read those of a classifier."""
CLASSIFIER = "class"
"""The decoder of a classifier; models without a decoder are classifiers."""


def with_targets(recipe: Recipe, manifest: Manifest) -> Recipe:
    """Return the recipe with what its task takes from the data, such as means and deviations of targets.

    A run's own recipe keeps it, so that the trained model has the same units whatever it is applied to later.

    Raises:
        UserError: the data do not have what the task needs.
    """
    section: Any = recipe.task
    if kind_of(section) == "general":
        return with_words(with_pieces(_with_skills(recipe, manifest)), manifest)
    if kind_of(section) == "regression" and section.targets is None:
        check_feature(recipe, manifest)
        return _with_task(recipe, targets=_scale(recipe, manifest, "target"))
    if kind_of(section) == "multitask":
        return _with_several(recipe, manifest)
    if getattr(section, "class_weights", None) == "balanced":
        check_feature(recipe, manifest)
        return _with_task(recipe, class_weights=_balanced(recipe, manifest, "label"))
    return recipe


def _with_skills(recipe: Recipe, manifest: Manifest) -> Recipe:
    """Return the recipe with the names of the skills, which are the classes of the data."""
    section: Any = recipe.task
    skills = manifest.classes if section.skills is None else section.skills
    if strange := section.weights.keys() - set(skills):
        raise UserError(
            f"task.weights has {min(strange)}, which is no skill of {recipe.data.url}: wanted {', '.join(skills)}"
        )
    if skills and not any(section.weights.get(skill, 1.0) for skill in skills):
        raise UserError("task.weights is 0 for all skills of the data: leave at least one to train")
    return recipe if section.skills is not None else _with_task(recipe, skills=skills)


def takes_from_data(recipe: Recipe) -> bool:
    """Return whether `with_targets` needs the manifest of the data."""
    section: Any = recipe.task
    weights = getattr(section, "class_weights", None)
    weighted = "balanced" in (weights.values() if isinstance(weights, Mapping) else [weights])
    return weighted or (kind_of(section) in ("regression", "multitask") and section.targets is None)


def _with_several(recipe: Recipe, manifest: Manifest) -> Recipe:
    """Return the recipe with what each task of a multitask predicts; `check_targets` refuses one without a target."""
    section: Any = recipe.task
    numbers: Any = manifest.features.get("target")
    if section.targets is None:
        found: dict[str, TaskTarget] = {}
        for name in section.tasks:
            label: Any = manifest.features.get(label_key(name))
            if kind_of(label) == "label":
                found[name] = TaskTarget(classes=label.classes or manifest.classes)
            elif kind_of(numbers) == "target" and name in numbers.names:
                whole, column = _scale(recipe, manifest, "target"), numbers.names.index(name)
                scale = Targets(names=(name,), mean=(whole.mean[column],), std=(whole.std[column],))
                found[name] = TaskTarget(column=column, scale=scale)
        recipe = _with_task(recipe, targets=found)
    for name in section.class_weights:
        if getattr((cast(Any, recipe.task).targets or {}).get(name), "scale", None):
            raise UserError(f"task.class_weights has {name}, which is a number: wanted only tasks that are classes")
    weights = {
        name: _balanced(recipe, manifest, label_key(name)) if value == "balanced" else value
        for name, value in section.class_weights.items()
    }
    return _with_task(recipe, class_weights=weights) if weights else recipe


def _check_several(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse data whose targets are not those that a multitask predicts."""
    section: Any = recipe.task
    numbers: Any = manifest.features.get("target")
    url, clips = recipe.data.url, recipe.data.clip.eval_clips
    if clips > 1 and any(feature.clips for feature in manifest.features.values()):
        raise UserError(
            f"data.clip.eval_clips = {clips}, but task.kind = 'multitask' does not average the scores of clips: set it"
            " to 1"
        )
    for name in section.tasks:
        target, label = (section.targets or {}).get(name), manifest.features.get(label_key(name))
        if target is not None and target.scale is not None:
            if kind_of(numbers) != "target" or numbers.names[target.column : target.column + 1] != (name,):
                raise UserError(f"task.tasks has {name}, a number, but {url} has no target {name} in its place")
        elif kind_of(label) != "label":
            raise UserError(
                f"task.kind = 'multitask' needs '{label_key(name)}' for task.tasks.{name}, or a target of its name, but"
                f" {url} has the features {', '.join(manifest.features)}"
                + (f" (targets {', '.join(numbers.names)})" if kind_of(numbers) == "target" else "")
                + ": prepare the data with --option label=A,B or target=C,D, or remove the task"
            )
        elif target is not None and target.classes != (getattr(label, "classes", ()) or manifest.classes):
            raise UserError(
                f"{url} has other classes of {name} than task.targets.{name}: use data with the same classes"
            )


def class_names(recipe: Recipe, manifest: Manifest) -> tuple[str, ...]:
    """Return the names of the model's outputs that are classes: those of the data, none for a regression."""
    return () if kind_of(recipe.task) == "regression" else manifest.classes


def _with_task(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"task": recipe.task.model_copy(update=changes)})


def _balanced(recipe: Recipe, manifest: Manifest, name: str) -> tuple[float, ...]:
    """Return the balanced weights of the classes of a label feature."""
    counts = manifest.class_counts.get(name, ())
    if not counts or recipe.data.train_split != "train":
        why = "is a mixture" if recipe.data.mixture else "has no counts of its classes in the split train"
        raise UserError(
            f"task.class_weights = balanced, but {recipe.data.url} {why}: set it to a list of numbers, or prepare the"
            " data with this version"
        )
    if kind_of(manifest.features[name]) == "labels":
        return balanced_positives(counts, manifest.split("train").samples)
    return balanced(counts)


def _scale(recipe: Recipe, manifest: Manifest, name: str) -> Targets:
    """Return names, means and deviations of a target feature."""
    feature: Any = manifest.features[name]
    if not feature.mean:
        raise UserError(
            f"{recipe.data.url} has no means and deviations of {', '.join(feature.names)}, since it has no split train:"
            " set task.targets (names, mean, std), or prepare the data with a split train"
        )
    return Targets(names=feature.names, mean=feature.mean, std=feature.std)


def check_targets(recipe: Recipe, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a task whose targets are not in the data, or whose outputs the model does not have.

    Args:
        recipe: the recipe.
        manifest: of the data.
        shapes: shape of one sample by batch key.
    """
    check_feature(recipe, manifest)
    for needed, shape in _needed_keys(recipe.task).items():
        if needed not in shapes or shape not in (None, shapes[needed]):
            raise UserError(
                f"task.kind = {kind_of(recipe.task)!r} needs {needed!r}"
                + (" with one class per sample" if shape is not None else "")
                + f", but {recipe.data.url} has the features {', '.join(manifest.features)}: set data.url to data with "
                f"{needed!r}, or task to a task that the data have the targets of"
            )
    _check_decoder(recipe)
    if kind_of(recipe.task) == "segmentation":
        _check_queries(recipe, shapes["mask"])
    _check_heads(recipe, manifest)
    if kind_of(recipe.task) == "tagging" and cast(Any, recipe.task).mixup_alpha > 0:
        _check_pairs(recipe)
    if kind_of(recipe.task) == "general":
        _check_general(recipe, manifest, shapes)


def _check_heads(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse a model of several classifiers without weights of their losses, and weights of other classifiers."""
    if split := getattr(recipe.task, "blend_split", None):
        manifest.split(split)
    blend, model = getattr(recipe.task, "blend", None), cast(Any, recipe.model)
    several = kind_of(model) == "late_fusion" and model.heads
    heads = [*model.branches, "joint"] if several else []
    if blend is None and not heads:
        return
    if blend is None:
        raise UserError(
            f"model.heads = true gives the logits of {', '.join(heads)}, which tagging reads with the weight of each "
            "loss: set task.blend, such as {joint: 1}, or model.heads to false"
        )
    if strange := sorted(blend.keys() - set(heads)):
        has = f"the classifiers {', '.join(heads)}" if heads else "one classifier"
        raise UserError(
            f"task.blend has {', '.join(strange)}, but the model has {has}: "
            + ("name those" if heads else "set model.kind to late_fusion with combine joint and heads true")
        )


def _check_pairs(recipe: Recipe) -> None:
    """Refuse MixUp of tags of other inputs than sound and video, and micro-batches that would separate a pair."""
    task: Any = recipe.task
    sections = input_sections(recipe.model)
    sound = ("mel",) if task.mixup_on == "spectrogram" else ("audio", "mel")
    wrong = next(((key, one.kind) for key, one in sections if one.kind not in (*sound, "video")), None)
    if wrong is None and not any(one.kind in sound for _, one in sections):
        wrong = sections[0][0], sections[0][1].kind
    if wrong:
        raise UserError(
            f"task.mixup_alpha = {task.mixup_alpha:g} with task.mixup_on = {task.mixup_on} mixes inputs of the kind"
            f" {' or '.join(sound)}, and video with them, but {wrong[0]}.kind = {wrong[1]!r}: set task.mixup_alpha to 0"
            + (", or task.mixup_on to waveform" if wrong[1] == "audio" else "")
        )
    if getattr(recipe.model, "combine", "joint") != "joint":
        raise UserError(
            f"task.mixup_alpha = {task.mixup_alpha:g} mixes the inputs of a late_fusion of scores, whose frozen "
            "branches would not take part: set task.mixup_alpha to 0, and mix in the branches' own runs"
        )
    train = recipe.train
    for workers in range(recipe.cluster.min_workers or recipe.cluster.workers, recipe.cluster.workers + 1):
        micro = train.micro(workers)
        if micro % 2 or train.global_batch % (workers * micro):
            raise UserError(
                f"task.mixup_alpha = {task.mixup_alpha:g} mixes pairs of samples, but train.global_batch ="
                f" {train.global_batch} on {workers} workers in micro-batches of {micro} separates some: set"
                f" train.global_batch to a multiple of {2 * workers} and train.micro_batch to an even divisor of a"
                " worker's share"
                + (", or cluster.min_workers to cluster.workers" if recipe.cluster.min_workers else "")
            )


def _check_queries(recipe: Recipe, mask: tuple[int, ...]) -> None:
    """Refuse to decode some pixels of masks whose pixels are not the model's inputs."""
    model, queries = recipe.model, getattr(recipe.task, "queries", None)
    if queries is None:
        return
    with on_meta():
        grid: tuple[int, ...] = tuple(cast(Any, model).inputs.build().grid)
    if grid != mask:
        raise UserError(
            f"task.queries = {queries} needs an input for each pixel of the masks, which are {mask[0]} x {mask[1]}, but"
            f" model.inputs has {' x '.join(map(str, grid))}: set task.queries to null, or model.inputs.size to"
            f" {list(mask)} with front_end none or 1x1"
        )


def _check_general(recipe: Recipe, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse data of other skills, and boxes or answers that are more than the model's queries."""
    model, task, url = cast(Any, recipe.model), cast(Any, recipe.task), recipe.data.url
    if task.skills != manifest.classes:
        raise UserError(f"{url} has the skills {', '.join(manifest.classes)}, task.skills are {', '.join(task.skills)}")
    boxes, tokens = shapes["boxes"][0], shapes["answer"][0]
    decoder, detector = getattr(model, "decoder", None), getattr(model, "detector", None)
    key = "decoder.boxes" if decoder else "detector.queries"
    queries = decoder.boxes if decoder else getattr(detector, "queries", 0)
    if queries and boxes > queries:
        raise UserError(
            f"data.boxes = {boxes} is more than model.{key} = {queries}, of which each finds a box at most: set "
            f"model.{key} to at least {boxes}, or data.boxes to {queries} if the data have no more"
        )
    if decoder and tokens > decoder.length:
        raise UserError(
            f"data.answer_length = {tokens} is more than model.decoder.length = {decoder.length}, text queries: set "
            f"model.decoder.length to at least {tokens}, or data.answer_length to {decoder.length}"
        )


def _needed_keys(task: Any) -> dict[str, tuple[int, ...] | None]:
    """Return the batch keys of a task's targets with the shape of one sample's; None: any shape."""
    match kind_of(task):
        case "flow":
            return {"flow": None}
        case "masked_language":
            return {"text": None}
        case "general":
            return {"boxes": None, "answer": None, "label": ()}
        case "autoencoding":
            return {name: () if name == "label" else None for name, weight in task.weights.items() if weight}
        case _:
            return {}  # see `check_feature`


def _check_decoder(recipe: Recipe) -> None:
    """Refuse a model whose outputs are not those that the task reads."""
    section: Any = recipe.task
    task, decoder = kind_of(section), getattr(recipe.model, "decoder", None)
    wanted = DECODERS.get(task, CLASSIFIER)
    found = kind_of(decoder) or getattr(recipe.model, "decodes", CLASSIFIER)
    if found != wanted:
        gives = "is a classifier" if found == CLASSIFIER else f"has those of kind {found!r}"
        has = f"model.decoder.kind = {found!r}" if decoder else f"model.kind = {kind_of(recipe.model)!r} {gives}"
        fits = next((name for name, kind in DECODERS.items() if kind == found), "classification")
        fix = f"set model.kind to perceiver_io and model.decoder.kind to {wanted}" if wanted != CLASSIFIER else ""
        raise UserError(
            f"task.kind = {task!r} reads the outputs of a decoder of kind {wanted!r}, but {has}: "
            + " or ".join(filter(None, (fix, f"set task.kind to {fits}")))
        )
    if task == "multitask" and decoder:
        _check_sizes(section, decoder)


def _check_sizes(section: Any, decoder: Any) -> None:
    """Refuse a multitask decoder without one of the tasks, or with another number of outputs for it."""
    missing = set(section.tasks) - set(decoder.tasks)
    if missing:
        raise UserError(
            f"task.tasks has {', '.join(sorted(missing))}, which model.decoder.tasks has not: give it the number of "
            "classes there, or 1 for a number"
        )
    for name, target in (section.targets or {}).items():
        size = 1 if target.scale is not None else len(target.classes)
        if size and decoder.tasks[name] != size:
            what = "is a number" if target.scale is not None else f"has {size} classes"
            raise UserError(f"model.decoder.tasks.{name} = {decoder.tasks[name]}, but {name} {what}: set it to {size}")


def check_feature(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse a task whose targets are not in the data."""
    task: Any = recipe.task
    if kind_of(task) == "multitask":
        _check_several(recipe, manifest)
    name, wanted = TARGETS.get(kind_of(task), ("", ""))
    feature: Any = manifest.features.get(name)
    if wanted and kind_of(feature) != wanted:
        has = f"the kind {kind_of(feature)!r}" if feature else f"no feature {name!r}"
        fits = next((task for task, need in TARGETS.items() if feature and need == (name, kind_of(feature))), None)
        again = AGAIN.get(wanted, "prepare the data with labels")
        raise UserError(
            f"task.kind = {kind_of(task)!r} needs a feature {name!r} of the kind {wanted!r}, "
            f"{recipe.data.url} has {has}: " + (f"set task.kind={fits}" if fits else again)
        )
    if wanted == "target" and task.targets and feature.names != task.targets.names:
        raise UserError(
            f"{recipe.data.url} has the targets {', '.join(feature.names)}, task.targets.names are"
            f" {', '.join(task.targets.names)}: set data.url to data with the same targets in the same order"
        )
