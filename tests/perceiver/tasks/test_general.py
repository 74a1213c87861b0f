"""The task general: losses against a brute-force matching, figures by skill, texts and their end."""

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from perceiver.config import UserError
from perceiver.tasks import build_task
from perceiver.tasks._answers import predicted_answers
from perceiver.tasks._boxes import generalized_iou
from perceiver.tasks._captions import cider_d
from perceiver.tasks.general import GeneralConfig
from perceiver.text_ids import byte_ids, byte_text
from perceiver.train.engine.protocol import evaluate
from perceiver.train.engine.ranks import Ranks

SKILLS = ("ask", "describe", "locate")


class Fixed(nn.Module):
    """A model whose outputs are given with the batch."""

    input_keys = ("given_boxes", "given_relevance", "given_text")

    def forward(self, raw):
        return {name.removeprefix("given_"): value for name, value in raw.items()}


def answer(text: str, length: int = 40) -> list[int]:
    ids = byte_ids(text, length + 1)[1:] if text else []
    return ids + [0] * (length - len(ids))


def logits(texts: list[str], *, end: bool = True) -> torch.Tensor:
    ids = torch.tensor([answer(text) for text in texts])
    if not end:
        ids = ids.where(ids != 5, 40)
    return 30.0 * nn.functional.one_hot(ids, 262).float()


def batch_of(skills: list[str], texts: list[str], said: list[str], **more: Any) -> dict[str, torch.Tensor]:
    rows = len(skills)
    ids = torch.tensor([answer(text) for text in texts])
    return {
        "label": torch.tensor([SKILLS.index(skill) for skill in skills]),
        "answer": ids,
        "answer_mask": ids > 0,
        "boxes": torch.zeros(rows, 2, 4),
        "boxes_count": torch.full((rows,), -1),
        "held_out": torch.zeros(rows, dtype=torch.bool),
        "given_boxes": torch.rand(rows, 3, 4) / 2 + 0.2,
        "given_relevance": torch.randn(rows, 3, 2),
        "given_text": logits(said),
        **more,
    }


def metrics(batches: list[dict[str, torch.Tensor]], **settings: Any) -> dict[str, float]:
    task = build_task(GeneralConfig(skills=SKILLS, **settings), classes=3)
    return evaluate(Fixed(), task, batches, Ranks(torch.device("cpu")))


def test_loss_of_boxes_by_trying_every_matching():
    torch.manual_seed(0)
    batch = batch_of(["locate"] * 3, [""] * 3, ["a"] * 3, boxes_count=torch.tensor([2, 1, 0]))
    batch["boxes"] = torch.rand(3, 2, 4) / 2 + 0.2
    task: Any = build_task(GeneralConfig(skills=SKILLS), classes=3)
    found, relevance = batch["given_boxes"], batch["given_relevance"]
    probability, wanted = relevance.softmax(-1)[..., 0], []
    for row, count in enumerate([2, 1, 0]):
        true = batch["boxes"][row, :count]
        best: tuple[float, Any] = (float("inf"), ())
        for queries in itertools.permutations(range(3), count):
            chosen = found[row, list(queries)]
            near = 5 * (chosen - true).abs().sum() - 2 * generalized_iou(chosen, true).sum()
            cost = float(near - probability[row, list(queries)].sum())
            best = min(best, (cost, queries))
        queries = list(best[1])
        weight = torch.tensor([1.0, 0.1])
        none = torch.tensor([0 if query in queries else 1 for query in range(3)])
        entropy = nn.functional.cross_entropy(relevance[row], none, weight)  # weighted mean
        chosen = found[row, queries]
        near = 5 * (chosen - true).abs().sum() + 2 * (1 - generalized_iou(chosen, true)).sum()
        wanted.append(entropy + near / max(count, 1))
    torch.testing.assert_close(task.box_loss(found, relevance, batch), torch.stack(wanted))
    torch.testing.assert_close(task.loss(Fixed(), batch).sums["loss"], torch.stack(wanted).sum())


def test_loss_of_a_text_is_over_its_bytes_and_its_end():
    batch = batch_of(["ask", "ask"], ["no", "three"], ["a", "b"])
    batch["given_text"] = torch.zeros(2, 40, 262)
    each = torch.tensor(262.0).log()
    for reduction, wanted in (("mean", [1.0, 1.0]), ("sum", [3.0, 6.0])):
        task: Any = build_task(GeneralConfig(skills=SKILLS, reduction=reduction, weights={"ask": 0.5}), classes=3)
        found = task.loss(Fixed(), batch).sums["loss"]
        torch.testing.assert_close(found, 0.5 * each * sum(wanted))


