"""A small prepared data set and a small recipe for tests."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipelines.prepare import prepare

CLASSES = ("dark", "light")


def write_images(folder: Path, per_class: int = 40, seed: int = 0) -> Path:
    """Write PNG files of two classes that differ in brightness, in train and test folders."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", per_class), ("test", per_class // 2)):
        for label, name in enumerate(CLASSES):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 100, (12, 12)) + 120 * label
                sink = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(sink, "PNG")
                (place / f"{index}.png").write_bytes(sink.getvalue())
    return folder


def prepare_images(folder: Path, per_class: int = 40) -> str:
    """Write and prepare such images; return the URL of the shards."""
    url = str(folder / "shards")
    prepare("image_folder", str(write_images(folder / "raw", per_class)), url)
    return url


def small_tree(folder: Path, url: str) -> dict[str, Any]:
    """Return a recipe's tree that trains a tiny Perceiver on the images for 2 epochs of 5 steps."""
    inputs = {
        "kind": "image",
        "channels": 1,
        "size": [12, 12],
        "mean": [0.5],
        "std": [0.3],
        "positions": {"kind": "fourier", "bands": 4},
    }
    return {
        "name": "small",
        "output": str(folder / "runs"),
        "data": {"url": url},
        "model": {
            "kind": "perceiver",
            "inputs": inputs,
            "latents": 4,
            "latent_channels": 16,
            "cross_attends": 1,
            "self_attends_per_block": 1,
            "heads": 2,
        },
        "task": {"kind": "classification"},
        "optim": {"lr": 0.01},
        "train": {"epochs": 2, "global_batch": 16, "log_every": 1},
        "cluster": {"workers": 2},
    }


def write_recipe(folder: Path, tree: dict[str, Any]) -> Path:
    """Write a tree as a recipe file."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
