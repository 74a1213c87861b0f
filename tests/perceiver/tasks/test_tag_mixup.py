"""MixUp of tags: sound and labels of a pair are mixed alike, by shares that do not depend on the number of workers."""

import numpy as np
import pytest
import torch
from torch import nn

from perceiver.config import UserError
from perceiver.modalities.mel import MelConfig, log_mel
from perceiver.modalities.multimodal import MultimodalConfig
from perceiver.tasks import build_task
from perceiver.tasks._pairs import pair_shares
from perceiver.tasks.tagging import TaggingConfig

MEL = MelConfig.model_validate(
    {"samples": 256, "rate": 8000, "window": 64, "hop": 32, "bins": 5, "low": 100.0, "high": 3000.0, "mean": -2.0}
)


class Tagger(nn.Module):
    """A linear layer on a spectrogram or on samples; remembers the values that it read."""

    input_keys = ("audio",)

    def __init__(self, mel: bool) -> None:
        super().__init__()
        self.inputs = MEL.build() if mel else None
        self.layer = nn.Linear(40 if mel else 256, 3)
        self.seen = torch.empty(0)

    def forward(self, raw):
        tensors = raw if isinstance(raw, dict) else {"audio": raw}
        x = self.inputs(tensors, torch.float32).data[..., 0] if self.inputs else tensors["audio"].float()
        self.seen = x.flatten(1)
        return self.layer(self.seen / 1000)


def batch_of(rows: int = 8) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "audio": torch.randint(-9000, 9000, (rows, 256), generator=g, dtype=torch.int16),
        "label": torch.randint(0, 2, (rows, 3), generator=g).float(),
        "sample_id": torch.randperm(rows, generator=g) + 5,
        "valid": torch.ones(rows, dtype=torch.bool),
    }


def task_of(on: str, step: int = 3):
    task = build_task(TaggingConfig.model_validate({"mixup_alpha": 1.0, "mixup_on": on}), classes=3)
    task.step = step  # type: ignore[attr-defined]
    return task


@pytest.mark.parametrize(("on", "mel"), [("waveform", False), ("waveform", True), ("spectrogram", True)])
def test_sound_and_labels_are_mixed_alike(on, mel):
    """Against NumPy; row 4 has no label, row 5 knows one class, row 7 is padding."""
    torch.manual_seed(0)
    model, batch = Tagger(mel).train(), batch_of(10)
    batch["label"][4] = -1
    batch["label"][9, 1:] = -1
    batch["valid"][7] = False
    out = task_of(on).loss(model, batch)
    share = pair_shares(1.0, 0, 3, batch["sample_id"]).double().numpy()
    assert np.allclose(share[::2] + share[1::2], 1) and len(set(share)) == 10
    share[4:8] = 1
    order = [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]

    def mix(values):
        own = share.reshape(-1, *[1] * (values.ndim - 1))
        return own * values + (1 - own) * values[order]

    audio = batch["audio"].double()
    if on == "waveform":
        audio = torch.from_numpy(mix(audio.numpy()).round())
    seen = audio
    if mel:
        seen = log_mel(audio / 32768, MEL) + 2
        seen = (torch.from_numpy(mix(seen.numpy())) if on == "spectrogram" else seen).flatten(1)
    torch.testing.assert_close(model.seen.double(), seen, rtol=1e-4, atol=1e-3 if mel else 0.51)
    label = batch["label"].double().numpy()
    known = (label >= 0) & batch["valid"].numpy()[:, None]
    target = mix(np.where(known, label, 0))
    known[8] = known[9]
    p = model.layer(model.seen / 1000).sigmoid().double().detach().numpy()
    each = -(target * np.log(p) + (1 - target) * np.log(1 - p)) * known
    expected = (each.sum(1) / known.sum(1).clip(1)).sum()
    assert float(out.loss_sum.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(task_of(on).count(batch)) == 8 == known.any(1).sum()
    out.loss_sum.backward()


class Viewer(Tagger):
    """The same for a spectrogram and a video as one set of inputs."""

    input_keys = ("audio", "video")

    def __init__(self) -> None:
        super().__init__(mel=True)
        video = {
            "kind": "video",
            "frames": 1,
            "channels": 1,
            "size": (2, 2),
            "patch": (1, 2, 2),
            "mean": [0],
            "std": [1],
        }
        none = {"kind": "none"}
        sound = {**MEL.model_dump(), "positions": none}
        self.inputs = MultimodalConfig(modalities={"a": sound, "v": {**video, "positions": none}}).build()

    def forward(self, raw):
        self.seen = self.inputs(raw, torch.float32).data
        return self.layer(self.seen[:, :40, 0] / 1000)


@pytest.mark.parametrize("on", ["waveform", "spectrogram"])
def test_video_is_mixed_by_the_shares_of_the_sound(on):
    model, batch = Viewer().train(), batch_of(8)
    batch["video"] = torch.randint(0, 256, (8, 1, 1, 2, 2), dtype=torch.uint8)
    task_of(on).loss(model, batch).loss_sum.backward()
    share = pair_shares(1.0, 0, 3, batch["sample_id"])[:, None]
    pixels, order = batch["video"].flatten(1).float(), [1, 0, 3, 2, 5, 4, 7, 6]
    wanted = (share * pixels + (1 - share) * pixels[order]).round() / 255
    torch.testing.assert_close(model.seen[:, -1, :4], wanted)
    sound = Tagger(True).train()
    task_of(on).loss(sound, {key: value for key, value in batch.items() if key != "video"})
    torch.testing.assert_close(model.seen[:, :40, 0], sound.seen)


@pytest.mark.parametrize("on", ["waveform", "spectrogram"])
def test_the_loss_of_a_step_is_the_same_in_any_micro_batches_and_after_a_resume(on):
    torch.manual_seed(0)
    model, batch = Tagger(True).train(), batch_of(8)
    whole = task_of(on).loss(model, batch).loss_sum
    for size in (2, 4):
        parts = [{k: v[at : at + size] for k, v in batch.items()} for at in range(0, 8, size)]
        torch.testing.assert_close(sum(task_of(on).loss(model, part).loss_sum for part in parts), whole)
    assert not torch.isclose(task_of(on, step=4).loss(model, batch).loss_sum, whole)
    plain = build_task(TaggingConfig(), classes=3)
    torch.testing.assert_close(task_of(on).loss(model.eval(), batch).loss_sum, plain.loss(model, batch).loss_sum)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 12.0])
def test_shares_are_beta_distributed(alpha):
    share = pair_shares(alpha, 0, 7, torch.arange(8000))[::2]
    assert float(share.mean()) == pytest.approx(0.5, abs=0.025)
    assert float(share.var()) == pytest.approx(0.25 / (2 * alpha + 1), rel=0.07)


def test_mixup_of_tags_without_sound_is_refused():
    with pytest.raises(UserError, match="mixup_alpha"):
        task_of("waveform").loss(Tagger(False).train(), {"label": torch.ones(2, 3), "image": torch.ones(2, 3, 4, 4)})
