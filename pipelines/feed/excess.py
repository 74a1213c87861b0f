"""What a run leaves out of its samples: texts that are cut, recordings of which only a part is shown."""

import numpy as np

from pipelines.feed.ingest import DataConfig
from pipelines.shards.manifest import Manifest
from pipelines.shards.reader import Reader, RowGroup
from pipelines.transforms import BadSample

GROUPS, ROWS = 4, 1024
"""Row groups of a split that are looked at, evenly spread, and the most samples of each."""


def describe_excess(data: DataConfig, manifest: Manifest, split: str) -> list[str]:
    """Return a line for each feature of which some samples are longer than what is shown, with their share.

    A few row groups are read and only lengths are computed, since reading all of a large data set would take hours.

    Args:
        data: the recipe's data section.
        manifest: see `load_data`.
        split: the split to look at.

    Raises:
        UserError: the store does not answer or denies access.
    """
    features = {name: feature for name, feature in manifest.features.items() if feature.bounded}
    if not features:
        return []
    found = manifest.split(split)
    reader = Reader.of(data.url, manifest, found, data.storage_options, policy=data.read)
    ids = np.linspace(0, max(0, found.samples - 1), GROUPS).astype(np.int64) if found.samples else np.zeros(0, np.int64)
    exceeding = {name: list[bool]() for name in features}
    for place in sorted({(shard, group) for shard, group, _ in reader.locate(ids)}):
        group = reader.row_groups({place})[place]
        for name, lengths in exceeding.items():
            lengths += _exceeding(group, name, manifest, data)
    return [
        f"about {sum(lengths) / len(lengths):.0%} of {split} samples ({name}; {len(lengths):,} were looked at) are "
        f"{features[name].excess(data)}"
        for name, lengths in exceeding.items()
        if any(lengths)
    ]


def _exceeding(group: RowGroup, name: str, manifest: Manifest, data: DataConfig) -> list[bool]:
    """Return for each usable sample of a row group whether it is longer than what is shown."""
    feature, found = manifest.features[name], []
    for row in range(min(group.rows, ROWS)):
        try:
            decoded = feature.decode(group.value(name, row), data, len(manifest.classes))
        except (BadSample, UnicodeDecodeError):
            continue  # quarantined when it is used
        found.append(feature.exceeds(decoded, data))
    return found
