"""Parameter counts of the papers' models, to the unit."""

import pytest
import torch

from perceiver.factory import build_model, model_config

IO = {"kind": "perceiver_io"}
LEARNED = {
    "kind": "image",
    "front_end": "1x1",
    "positions": {"kind": "learned", "channels": 256, "init_std": 0.02, "projection": 256},
}


def count(**values) -> int:
    config = model_config({"kind": "perceiver", "inputs": {"kind": "image"}, **values})
    with torch.device("meta"):
        model = build_model(config, classes=1000)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, 44_912_254),
    ({"cross_attends": 1, "blocks": 8}, 42_135_859),
    ({"share": "none"}, 326_241_856),
    ({"share": "none", "blocks": 0, "cross_attends": 4}, 12_654_868),
    ({"share": "none", "blocks": 0, "cross_attends": 8}, 23_760_448),
    ({"share": "none", "blocks": 0, "cross_attends": 12}, 34_866_028),
    (IO, 48_440_627),
    ({**IO, "inputs": {"kind": "image", "front_end": "conv"}}, 48_646_522),
    ({**IO, "inputs": LEARNED, "query_residual": False}, 62_255_848),
])  # fmt: skip
def test_parameter_counts(changes, expected):
    """Published: 44.9, 42.1, 326.2, 12.7, 23.8, 34.9, 48.4, 48.6, 62.3 million."""
    assert count(**changes) == expected