def test_figures_by_skill_do_not_depend_on_the_batches():
    skills = ["ask", "ask", "ask", "describe", "describe", "describe"]
    texts = ["two", "red", "no", "a red seven, a blue two", "a green one", "a blue two, a red nine"]
    said = ["two", "red one", "no", "a red seven, a blue two", "a red one", "a blue two, a red nine"]
    batch = batch_of(skills, texts, said, held_out=torch.tensor([0, 1, 1, 0, 1, 0]).bool())
    whole = metrics([batch])
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 4), slice(4, 6))]
    again = metrics(parts)
    assert again == pytest.approx(whole, rel=1e-6)
    assert whole["accuracy_ask"] == pytest.approx(2 / 3) and whole["accuracy_ask_held_out"] == 0.5
    assert whole["exact_describe"] == pytest.approx(2 / 3) and whole["exact_describe_seen"] == 1
    assert whole["cider_describe"] > whole["cider_describe_held_out"] >= 0
    assert whole["cider_describe_seen"] > 8
    assert whole["general"] == pytest.approx(2 / 3) and whole["general_held_out"] == pytest.approx(0.25)
    assert not any("locate" in name for name in whole), "no sample has one"


def test_several_right_answers_are_votes_and_references():
    skills = ["ask"] * 4 + ["describe"] * 3
    answers = [
        ["two"] * 6 + ["three"] * 2 + ["no"],
        ["two"] * 6 + ["three"] * 2 + ["no"],
        ["two"] * 6 + ["three"] * 2 + ["no"],
        [],
        ["a red seven", "one seven in red", "seven"],
        ["a green one", "one on grass"],
        [],
    ]
    firsts = ["two", "two", "two", "red", "a red seven", "a green one", "a blue two"]
    said = ["two", "three", "four", "red", "one seven in red", "a green two", "a blue two"]
    ids = torch.tensor([[answer(text) for text in (texts + [""] * 9)[:9]] for texts in answers])
    found = metrics([batch_of(skills, firsts, said, answers=ids)])
    assert found["accuracy_ask"] == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert found["exact_describe"] == pytest.approx(2 / 3)
    wanted = cider_d(said[4:], [answers[4], answers[5], ["a blue two"]])
    assert found["cider_describe"] == pytest.approx(wanted.mean())
    assert wanted.mean() != pytest.approx(cider_d(said[4:], [[text] for text in firsts[4:]]).mean())


def test_boxes_are_ranked_by_relevance_and_none_is_an_answer():
    true = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
    batch = batch_of(["locate"] * 2, [""] * 2, ["a"] * 2, boxes_count=torch.tensor([2, 0]))
    batch["boxes"] = true.expand(2, 2, 4).clone()
    batch["given_boxes"] = torch.cat([true, torch.tensor([[0.5, 0.5, 0.9, 0.9]])]).expand(2, 3, 4).clone()
    batch["given_relevance"] = torch.tensor([[[3.0, 0], [2, 0], [1, 0]], [[-3.0, 0], [-2, 0], [-1, 0]]])
    found = metrics([batch])
    assert found["ap50_locate"] == 1 and found["none_locate"] == 1
    batch["given_relevance"] = -batch["given_relevance"]
    found = metrics([batch])
    assert 0.5 < found["ap50_locate"] < 0.7 and found["none_locate"] == 0


def test_samples_of_other_skills_and_without_targets_do_not_count():
    batch = batch_of(["ask", "describe", "locate"], ["no", "a red one", ""], ["no", "a red one", ""])
    task = build_task(GeneralConfig(skills=SKILLS, weights={"describe": 0}), classes=3)
    assert float(task.count(batch)) == 1  # a sample of locate without boxes has nothing to learn
    assert "exact_describe" not in metrics([batch], weights={"describe": 0})


def test_unknown_skills_are_refused():
    with pytest.raises(ValidationError, match="count.*ask, describe, locate"):
        GeneralConfig(skills=SKILLS, weights={"count": 1.0})


def test_longer_answers_than_queries_are_refused():
    batch = batch_of(["ask"], ["no"], ["no"])
    batch["given_text"] = batch["given_text"][:, :30]
    with pytest.raises(UserError, match=r"answer_length = 40.*30.*model\.decoder\.length"):
        metrics([batch])


def test_a_text_ends_at_its_end_and_is_marked_otherwise():
    scores = logits(["no way"])
    ids = scores.argmax(-1)
    ids[0, 9:20] = 50  # what follows the end is arbitrary
    shown = predicted_answers(nn.functional.one_hot(ids, 262).float())
    assert byte_text(shown.ids[0].tolist()) == "no way" and shown.ended.all()
    assert not predicted_answers(logits(["no way"], end=False)).ended.any()
    assert byte_text([6 + 0xE9, 6 + ord("a"), 5, 60]) == "\ufffda"
