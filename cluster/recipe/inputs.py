"""Whether the data show what the model reads: part of the checks before a start."""

from collections.abc import Mapping
from typing import Any

import torch

from perceiver.config import UserError
from pipelines.feed.ingest import DataConfig
from pipelines.shards.manifest import Manifest

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of one sample by batch key."""


def check_inputs(model: Any, shapes: Shapes, data: DataConfig, manifest: Manifest) -> None:
    """Refuse data that lack what the model reads, or show it in another shape.

    Args:
        model: the recipe's model section.
        shapes: what the data put into a training batch.
        data: the recipe's data section.
        manifest: of the data.

    Raises:
        UserError: naming both keys of the recipe that must agree.
    """
    for key, inputs in input_sections(model):
        with torch.device("meta"):
            wanted = inputs.build().example(1, "meta")
        for name, tensor in wanted.items():
            if name not in shapes:
                has = ", ".join(manifest.features)
                reads = "" if name == inputs.kind else f", which reads '{name}'"
                raise UserError(f"{key}.kind = {inputs.kind!r}{reads}, but {data.url} has the features {has}")
            check = CHECKS.get(name)
            if check and shapes[name] != tuple(tensor.shape[1:]):
                check(key, inputs, shapes[name], data)
        if inputs.kind == "mel" and inputs.rate != data.audio.rate:
            raise UserError(
                f"{key}.rate = {inputs.rate}, but data.audio.rate = {data.audio.rate}: set both to the same"
            )


def input_sections(model: Any) -> list[tuple[str, Any]]:
    """Return the model's input sections, each with its dotted key: those of every modality if there are several."""
    inputs = getattr(model, "inputs", None)
    if inputs is None or not hasattr(inputs, "kind"):
        return []
    if inputs.kind != "multimodal":
        return [("model.inputs", inputs)]
    return [(f"model.inputs.modalities.{name}", one) for name, one in inputs.modalities.items()]


def _check_image(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig) -> None:
    if not hasattr(inputs, "size"):
        return
    channels, height, width = shape
    if inputs.channels != channels:
        raise UserError(
            f"{key}.channels = {inputs.channels}, but the images of {data.url} have {channels}: set it to that"
        )
    if getattr(inputs, "resize", False):
        return
    raise UserError(
        f"{key}.size = {list(inputs.size)}, but the images of {data.url} come as {height} x {width}: "
        f"set {key}.size to [{height}, {width}], or data.image_size to {list(inputs.size)}"
    )


def _check_audio(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig) -> None:
    raise UserError(f"{key}.samples = {inputs.samples}, but data.audio.samples = {shape[0]}: set both to the same")


def _check_text(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig) -> None:
    if shape[0] > inputs.length:
        raise UserError(
            f"{key}.length = {inputs.length}, but data.text_length = {shape[0]}: set both to the same, or the first "
            "to more"
        )


def _check_frames(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig) -> None:
    _, channels, height, width = shape
    wanted, got = (inputs.channels, *inputs.size), (channels, height, width)
    if wanted != got:
        raise UserError(
            f"{key} has channels = {inputs.channels} and size = {list(inputs.size)}, but the pairs of {data.url} come "
            f"as {channels} x {height} x {width}: set {key} to that, or data.image_size to {list(inputs.size)}"
        )


def _check_video(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig) -> None:
    if inputs.kind == "flow_frames":
        _check_frames(key, inputs, shape, data)
    if not hasattr(inputs, "frames"):
        return
    frames, channels, height, width = shape
    if inputs.channels != channels:
        raise UserError(
            f"{key}.channels = {inputs.channels}, but the videos of {data.url} have {channels}: set it to that"
        )
    raise UserError(
        f"{key} has frames = {inputs.frames} and size = {list(inputs.size)}, but data.video gives {frames} frames of "
        f"{height} x {width}: set {key} and data.video to the same"
    )


CHECKS = {"image": _check_image, "audio": _check_audio, "video": _check_video, "text": _check_text}
"""What to say of a batch key whose shape is not the model's; other inputs take any size."""
