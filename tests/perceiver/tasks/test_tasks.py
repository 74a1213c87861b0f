"""Every task: sums add up over micro-batches, padding rows do not count, metrics against independent values."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from sklearn.metrics import average_precision_score
from torch import nn

from perceiver import registry
from perceiver.config import UserError
from perceiver.factory import build_model, model_config
from perceiver.tasks import TaskConfig, build_task
from perceiver.tasks.autoencoding import Autoencoding, AutoencodingConfig
from perceiver.tasks.optical_flow import Flow, FlowConfig, tile_starts
from perceiver.tasks.tagging import TaggingConfig, binned_precision

FEW = {"kind": "fourier", "bands": 3}
AUDIO = {"kind": "audio", "samples": 64, "patch": 16, "positions": FEW}
VIDEO = {"kind": "video", "frames": 2, "size": (8, 8), "patch": (1, 4, 4), "positions": FEW}
MODEL = {"latents": 5, "latent_channels": 8, "self_attends_per_block": 1, "heads": 2, "blocks": 1}
AUTOENCODER = {
    "inputs": {
        "kind": "multimodal",
        "modalities": {"audio": AUDIO, "video": VIDEO, "label": {"kind": "label", "classes": 4}},
        "mask": {"label": 0.5},
        "hide": ["label"],
    },
    "decoder": {
        "kind": "multimodal",
        "answer_channels": 6,
        "modalities": {
            "audio": {"grid": [4], "values": 16, "bands": 3, "max_resolution": [64]},
            "video": {"grid": [2, 8, 8], "values": 3, "bands": 3, "max_resolution": [2, 8, 8]},
            "label": {"classes": 4, "channels": 10},
        },
    },
    "query_residual": False,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "classification": ({}, {"inputs": AUDIO}),
    "tagging": ({}, {"inputs": AUDIO}),
    "regression": (
        {"targets": {"names": list("abcd"), "mean": [1.0, 0.0, -1.0, 5.0], "std": [1.0, 2.0, 3.0, 0.5]}},
        {"inputs": AUDIO},
    ),
    "multitask": (
        {"tasks": {"a": 1.0, "b": 0.5}},
        {"inputs": AUDIO, "decoder": {"kind": "multitask", "tasks": {"a": 4, "b": 3}}},
    ),
    "masked_language": (
        {"probability": 0.5},
        {
            "inputs": {"kind": "text", "length": 20, "channels": 8},
            "decoder": {"kind": "tokens"},
            "query_residual": False,
        },
    ),
    "flow": (
        {},
        {
            "inputs": {"kind": "flow_frames", "size": (8, 8), "positions": FEW},
            "decoder": {"kind": "flow"},
            "query_residual": False,
        },
    ),
    "segmentation": (
        {},
        {
            "inputs": {"kind": "image", "channels": 3, "size": (8, 8), "positions": FEW},
            "decoder": {"kind": "pixels"},
            "query_residual": False,
        },
    ),
    "autoencoding": ({"queries": {"video": 5, "audio": 2}}, AUTOENCODER),
    "general": (
        {"captions": ["1"]},
        {
            "inputs": {
                "kind": "multimodal",
                "modalities": {
                    "image": {"kind": "image", "size": (8, 8), "positions": FEW},
                    "text": {"kind": "text", "length": 20, "channels": 8},
                },
            },
            "decoder": {"kind": "general", "boxes": 5, "length": 6},
            "query_residual": False,
        },
    ),
}


def setting(kind: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Return a task, a model with random outputs in evaluation mode, and a batch of six, the last two rows padding."""
    options, values = CASES[kind]
    torch.manual_seed(0)
    task = build_task(TypeAdapter(TaskConfig).validate_python({"kind": kind, **options}), classes=4)
    model = build_model(model_config({"kind": "perceiver_io", **MODEL, **values}), classes=4).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    batch = {
        "audio": torch.randint(-9000, 9000, (6, 64), dtype=torch.int16),
        "video": torch.randint(0, 256, (6, 2, 3, 8, 8), dtype=torch.uint8),
        "text": torch.randint(6, 60, (6, 20)),
        "flow": torch.randn(6, 2, 8, 8),
        "image": torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8),
        "mask": torch.randint(0, 4, (6, 8, 8), dtype=torch.uint8),
        "label": (torch.rand(6, 4) > 0.5).float() if kind == "tagging" else torch.randint(0, 4, (6,)),
        "target": torch.randn(6, 4),
        "answer": torch.tensor([[9, 8, 5, 0], [0, 0, 0, 0], [7, 5, 0, 0], [9, 9, 9, 5], [0] * 4, [9, 5, 0, 0]]),
        "boxes": torch.rand(6, 3, 4) / 2 + 0.25,
        "boxes_count": torch.tensor([-1, 2, 3, 0, 1, -1]),
        "held_out": torch.tensor([0, 0, 1, 0, 0, 1]).bool(),
        "label_a": torch.tensor([0, 1, -1, 3, 0, 0]),
        "label_b": torch.tensor([2, 1, 1, 0, 0, 0]),
        "sample_id": torch.arange(6),
        "valid": torch.tensor([1, 1, 1, 1, 0, 0]).bool(),
    }
    batch["answer_mask"] = batch["answer"] > 0
    return task, model, batch


