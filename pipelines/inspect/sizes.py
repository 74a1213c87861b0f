"""Sizes of some samples of a split: what a recipe's lengths depend on and the manifest does not have."""

from collections.abc import Mapping

import numpy as np

from pipelines.features.base import UNLIMITED, ViewConfig
from pipelines.inspect.samples import measure
from pipelines.shards.manifest import Manifest
from pipelines.shards.reader import Reader
from pipelines.transforms import BadSample

SAMPLES = 64
Sizes = Mapping[str, Mapping[str, list[float]]]
"""Quantities of each feature's samples, such as {"text": {"bytes": [...]}}; see `pipelines.inspect.samples.measure`."""


def sample_sizes(url: str, manifest: Manifest, split: str, options: Mapping[str, str] | None = None) -> Sizes:
    """Return the sizes of up to 64 samples, evenly spaced; those that cannot be decoded are left out.

    Args:
        url: folder of the manifest.
        manifest: of the data.
        split: the split to look at.
        options: storage options.

    Raises:
        UserError: the store does not answer or denies access.
    """
    part = manifest.split(split)
    reader = Reader.of(url, manifest, part, options)
    ids = np.unique(np.linspace(0, part.samples - 1, SAMPLES).astype(np.int64))
    found: dict[str, dict[str, list[float]]] = {name: {} for name in manifest.features}
    for shard, group, row in reader.locate(ids):
        rows = reader.row_groups({(shard, group)})[shard, group]
        for name, feature in manifest.features.items():
            if rows.error or row >= rows.rows:
                continue
            try:
                decoded = feature.decode(rows.value(name, row), ViewConfig(**UNLIMITED), len(manifest.classes))
                quantities = measure(str(getattr(feature, "kind", "")), decoded)
            except (BadSample, UnicodeDecodeError):
                continue
            for quantity, value in quantities.items():
                found[name].setdefault(quantity, []).append(value)
    return found
