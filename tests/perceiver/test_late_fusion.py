"""Late fusion: what each way to combine computes, frozen branches, and what is refused."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from perceiver.config import UserError
from perceiver.optim.freezing import freeze
from perceiver.tasks import model_inputs
from tests.perceiver.test_baselines import BRANCHES, build


def raw(model: Any, batch: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {key: torch.randint_like(x, 0, 99) for key, x in model.example(batch, "cpu").items()}


def scores(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the branches' own logits (B, 2, K)."""
    audio, video = model.branches["audio"], model.branches["video"]
    return torch.stack([audio(given["audio"]), video(given["video"])], 1)


@pytest.mark.parametrize("combine", ["average", "regression", "attention"])
def test_a_fusion_starts_as_the_mean_of_the_logits(combine: str) -> None:
    model = build("late_fusion", {"branches": BRANCHES, "combine": combine}).eval()
    given = raw(model)
    torch.testing.assert_close(model(given), scores(model, given).mean(1))


def test_attention_weighs_the_branches_for_each_class() -> None:
    """y = a * s_audio + (1 - a) * s_video, a the softmax of linear maps of all logits (Fayek and Kumar)."""
    model = build("late_fusion", {"branches": BRANCHES}).eval()
    torch.nn.init.normal_(model.head[0].weight)
    given = raw(model)
    both = scores(model, given)
    u = both.flatten(1) @ model.head[0].weight.T + model.head[0].bias
    share = 1 / (1 + (u[:, 3:] - u[:, :3]).exp())
    torch.testing.assert_close(model(given), share * both[:, 0] + (1 - share) * both[:, 1])


def test_the_joint_classifier_reads_both_features() -> None:
    values = {"branches": BRANCHES, "combine": "joint", "hidden": (7,), "heads": True}
    model = build("late_fusion", values).eval()
    given = raw(model)
    stacked = model(given)
    joined = torch.cat([model.branches["audio"].features(given), model.branches["video"].features(given)], 1)
    assert stacked.shape == (4, 3, 3) and model.head_names == ("audio", "video", "joint")
    torch.testing.assert_close(stacked[:, :2], scores(model, given))
    torch.testing.assert_close(stacked[:, 2], model.head(joined))
    assert build("late_fusion", {**values, "heads": False}).eval()(given).shape == (4, 3)


def test_a_frozen_branch_is_never_in_training_mode() -> None:
    model = build("late_fusion", {"branches": BRANCHES})
    freeze(model, ["branches.audio.*"])
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(raw(model)).sum().backward()
    changed = {name.split(".")[1] for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {"video"}, "batch norms of the frozen branch keep their statistics"
    assert model.training and model.branches["video"].training and not model.branches["audio"].training


def test_a_branch_gets_what_tasks_add_for_its_inputs() -> None:
    model = build("late_fusion", {"branches": BRANCHES, "combine": "joint"})
    batch = {**raw(model), "mix_partner": torch.tensor([1, 0, 3, 2]), "mix_share": torch.full((4,), 0.5)}
    given = model_inputs(model.train(), batch)
    assert isinstance(given, dict) and set(given) == {"audio", "video", "mix_partner", "mix_share"}
    assert set(model_inputs(model.eval(), batch)) == {"audio", "video"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": {"audio": BRANCHES["audio"]}}, "at least 2"),
        ({"branches": {**BRANCHES, "joint": BRANCHES["audio"]}}, "the name 'joint'"),
        ({"branches": {**BRANCHES, "video": {"kind": "late_fusion"}}}, "video: wanted a model"),
        ({"branches": {**BRANCHES, "video": {"preset": "cnn15"}}}, "video: .*cnn15"),
        ({"branches": {**BRANCHES, "video": {**BRANCHES["video"], "stm": 3}}}, r"branches\.video\.stm"),
        ({"branches": BRANCHES, "heads": True}, "wanted combine joint"),
    ],
)
def test_a_wrong_section_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, UserError), match=message):
        build("late_fusion", changes)


def test_joint_needs_features() -> None:
    embeddings = {"kind": "segment_pool", "inputs": {"kind": "embeddings"}}
    with pytest.raises(UserError, match=r"model\.branches\.audio: kind segment_pool has no features"):
        build("late_fusion", {"branches": {**BRANCHES, "audio": embeddings}, "combine": "joint"})
