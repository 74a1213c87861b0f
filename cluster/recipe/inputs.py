"""The checks that the data have the inputs of the model, in its shape."""

from collections.abc import Iterator, Mapping
from typing import Any

from perceiver.config import UserError
from perceiver.factory import on_meta
from pipelines.feed.ingest import DataConfig
from pipelines.shards.manifest import Manifest

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of one sample by batch key."""


def check_inputs(model: Any, shapes: Shapes, data: DataConfig, manifest: Manifest, *, trained: bool = False) -> None:
    """Refuse data without the model's inputs, or with inputs of another shape.

    Args:
        model: the recipe's model section.
        shapes: shapes of a training batch.
        data: the recipe's data section.
        manifest: of the data.
        trained: the model has its weights, so that only the data and how they are shown can change.

    Raises:
        UserError: the message names both keys of the recipe that must agree.
    """
    for key, inputs in input_sections(model):
        with on_meta():
            wanted = inputs.build().example(1, "meta")
        for name, tensor in wanted.items():
            if name not in shapes:
                has = ", ".join(manifest.features)
                reads = "" if name == inputs.kind else f", which reads '{name}'"
                raise UserError(f"{key}.kind = {inputs.kind!r}{reads}, but {data.url} has the features {has}")
            check = CHECKS.get(name)
            if check and shapes[name] != tuple(tensor.shape[1:]):
                check(key, inputs, shapes[name], data, trained)
        if inputs.kind == "flow_frames":
            _check_tiles(inputs, data)
        if inputs.kind == "mel" and inputs.rate != data.audio.rate:
            raise UserError(
                f"{key}.rate = {inputs.rate}, but data.audio.rate = {data.audio.rate}: "
                + (f"set data.audio.rate to {inputs.rate}" if trained else "set both to the same")
            )


def input_sections(model: Any) -> list[tuple[str, Any]]:
    """Return the model's input sections with their dotted keys, one per modality, of several branches those of each."""
    return list(_sections(model, "model"))


def _sections(model: Any, key: str) -> Iterator[tuple[str, Any]]:
    for name, branch in getattr(model, "branches", {}).items():
        yield from _sections(branch, f"{key}.branches.{name}")
    inputs: Any = getattr(model, "inputs", None)
    if hasattr(model, "branches") or not hasattr(inputs, "kind"):
        return
    if inputs.kind != "multimodal":
        yield f"{key}.inputs", inputs
        return
    for name, one in inputs.modalities.items():
        yield f"{key}.inputs.modalities.{name}", one


def _check_image(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig, trained: bool) -> None:
    if not hasattr(inputs, "size"):
        return
    channels, height, width = shape
    if inputs.channels != channels:
        raise _other_channels(key, inputs, channels, f"the images of {data.url}", trained, "--option channels={}")
    if getattr(inputs, "resize", False):
        return
    raise UserError(
        f"{key}.size = {list(inputs.size)}, but the images of {data.url} come as {height} x {width}: "
        + ("" if trained else f"set {key}.size to [{height}, {width}], or ")
        + f"{'set ' * trained}data.image_size to {list(inputs.size)}"
    )


def _other_channels(key: str, inputs: Any, channels: int, what: str, trained: bool, option: str = "") -> UserError:
    fix = f"set it to {channels}, and give mean and std as many values"
    if trained:
        fix = "use data with as many" + f", prepared with {option.format(inputs.channels)}" * bool(option)
    of = " of the trained model" * trained
    return UserError(f"{key}.channels = {inputs.channels}{of}, but {what} have {channels}: {fix}")


def _check_audio(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig, trained: bool) -> None:
    fix = f"set data.audio.samples to {inputs.samples}" if trained else "set both to the same"
    raise UserError(f"{key}.samples = {inputs.samples}, but data.audio.samples = {shape[0]}: {fix}")


def _check_text(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig, trained: bool) -> None:
    if shape[0] > inputs.length:
        fix = f"set data.text_length to {inputs.length}" if trained else "set both to the same, or the first to more"
        raise UserError(f"{key}.length = {inputs.length}, but data.text_length = {shape[0]}: {fix}")


def _check_frames(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig, trained: bool) -> None:
    _, channels, height, width = shape
    if inputs.channels != channels:
        raise _other_channels(key, inputs, channels, f"the pairs of {data.url}", trained)
    if tuple(inputs.size) != (height, width):
        raise UserError(
            f"{key}.size = {list(inputs.size)}, but the pairs of {data.url} come as {height} x {width}: "
            + ("" if trained else f"set {key}.size to [{height}, {width}], or ")
            + f"{'set ' * trained}data.image_size to {list(inputs.size)}"
        )


def _check_tiles(inputs: Any, data: DataConfig) -> None:
    whole = data.flow.eval_size
    if whole and (whole[0] < inputs.size[0] or whole[1] < inputs.size[1]):
        raise UserError(
            f"data.flow.eval_size = {list(whole)} is smaller than the model's {inputs.size[0]} x {inputs.size[1]}: set "
            "it to the size of the frames, or remove it"
        )


def _check_video(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig, trained: bool) -> None:
    if inputs.kind == "flow_frames":
        _check_frames(key, inputs, shape, data, trained)
    if not hasattr(inputs, "frames"):
        return
    frames, channels, height, width = shape
    if inputs.channels != channels:
        raise _other_channels(key, inputs, channels, f"the videos of {data.url}", trained)
    raise UserError(
        f"{key} has frames = {inputs.frames} and size = {list(inputs.size)}, but data.video gives {frames} frames of "
        f"{height} x {width}: set {'' if trained else f'{key} and '}data.video to the same"
    )


def _check_points(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig, trained: bool) -> None:
    wanted = inputs.dimensions + inputs.features
    if shape[1] != wanted:
        fix = f"set {key}.features to {shape[1] - inputs.dimensions}" if shape[1] >= inputs.dimensions else ""
        again = f"prepare the data with --option features={inputs.features}"
        raise UserError(
            f"{key} has {inputs.dimensions} coordinates and {inputs.features} features, but the points of {data.url}"
            f" have {shape[1]} columns: " + (again if trained or not fix else f"{fix}, or {again}")
        )


def _check_series(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig, trained: bool) -> None:
    length, channels = shape
    if inputs.channels != channels:
        raise UserError(
            f"{key}.channels = {inputs.channels}, but the series of {data.url} have {channels}: "
            + ("use data of the same columns" if trained else f"set it to {channels}")
        )
    raise UserError(
        f"{key}.length = {inputs.length}, but the series of {data.url} come with {length} steps: "
        + ("" if trained else f"set it to {length}, or ")
        + f"{'set ' * trained}data.series.length to {inputs.length}"
    )


def _check_embeddings(key: str, inputs: Any, shape: tuple[int, ...], data: DataConfig, trained: bool) -> None:
    segments, channels = shape
    fix = "use data of the same size" if trained else f"set {key} to those of the data"
    raise UserError(
        f"{key} has segments = {inputs.segments} and channels = {inputs.channels}, but the embeddings of {data.url} "
        f"have {segments} segments of {channels} values: {fix}"
    )


CHECKS = {
    "image": _check_image,
    "audio": _check_audio,
    "video": _check_video,
    "text": _check_text,
    "points": _check_points,
    "series": _check_series,
    "embeddings": _check_embeddings,
}
"""Checks of a batch key whose shape is not the model's; other inputs accept any size."""
