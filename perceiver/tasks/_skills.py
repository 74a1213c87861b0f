"""Figures of the skills of a general task, of trained pairs of skill and concept and of those held out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from perceiver.tasks._captions import cider_d
from perceiver.text_ids import byte_text

PARTS = ("seen", "held_out")
NAMES = {"exact": "accuracy", "ap50": "ap50", "none": "none"}


def skill_figures(skills: Sequence[str], captions: Sequence[str], sums: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of each skill, and their mean.

    Args:
        skills: names of the skills.
        captions: skills whose texts are compared by CIDEr-D, too.
        sums: of the task `general`, with texts of evaluations under `texts/SKILL/PART`.

    Returns:
        `accuracy_SKILL` of texts (`exact_SKILL` of captions; VQA's accuracy of questions with several answers),
        `ap50_SKILL` of samples with true boxes, `none_SKILL`: the share of samples without true boxes in which no query
        is relevant; `cider_SKILL` of captions; each also as NAME_seen and NAME_held_out if there are held-out samples.
        `general` is the mean over the skills of accuracy, exact match or AP; `general_seen` and `general_held_out`
        alike. A figure of no sample is left out.
    """
    found: dict[str, float] = {}
    main: dict[str, dict[str, float]] = {"": {}, **{f"_{part}": {} for part in PARTS}}
    for skill in skills:
        own = _own(skill, skill in captions, sums)
        split = any(name.endswith(f"_{PARTS[1]}") for name in own)
        found |= {name: value for name, value in own.items() if split or not name.endswith(f"_{PARTS[0]}")}
        for part, values in main.items():
            kinds = [own[key] for kind in ("accuracy", "exact", "ap50") if (key := f"{kind}_{skill}{part}") in own]
            if kinds:
                values[skill] = sum(kinds) / len(kinds)
    for part, values in main.items():
        if values and (part != f"_{PARTS[0]}" or main[f"_{PARTS[1]}"]):
            found[f"general{part}"] = sum(values.values()) / len(values)
    return found


def _own(skill: str, caption: bool, sums: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a skill over all samples, and over each part."""
    found: dict[str, float] = {}
    for key, name in NAMES.items():
        name = "exact" if caption and key == "exact" else name
        totals = [(sums[f"{key}/{skill}/{part}"], sums[f"{key}_count/{skill}/{part}"]) for part in PARTS]
        for part, (total, count) in zip(PARTS, totals, strict=True):
            if count:
                found[f"{name}_{skill}_{part}"] = total / count
        if count := sum(count for _, count in totals):
            found[f"{name}_{skill}"] = sum(total for total, _ in totals) / count
    return found | (_cider(skill, sums) if caption else {})


def _cider(skill: str, sums: Mapping[str, Any]) -> dict[str, float]:
    """Return the CIDEr-D of a skill's texts; the document frequencies are those of all its references."""
    pairs = {part: _texts(sums[f"texts/{skill}/{part}"]) for part in PARTS if f"texts/{skill}/{part}" in sums}
    whole = [pair for part in pairs.values() for pair in part]
    if not whole:
        return {}
    scores = cider_d([text for text, _ in whole], [wanted for _, wanted in whole])
    found, start = {f"cider_{skill}": float(np.sort(scores).mean())}, 0
    for part, own in pairs.items():
        if own:
            found[f"cider_{skill}_{part}"] = float(np.sort(scores[start : start + len(own)]).mean())
        start += len(own)
    return found


def _texts(rows: Tensor) -> list[tuple[str, list[str]]]:
    """Return each text and its references, of rows as `Answers.beside` makes them."""
    found = []
    for size, width, *ids in rows.tolist():
        others = [ids[start : start + width] for start in range(size, len(ids), width)]
        found.append((byte_text(ids[:size]), [byte_text(other) for other in others if any(other)]))
    return found