def rows(batch: dict[str, torch.Tensor], part: slice) -> dict[str, torch.Tensor]:
    return {key: value[part] for key, value in batch.items()}


def test_larger_frames_are_answered_in_weighted_tiles():
    """Each pixel has the mean of its tiles' flows by their distance to the tile's edge."""
    task, model, batch = setting("flow")
    batch = {"video": torch.randint(0, 256, (2, 2, 3, 11, 20), dtype=torch.uint8), "flow": torch.zeros(2, 2, 11, 20)}
    batch["flow_valid"] = torch.ones(2, 11, 20, dtype=torch.bool)
    found = task.predict(model, batch)["prediction"]
    rows = torch.arange(8)
    edge = torch.minimum(rows + 1, 8 - rows).double()
    weight = torch.minimum(edge[:, None], edge[None])
    total, weights = torch.zeros(2, 2, 11, 20).double(), torch.zeros(11, 20).double()
    for top in sorted({*range(3), 3}):
        for left in range(13):
            part = model(batch["video"][..., top : top + 8, left : left + 8])
            total[..., top : top + 8, left : left + 8] += part.double() * weight
            weights[top : top + 8, left : left + 8] += weight
    torch.testing.assert_close(found, (total / weights).float(), rtol=1e-4, atol=1e-5)
    out = task.loss(model, batch)
    wanted = (found.square().sum(1) + 1e-12).sqrt().sum()
    torch.testing.assert_close(out.loss_sum, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "tile", "starts"),
    [(436, 368, [0, 68]), (1024, 496, [0, 476, 528]), (368, 368, [0]), (369, 368, [0, 1]), (10, 8, [0, 1, 2])],
)
def test_tiles_lie_as_in_the_released_code(length: int, tile: int, starts: list[int]):
    assert tile_starts(length, tile) == starts


def test_frames_smaller_than_a_tile_are_refused():
    with pytest.raises(UserError, match="300 pixels for a model of 368.*eval_size"):
        tile_starts(300, 368)


def test_tokens_may_be_asked_by_the_inputs():
    """The queries are the embedded inputs at each position, of a shorter text, too."""
    inputs = {"kind": "text", "length": 20, "channels": 8}
    values = {"inputs": inputs, "decoder": {"kind": "tokens", "queries": "inputs"}, "query_residual": True}
    model = build_model(model_config({"kind": "perceiver_io", **MODEL, **values})).eval()
    assert not [name for name, _ in model.named_parameters() if name.startswith("decoder.query")]
    raw = {"text": torch.randint(6, 60, (2, 9))}
    read = model.inputs(raw, torch.float32)
    torch.testing.assert_close(model.decoder.queries(read, None).data, read.data)
    assert model(raw).shape == (2, 9, 262)


def test_every_task_has_a_case():
    assert set(CASES) == set(registry.members("perceiver.tasks"))


@pytest.mark.parametrize("kind", list(CASES))
def test_padding_rows_do_not_count(kind):
    task, model, batch = setting(kind)
    padded, whole = task.loss(model, batch), task.loss(model, rows(batch, slice(0, 4)))
    if kind not in ("masked_language", "autoencoding"):  # these draw per batch, so the same rows may get other draws
        torch.testing.assert_close(padded.sums, whole.sums, rtol=1e-4, atol=1e-4)
    spoiled = {**batch}
    for key in ("audio", "video", "flow", "label", "target", "mask", "label_a", "boxes"):
        spoiled[key] = batch[key].clone()
        spoiled[key][4:] = 3 if key.startswith("label") else 100
    torch.testing.assert_close(task.loss(model, spoiled).sums, padded.sums, rtol=1e-4, atol=1e-4)
    assert float(task.count(batch)) == float(task.count({**batch, "valid": batch["valid"]}))
    empty = {**batch, "valid": torch.zeros(6, dtype=torch.bool)}
    assert float(task.count(empty)) == 0 and float(task.loss(model, empty).sums["loss"]) == 0


