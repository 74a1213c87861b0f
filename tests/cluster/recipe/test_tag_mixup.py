"""MixUp of tags: recipes for which it has no meaning are refused; a step's loss does not depend on the workers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.recipe.config import build_recipe
from cluster.recipe.preflight import check_recipe
from perceiver.config import UserError
from perceiver.tasks import Batch, build_task
from pipelines.feed.ingest import TrainShare, train_batches
from pipelines.shards.manifest import load_manifest
from tests.cluster.predict.test_scoring import write_sounds

AUDIO = {"kind": "audio", "samples": 64, "patch": 8, "positions": {"kind": "fourier", "bands": 2}}
MEL = {"kind": "mel", "samples": 64, "rate": 1000, "window": 16, "hop": 8, "bins": 4, "low": 50, "high": 450}


@pytest.fixture
def sounds(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return a recipe with MixUp of the waveforms of 24 sounds."""
    write_sounds(tmp_path / "noise", 24, 3)
    place = {"url": str(tmp_path / "noise"), "executor": "inline", "train_split": "test", "eval_split": "test"}
    tree["data"] = {**place, "audio": {"rate": 1000, "samples": 64}}
    tree["task"] = {"kind": "tagging", "mixup_alpha": 1.0}
    tree["model"]["inputs"] = AUDIO
    tree["train"]["global_batch"] = 8
    return tree


def changed(tree: dict[str, Any], changes: dict[str, Any]) -> Any:
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return build_recipe(tree)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"micro_batch": 2}, "cluster": {"workers": 2}},
        {"cluster": {"workers": 2, "min_workers": 1}},
        {"model": {"inputs": MEL}, "task": {"mixup_on": "spectrogram"}},
        {
            "model": {"inputs": {"kind": "multimodal", "modalities": {"sound": MEL}}},
            "task": {"mixup_on": "spectrogram"},
        },
        {"train": {"global_batch": 9}, "task": {"mixup_alpha": 0.0}},
    ],
)
def test_recipes_that_mix(changes: dict[str, Any], sounds: dict[str, Any]) -> None:
    check_recipe(changed(sounds, changes))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"task": {"mixup_on": "spectrogram"}}, ("'audio'", "task.mixup_on to waveform")),
        (
            {
                "model": {"inputs": {"kind": "multimodal", "modalities": {"sound": AUDIO}}},
                "task": {"mixup_on": "spectrogram"},
            },
            ("model.inputs.modalities.sound.kind = 'audio'", "task.mixup_alpha to 0"),
        ),
        ({"train": {"global_batch": 9}}, ("train.global_batch = 9 on 2 workers", "multiple of 4")),
        ({"train": {"micro_batch": 1}}, ("micro-batches of 1",)),
        ({"train": {"micro_batch": 6}, "cluster": {"workers": 1}}, ("micro-batches of 6",)),
        ({"cluster": {"workers": 8}}, ("8 workers", "multiple of 16")),
        ({"cluster": {"workers": 4, "min_workers": 2}}, ("3 workers", "cluster.min_workers")),
    ],
)
def test_recipes_that_cannot_mix(changes: dict[str, Any], parts: tuple[str, ...], sounds: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        check_recipe(changed(sounds, changes))
    message = str(caught.value)
    assert message.startswith("task.mixup_alpha = 1 ") and "\n" not in message
    assert all(part in message for part in parts), message


class Linear(nn.Module):
    """A classifier of 64 samples."""

    input_keys = ("audio",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return self.layer(audio.float() / 10_000)


@pytest.mark.parametrize("order", ["shuffled", "balanced"])
def test_the_loss_of_each_step_at_any_number_of_workers(order: str, sounds: dict[str, Any]) -> None:
    """Four steps of 8 samples, over the end of an epoch; a resumed run takes the last two again."""
    torch.manual_seed(0)
    recipe, model = changed(sounds, {"data": {"order": order}}), Linear().train()
    manifest = load_manifest(recipe.data.url)

    def losses(world: int, micro: int, start: int) -> torch.Tensor:
        task: Any = build_task(recipe.task, classes=3)
        found = torch.zeros(4)
        for rank in range(world):
            share = TrainShare(0, 8, micro, start, 4, rank, world)
            batches: list[Batch] = list(train_batches(recipe.data, manifest, share, "cpu"))
            each = len(batches) // (4 - start)
            for number, batch in enumerate(batches):
                task.step = start + number // each
                found[task.step] += task.loss(model, batch).loss_sum.detach()
        return found

    whole = losses(1, 8, 0)
    assert len(set(whole.tolist())) == 4
    for world, micro in ((1, 2), (2, 4), (2, 2), (4, 2)):
        torch.testing.assert_close(losses(world, micro, 0), whole)
    torch.testing.assert_close(losses(2, 4, 2)[2:], whole[2:])
