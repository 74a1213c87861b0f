"""Several clips per sample: folded into the batch, scores averaged; macro mAP at AudioSet's size."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from perceiver.factory import build_model, model_config
from perceiver.modalities.mel import MelConfig
from perceiver.tasks import build_task
from perceiver.tasks._clips import clip_logits, mean_sigmoid, mean_softmax
from perceiver.tasks.classification import ClassificationConfig
from perceiver.tasks.tagging import TaggingConfig, binned_precision
from perceiver.train.engine.protocol import evaluate
from perceiver.train.engine.ranks import Ranks

AUDIO = {"kind": "audio", "samples": 64, "patch": 8, "positions": {"kind": "fourier", "bands": 2}}
VIDEO = {
    "kind": "video",
    "frames": 2,
    "channels": 1,
    "size": [4, 4],
    "patch": [1, 2, 2],
    "mean": [0.5],
    "std": [0.5],
    "positions": {"kind": "fourier", "bands": 1},
}


def small(inputs):
    torch.manual_seed(0)
    values = {
        "kind": "perceiver",
        "inputs": inputs,
        "latents": 4,
        "latent_channels": 16,
        "heads": 2,
        "blocks": 1,
        "cross_attends": 1,
        "self_attends_per_block": 1,
    }
    model = build_model(model_config(values), classes=5).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def recordings(samples=3, clips=4):
    torch.manual_seed(1)
    shape = (samples, clips) if clips else (samples,)
    return {
        "audio": torch.randint(-30000, 30000, (*shape, 64), dtype=torch.int16),
        "video": torch.randint(0, 256, (*shape, 2, 1, 4, 4), dtype=torch.uint8),
        "label": torch.arange(samples) % 5,
        "valid": torch.ones(samples, dtype=torch.bool),
    }


@pytest.mark.parametrize("inputs", [AUDIO, {"kind": "multimodal", "modalities": {"audio": AUDIO, "video": VIDEO}}])
def test_clips_are_scored_one_by_one_and_their_scores_averaged(inputs):
    model, batch = small(inputs), recordings()
    task = build_task(ClassificationConfig(), classes=5)
    probability = task.predict(model, batch)["probability"]
    singly = [
        task.predict(model, {**batch, **{k: batch[k][:, c] for k in ("audio", "video")}})["probability"]
        for c in range(4)
    ]
    torch.testing.assert_close(probability, torch.stack(singly).mean(0))
    assert probability.shape == (3, 5) and (singly[0] - singly[1]).abs().max() > 1e-3
    sums = task.loss(model, batch).sums
    expected = -probability[torch.arange(3), batch["label"]].log().sum()
    torch.testing.assert_close(sums["loss"], expected)


def test_one_clip_is_as_no_clip_axis():
    model, single = small(AUDIO), recordings(clips=0)
    assert torch.equal(clip_logits(model, single, mean_softmax), model(single["audio"]).float())
    one = {**single, "audio": single["audio"][:, None]}
    folded = clip_logits(model, one, mean_softmax)
    torch.testing.assert_close(folded.softmax(1), model(single["audio"]).softmax(1))


def test_inputs_without_clips_are_added_to_each_clip():
    inputs = {"kind": "multimodal", "modalities": {"audio": AUDIO, "video": VIDEO}}
    model, batch = small(inputs), recordings()
    still = {**batch, "video": batch["video"][:, 0]}
    repeated = {**batch, "video": batch["video"][:, :1].expand(-1, 4, -1, -1, -1, -1)}
    torch.testing.assert_close(clip_logits(model, still, mean_softmax), clip_logits(model, repeated, mean_softmax))


def test_a_modality_can_be_taken_out_by_null():
    model = small({"kind": "multimodal", "modalities": {"audio": AUDIO, "video": None}})
    assert model.input_keys == ("audio",)
    assert clip_logits(model, recordings(), mean_softmax).shape == (3, 5)


def test_averages_are_those_of_probabilities_also_where_they_are_extreme():
    logits = torch.tensor([[[-3.0, 40.0, 90.0], [2.0, -1.0, 90.0]]], dtype=torch.float64)
    got = mean_sigmoid(logits)
    torch.testing.assert_close(got[:, :2].sigmoid(), logits.sigmoid().mean(1)[:, :2])
    assert got[0, 2] == pytest.approx(90)
    torch.testing.assert_close(mean_softmax(logits).softmax(-1), logits.softmax(-1).mean(1))


class Scores(torch.nn.Module):
    """Passes scores through."""

    input_keys = ("logits",)

    def forward(self, x):
        return x


def test_mean_average_precision_of_527_classes_in_evaluation_is_scikit_learns():
    """Rare classes, ties, classes without positives, a ragged last batch: the reported value within its own bound."""
    rng = np.random.default_rng(0)
    prior = 10 ** -rng.uniform(0.5, 3, 527)
    targets = rng.random((1500, 527)) < prior
    targets[:, 7] = False
    scores = rng.normal(size=targets.shape) * 2 - 5 + 4 * targets
    scores[:, :40] = np.round(scores[:, :40])
    batches = []
    for first in range(0, 1500, 400):
        part = torch.arange(first, first + 400) % 1500
        batches.append(
            {
                "logits": torch.tensor(scores, dtype=torch.float32)[part],
                "label": torch.tensor(targets)[part].float(),
                "valid": torch.arange(first, first + 400) < 1500,
            }
        )
    task = build_task(TaggingConfig(), classes=527)
    metrics = evaluate(Scores(), task, batches, Ranks(torch.device("cpu")))
    exact = np.mean([average_precision_score(targets[:, k], scores[:, k]) for k in range(527) if targets[:, k].any()])
    error = metrics["mean_average_precision_error"]
    assert abs(metrics["mean_average_precision"] - exact) <= error + 1e-6
    assert error < 0.01  # most of it from the 40 classes of tied scores


def test_bounds_are_valid_for_any_content_of_a_bin():
    rng = np.random.default_rng(1)
    for _ in range(200):
        size = int(rng.integers(2, 60))
        scores, targets = rng.integers(0, 12, size) + rng.random(size) * rng.integers(0, 2), rng.random(size) < 0.4
        targets[0] = True
        bins = np.floor(scores).astype(int)
        counts = [
            torch.tensor(np.bincount(bins[chosen], minlength=14)[None, ::-1].copy()) for chosen in (targets, ~targets)
        ]
        even, least, most = binned_precision(*counts)
        assert float(least) - 1e-9 <= average_precision_score(targets, scores) <= float(most) + 1e-9
        assert float(least) - 1e-9 <= float(even) <= float(most) + 1e-9


@pytest.mark.parametrize(
    ("before", "inside"), [((0, 0), (1, 9)), ((0, 3), (5, 20)), ((10, 10), (20, 40)), ((4, 0), (3, 99))]
)
def test_the_value_of_a_bin_is_near_the_mean_over_the_orders_in_it(
    before: tuple[int, int], inside: tuple[int, int]
) -> None:
    """Positives and negatives of better bins, and of this one."""
    rng = np.random.default_rng(2)
    first, targets = np.repeat([True, False], before), np.repeat([True, False], inside)
    falling = -np.arange(sum(before) + sum(inside))
    drawn = [average_precision_score(np.concatenate([first, rng.permutation(targets)]), falling) for _ in range(1000)]
    counts = [[before[0], 0, inside[0]]], [[0, before[1], inside[1]]]
    even, least, most = (float(each) for each in binned_precision(*map(torch.tensor, counts)))
    assert even == pytest.approx(np.mean(drawn), abs=0.2 * (most - least))


def test_confident_and_broken_scores_are_counted():
    task = build_task(TaggingConfig(bins=64), classes=2)
    logits = torch.tensor([[99.0, -torch.inf], [torch.inf, -99.0], [float("nan"), 0.0]])
    sums = task.loss(Scores().eval(), {"logits": logits, "label": torch.tensor([[1.0, 0], [1, 0], [0, 1]])}).sums
    assert sums["positive"].sum() == 3 and sums["negative"].sum() == 3
    assert sums["positive"][0, 0] == 2 and sums["negative"][1, -1] == 2


def test_spec_augment_follows_the_random_state_and_training_alone():
    config = MelConfig(
        samples=4096,
        rate=16_000,
        window=512,
        hop=256,
        bins=20,
        layout="grid",
        time_masks=1,
        frequency_masks=1,
        mean=-2.0,
        std=3.0,
    )
    module = config.build()
    raw = {"audio": torch.randint(-9000, 9000, (2, 4096), dtype=torch.int16)}

    def run(seed):
        torch.manual_seed(seed)
        return module(raw, torch.float32).data[..., 0]

    module.eval()
    clean = run(0)
    assert torch.equal(clean, run(1))
    module.train()
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1)) and not torch.equal(run(0), clean)
    plain = config.model_copy(update={"mean": 0.0, "std": 1.0}).build().eval()(raw, torch.float32).data[..., 0]
    torch.testing.assert_close(clean, (plain + 2) / 3)
