"""Reads a folder that the `transformers` library wrote: config, preprocessor and weights of a Perceiver head."""

from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, Field, ValidationError

from perceiver.baselines._grid import transformers_library
from perceiver.config import UserError
from perceiver.export.safetensors_folder import read_tensors
from perceiver.export.transformers_layout import READERS, from_transformers
from perceiver.model import PerceiverIO
from perceiver.storage import existing_file, first_line, invalid_key, parse_json


def read_transformers(folder: str) -> PerceiverIO:
    """Build our model from a local folder as `save_pretrained` writes it.

    It reads config.json, model.safetensors or shards with an index, and of an image classifier size and normalisation
    from preprocessor_config.json if there is one.

    Raises:
        UserError: the folder contains another class, or its weights are not in safetensors.
    """
    where = Path(folder, "config.json")
    try:
        values = parse_json(Path(existing_file(LocalFileSystem(), folder, "config.json")).read_bytes(), str(where))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from None
    heads = values.get("architectures") if isinstance(values, dict) else None
    name = heads[0] if isinstance(heads, list) and heads else "no class"
    if not isinstance(name, str) or name not in READERS:
        raise UserError(f"{where}: got {name!r:.80}; wanted one of {', '.join(READERS)}")
    seen = _seen(folder) if "ImageClassification" in name else {}
    if name.endswith("Learned"):
        seen.pop("size", None)  # the table of positions has one
    tensors = read_tensors(folder, name)  # not from_pretrained: a config may name weights or adapters elsewhere
    library = transformers_library()
    try:
        with torch.device("meta"):
            theirs = getattr(library, name)(library.PerceiverConfig.from_dict(values))
        for key, wanted in theirs.state_dict().items():
            if key not in tensors or tensors[key].shape != wanted.shape:
                has = list(tensors[key].shape) if key in tensors else "none"
                raise UserError(f"{folder}: got {has} as tensor {key}; wanted shape {list(wanted.shape)}")
        theirs.load_state_dict(tensors, strict=False, assign=True)
        return from_transformers(theirs, **seen)
    except UserError as error:
        raise error if folder in str(error) else UserError(f"{where}: {error}") from None
    except Exception as error:  # noqa: BLE001  the library raises many types for a wrong config
        raise UserError(f"{where}: not the config of a {name} ({first_line(error)})") from None


class _Processor(BaseModel):
    """What preprocessor_config.json says of images, with the library's defaults."""

    do_resize: bool = True
    size: int | dict[str, int] | None = None
    do_rescale: bool = True
    rescale_factor: float = Field(default=1 / 255, gt=0)
    do_normalize: bool = True
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


def _seen(folder: str) -> dict[str, Any]:
    """Return size, mean and std of the images that a folder's preprocessor makes; empty if it has none."""
    name = "preprocessor_config.json"
    where = Path(folder, name)
    if not where.exists():
        return {}
    try:
        raw = Path(existing_file(LocalFileSystem(), folder, name)).read_bytes()
        processor = _Processor.model_validate(parse_json(raw, str(where)))
    except OSError as error:
        raise UserError(f"{where} cannot be read: {first_line(error)}") from None
    except ValidationError as error:
        raise UserError(f"{where}: {invalid_key(error)}") from None
    found: dict[str, Any] = {}
    size = processor.size
    if processor.do_resize and isinstance(size, dict) and {"height", "width"} <= size.keys():
        found["size"] = (size["height"], size["width"])
    elif processor.do_resize and isinstance(size, int):
        found["size"] = (size, size)
    unit = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    if processor.do_normalize and processor.image_mean and processor.image_std:
        found["mean"] = tuple(value / unit for value in processor.image_mean)
        found["std"] = tuple(value / unit for value in processor.image_std)
    elif not processor.do_normalize:
        found |= {"mean": (0.0,) * 3, "std": (1 / unit,) * 3}
    return found
