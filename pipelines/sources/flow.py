"""Optical flow: AutoFlow, FlyingChairs, MPI Sintel and KITTI 2012/2015 in the layout of their archives.

AutoFlow: `static_40k_png_1_of_4/table_0_batch_0/` with `im0.png`, `im1.png` and `forward.flo`; a table is a scene.

FlyingChairs: `*_img1.ppm`, `*_img2.ppm`, `*_flow.flo` (also .png, .jpg), with `FlyingChairs_train_val.txt` for the
splits. Sintel: `training/clean/SCENE/frame_0001.png` with `training/flow/SCENE/frame_0001.flo`; option `pass=final`.
KITTI: `training/image_2/000000_10.png` and `_11.png` with `training/flow_occ/000000_10.png` (2012: `colored_0`).
"""

import random
import re
from collections.abc import Iterator, Mapping

from perceiver.config import UserError
from perceiver.storage import Folder, open_folder
from pipelines.features.flow import FlowFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import base_name, choice, hold_out, read_list, share, shuffled_units, source_folder
from pipelines.sources._files import Found, look, unreadable
from pipelines.transforms.optical_flow import pack

FRAMES = ("ppm", "png", "jpg", "jpeg")
AUTOFLOW = re.compile(r"((?:.*/)?([^/]+?)(?:_batch_\d+)?/)forward\.flo$")
CHAIRS = re.compile(r"(.*)_flow\.flo$")
SINTEL = re.compile(r"(.*?)flow/([^/]+)/frame_(\d+)\.flo$")
KITTI = re.compile(r"(.*?)flow_occ/(\d+)_10\.png$")
KITTI_FRAMES = ("image_2", "colored_0", "image_0")
OPTIONS = ("split", "pass", "held_out")

PairFiles = tuple[str, str, str]
"""Files of the first frame, the second frame and the flow."""


class FlowPairs:
    """The source.

    Options: `split` (`train` or `test` for all pairs; `auto`: by the data set's list, else whole scenes are held out),
    `held_out` (their share, 0.2), `pass` (of Sintel: clean or final).
    """

    title = "image pairs with optical flow: AutoFlow, FlyingChairs, MPI Sintel, KITTI"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the pairs below `src`."""
        refuse_options(options, OPTIONS)
        folder = source_folder("flow", src, "a flow data set (AutoFlow, FlyingChairs, Sintel or KITTI as unpacked)")
        found = look(folder, (".flo", "train_val.txt", *(f".{suffix}" for suffix in FRAMES)))
        scenes = find_pairs(folder, found, choice(options, "pass", ("clean", "final"), "clean"))
        split, rng = choice(options, "split", ("auto", "train", "test"), "auto"), random.Random(seed)
        if split == "auto":
            part = share(options, "held_out", "0.2")
            splits = _listed(folder, found.names, scenes) or _hold_out_scenes(scenes, part, rng)
        else:
            splits = {split: [pair for pairs in scenes.values() for pair in pairs]}
        units = shuffled_units(splits, rng, shard_rows, src=folder.url)
        licence = "not stated: see the data set (all of them are for research)"
        return Listing(
            base_name(folder.url),
            {"flow": FlowFeature()},
            (),
            licence,
            folder.url,
            units,
            notes=(f"scenes: {len(scenes):,}", *found.notes()),
            rejected=tuple(found.rejected),
            versions=found.versions,
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's files unchanged."""
        folder = open_folder(unit.content["src"])
        for first, second, flow in unit.content["items"]:
            try:
                files = [folder.fs.cat_file(folder.file(name)) for name in (first, second, flow)]
            except OSError as error:
                yield unreadable(flow, error)
                continue
            yield {"key": flow, "flow": pack(files, "flo" if flow.endswith(".flo") else "png")}


def find_pairs(folder: Folder, files: Found, passes: str) -> dict[str, list[PairFiles]]:
    """Return the pairs by scene; a pair whose frames are missing is added to the rejected files."""
    there = set(files.names)
    scenes: dict[str, list[PairFiles]] = {}
    for name in files.names:
        scene, stems = _frames_of(name, passes)
        frames = [
            next((f"{stem}.{suffix}" for suffix in FRAMES if f"{stem}.{suffix}" in there), None) for stem in stems
        ]
        pairs = [(frames[at], frames[at + 1]) for at in range(0, len(frames), 2)]
        found = next(((first, second) for first, second in pairs if first and second), None)
        if found:
            scenes.setdefault(scene, []).append((*found, name))
        elif stems:
            files.rejected.append(Rejected(name, "a flow without its two frames"))
        elif name.endswith(".flo"):
            files.ignore("flows that are named after no data set's rule", name)
    used = {name for pairs in scenes.values() for pair in pairs for name in pair}
    for name in files.names:
        if name.endswith(FRAMES) and name not in used:
            files.ignore("images of no pair with flow", name)
    if not scenes:
        raise UserError(
            f"no pairs with flow below {folder.url}: wanted im0.png, im1.png and forward.flo (AutoFlow),"
            " *_img1.ppm, *_img2.ppm and *_flow.flo (FlyingChairs), clean/ and flow/ (Sintel), or image_2/ and"
            " flow_occ/ (KITTI)"
        )
    return scenes


def _frames_of(name: str, passes: str) -> tuple[str, list[str]]:
    """Return the scene of a flow file, and the possible stems of its frames: first, second, first, second, ..."""
    if found := AUTOFLOW.match(name):
        return found[2], [f"{found[1]}im0", f"{found[1]}im1"]
    if found := CHAIRS.match(name):
        return found[1], [f"{found[1]}_img1", f"{found[1]}_img2"]
    if found := SINTEL.match(name):
        base = f"{found[1]}{passes}/{found[2]}/frame_"
        return found[2], [f"{base}{found[3]}", f"{base}{int(found[3]) + 1:0{len(found[3])}d}"]
    if found := KITTI.match(name):
        return found[2], [f"{found[1]}{place}/{found[2]}_{number}" for place in KITTI_FRAMES for number in (10, 11)]
    return "", []


def _listed(folder: Folder, names: list[str], scenes: Mapping[str, list[PairFiles]]) -> dict[str, list[PairFiles]]:
    """Return the splits of FlyingChairs' list: a line per pair in order, 1 to train on, 2 to test."""
    lists = [name for name in names if name.endswith("train_val.txt")]
    if not lists:
        return {}
    marks = read_list(folder, lists[0]).split()
    pairs = [pair for scene in sorted(scenes) for pair in scenes[scene]]
    if len(marks) != len(pairs):
        raise UserError(
            f"{folder.url}/{lists[0]} has {len(marks)} lines for {len(pairs)} pairs: download the missing files,"
            " or remove the list to hold out a share"
        )
    parts = {"train": "1", "test": "2"}
    if others := set(marks) - set(parts.values()):
        raise UserError(f"{folder.url}/{lists[0]} has the line {min(others)!r}: wanted 1 (train) or 2 (test) per pair")
    return {
        split: [pair for pair, found in zip(pairs, marks, strict=True) if found == mark]
        for split, mark in parts.items()
        if mark in marks
    }


def _hold_out_scenes(
    scenes: Mapping[str, list[PairFiles]], part: float, rng: random.Random
) -> dict[str, list[PairFiles]]:
    return {
        split: [pair for scene in members for pair in scenes[scene]]
        for split, members in hold_out(sorted(scenes), part, rng).items()
    }


source = FlowPairs()