@pytest.mark.parametrize("kind", list(CASES))
def test_loss_trains_and_summary_is_finite(kind):
    task, model, batch = setting(kind)
    output = task.loss(model.train(), batch)
    assert output.loss_sum.dim() == 0 and output.loss_sum.requires_grad
    assert all(value.dim() == 0 and not value.requires_grad for value in output.sums.values())
    torch.testing.assert_close(output.sums["loss"], output.loss_sum.detach())
    output.loss_sum.backward()
    assert all(p.grad is not None for p in model.parameters())
    news = task.loss(model.eval(), batch).sums
    sums = {key: value if value.dim() else float(value) for key, value in news.items()}
    metrics = task.summarise(sums, float(task.count(batch)))
    assert "loss" in metrics and all(math.isfinite(value) for value in metrics.values())
    assert all(len(value) == 6 for value in task.predict(model, batch).values())


@pytest.mark.parametrize(
    "kind", ["classification", "tagging", "regression", "multitask", "flow", "segmentation", "general"]
)
def test_sums_add_up_over_micro_batches(kind):
    task, model, batch = setting(kind)
    whole = task.loss(model, batch).sums
    parts = [task.loss(model, rows(batch, part)).sums for part in (slice(0, 1), slice(1, 6))]
    for key, value in whole.items():
        torch.testing.assert_close(parts[0][key] + parts[1][key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["classification", "tagging", "segmentation", "multitask", "autoencoding", "general"])
def test_a_negative_label_is_none(kind):
    """It once raised an IndexError, of the loss over classes."""
    task, model, batch = setting(kind)
    key = {"segmentation": "mask", "multitask": "label_b"}.get(kind, "label")
    none = {**batch, key: batch[key].long().clone()}
    none[key][0] = -1
    found = task.loss(model, none)
    if kind in ("classification", "tagging", "segmentation", "general"):
        without = {**batch, "valid": batch["valid"] & (torch.arange(6) > 0)}
        assert float(task.count(none)) == float(task.count(without)) > 0
        torch.testing.assert_close(found.sums, task.loss(model, without).sums)
    elif kind == "autoencoding":
        whole = task.loss(model, batch)
        assert float(task.count(none)) == 4 and found.sums["labels"] == 3
        assert 0 < whole.loss_sum - found.loss_sum < 1e-4 * 20
        sums = {**dict.fromkeys(whole.sums, 1.0), "correct": 3.0, "labels": 3.0}
        assert task.summarise(sums, 4)["accuracy"] == 1
    assert found.loss_sum.isfinite()
    task.loss(model.train(), none).loss_sum.backward()


def test_an_unknown_entry_of_several_labels_does_not_count():
    task, model, batch = setting("tagging")
    one = {**batch, "label": batch["label"].clone()}
    one["label"][0] = torch.tensor([1.0, -1.0, 0.0, -1.0])
    logits = model(one["audio"])
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    wanted = binary(logits[0, [0, 2]], torch.tensor([1.0, 0.0])) + 3 * binary(logits[1:4], batch["label"][1:4])
    found = task.loss(model, one).sums
    torch.testing.assert_close(found["loss"], wanted.detach())
    assert (found["positive"] + found["negative"]).sum(1).tolist() == [4, 3, 4, 3]


def test_binned_precision_over_micro_batches_is_close_to_exact():
    class Scores(torch.nn.Module):
        input_keys = ("logits",)

        def forward(self, x):
            return x

    torch.manual_seed(0)
    targets = (torch.rand(600, 4) > 0.7).float()
    logits = torch.randn(600, 4) * 2 + 2 * targets
    task, model = build_task(TaggingConfig(), classes=4), Scores().eval()
    parts = [task.loss(model, {"logits": logits[p], "label": targets[p]}).sums for p in (slice(0, 99), slice(99, 600))]
    sums = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    exact = average_precision_score(targets, logits, average="macro")
    got = task.summarise(sums, 600)
    assert got["mean_average_precision"] == pytest.approx(exact, abs=got["mean_average_precision_error"] + 1e-12)
    assert got["mean_average_precision_error"] < 2e-3
    assert got["mean_average_precision"] == pytest.approx(exact, abs=5e-4)


def test_a_model_that_gives_all_samples_one_score_has_the_precision_of_chance():
    positive, negative = torch.zeros(3, 8), torch.zeros(3, 8)
    positive[:, 2], negative[:, 2] = torch.tensor([1.0, 60.0, 300.0]), torch.tensor([299.0, 240.0, 0.0])
    even, least, most = binned_precision(positive, negative)
    assert even.tolist() == pytest.approx([1 / 300, 0.2, 1], abs=1 / 300)
    assert (least <= even).all() and (even <= most).all() and most.tolist() == [1, 1, 1]


def test_whole_words_are_masked_at_the_rate_and_by_step():
    task, _, batch = setting("masked_language")
    space = 32 + 6
    batch["text"] = torch.where(torch.arange(20) % 4 == 3, space, batch["text"].clamp(min=39)).repeat(200, 1)
    batch = {"text": batch["text"], "sample_id": torch.arange(1200)}
    masked = task.masked(batch).view(1200, 5, 4)
    assert (masked[..., :3].all(-1) | ~masked[..., :3].any(-1)).all() and not masked[..., 3].any()
    assert abs(float(masked[..., 0].float().mean()) - 0.5) < 0.03
    assert torch.equal(task.masked(batch).view(1200, 5, 4), masked)
    task.step = 7
    assert not torch.equal(task.masked(batch).view(1200, 5, 4), masked)


def test_flow_error_by_hand_and_infinite_unknowns():
    task, model, batch = setting("flow")
    predicted = model(batch["video"])
    batch["flow"] = predicted.detach() + torch.tensor([3.0, 4.0])[:, None, None]
    batch["flow_valid"] = torch.ones(6, 8, 8, dtype=torch.bool)
    batch["flow_valid"][0, :4] = False
    batch["flow"][0, :, :4] = torch.inf
    output = task.loss(model, batch)
    count = float(task.count(batch))
    assert count == 4 * 64 - 32
    assert task.summarise({k: float(v) for k, v in output.sums.items()}, count)["epe"] == pytest.approx(5.0, rel=1e-4)
    output.loss_sum.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_subsampled_decoding_agrees_with_decoding_all():
    task, model, batch = setting("autoencoding")
    raw = {"audio": batch["audio"], "video": batch["video"]}
    asked = task.asked(batch, training=True)
    assert asked["video"].shape == (6, 5) and len(asked["video"][0].unique()) == 5
    assert not torch.equal(asked["video"][0], asked["video"][1])
    with torch.no_grad():
        some, every = model(raw, asked), model(raw)
    for name in ("audio", "video"):
        index = asked[name][..., None].expand_as(some[name])
        torch.testing.assert_close(every[name].gather(1, index), some[name], rtol=1e-4, atol=1e-5)
    predicted = task.predict(model, batch)
    torch.testing.assert_close(predicted["video"], every["video"], rtol=1e-4, atol=1e-5)
    pixels = batch["video"].float() / 255
    torch.testing.assert_close(task.targets(batch, "video")[1, 64 + 8 * 2 + 3], pixels[1, 1, :, 2, 3])
    signed = Autoencoding(AutoencodingConfig(video_range="signed"))
    torch.testing.assert_close(signed.targets(batch, "video"), 2 * task.targets(batch, "video") - 1)
    # The same picture, so the same signal to noise ratio: errors are twice as large in twice the range.
    zero = {"loss": 0.0, "square/audio": 0.01, "correct": 0.0, "labels": 0.0}
    found = [t.summarise({**zero, "square/video": s}, 1)["psnr_video"] for t, s in ((task, 0.01), (signed, 0.04))]
    assert found == pytest.approx([20, 20])


def test_flow_of_some_pixels_estimates_the_full_loss():
    """All pixels in any order give the whole loss and gradient; a quarter of them gives it on average."""
    _, model, batch = setting("flow")
    nn.init.normal_(model.decoder.head.weight)
    batch["flow_valid"] = torch.rand(6, 8, 8) > 0.3
    batch["sample_id"] = torch.arange(6)
    model.train()
    whole = Flow(FlowConfig()).loss(model, batch).loss_sum
    (wanted,) = torch.autograd.grad(whole, [model.decoder.head.weight])
    task = Flow(FlowConfig(queries=64))
    same = task.loss(model, batch).loss_sum
    assert torch.allclose(same, whole, rtol=1e-5)
    (got,) = torch.autograd.grad(same, [model.decoder.head.weight])
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    some, losses = Flow(FlowConfig(queries=16)), []
    for some.step in range(200):
        losses.append(some.loss(model, batch).loss_sum.item())
    spread = torch.tensor(losses).std().item()
    assert spread > 0, "other pixels at each step"
    assert abs(sum(losses) / 200 - whole.item()) < 4 * spread / 200**0.5
    model.eval()
    assert torch.equal(some.loss(model, batch).loss_sum, Flow(FlowConfig()).loss(model, batch).loss_sum)
