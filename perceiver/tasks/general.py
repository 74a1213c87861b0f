"""General-purpose vision and language: boxes and a text for an image and a task in words.

Source: GPV-1 (Gupta et al., CVPR 2022, arXiv 2104.00743), section 3 and its code: boxes are matched as in DETR with
costs of 1 for relevance, 5 for L1 and 2 for the generalized IoU; cross-entropy of relevance with a weight of 0.1 for
"none", 5 x L1 and 2 x (1 - GIoU) of the matched boxes; cross-entropy of the text's tokens up to the end.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from perceiver.config import Config, NonNegative
from perceiver.tasks._answers import Answers, answer_targets, check_length, predicted_answers, right_answers
from perceiver.tasks._base import Batch, LossOutput, Task, model_inputs, network, valid_rows
from perceiver.tasks._boxes import average_precision, generalized_iou, match
from perceiver.tasks._skills import PARTS, skill_figures

RELEVANT = 0
"""Index of the relevant class in the logits of relevance; the other is "none"."""
VOTES = 3
"""People who gave an answer that counts fully (VQA; Antol et al. 2015)."""


class GeneralConfig(Config):
    """Boxes under `boxes` (B, R, 4), a text under `answer` (B, T), the skill of a sample under `label` (B,).

    Optional: `answers` (B, R, T), all right texts of a sample of an evaluation.
    """

    kind: Literal["general"] = "general"
    weights: dict[str, NonNegative] = Field(
        default={},
        description="Weight of the loss by skill, 1 by default; samples of a skill of weight 0 do not count.",
    )
    captions: tuple[str, ...] = Field(
        default=("describe",), description="Skills whose texts are also compared by CIDEr-D, if the data have them."
    )
    skills: tuple[str, ...] | None = Field(
        default=None, description="Names of the skills; default: the classes of the data, which a run keeps."
    )
    none_weight: NonNegative = Field(default=0.1, description="Weight of a query without a box in the relevance loss.")
    l1: NonNegative = Field(default=5.0, description="Weight of the L1 distance of boxes, in matching and loss.")
    giou: NonNegative = Field(default=2.0, description="Weight of 1 - generalized IoU of boxes, in matching and loss.")
    text: NonNegative = Field(default=1.0, description="Weight of the text's cross-entropy.")
    reduction: Literal["mean", "sum"] = Field(
        default="mean", description="Of the cross-entropy over the tokens of an answer; GPV-1 has their sum."
    )

    @model_validator(mode="after")
    def _known_skills(self) -> "GeneralConfig":
        if self.skills is not None and (strange := self.weights.keys() - set(self.skills)):
            raise ValueError(f"weights has {min(strange)}, which is no skill of the data: {', '.join(self.skills)}")
        return self

    def build(self, *, classes: int) -> Task:
        """Build the task."""
        return General(self, classes)


class General:
    """See `GeneralConfig`. A sample has a text, boxes or both; each sample counts once, whatever it has.

    The model gives `boxes` (B, Q, 4), `relevance` (B, Q, 2) and `text` (B, W, tokens). A model that has `words` decodes
    its own words one after the other; in training it reads the true ones before each.

    Losses are means over a sample's tokens, queries and true boxes, so that they do not depend on the micro-batch;
    GPV-1 divides by the boxes of a batch.
    """

    def __init__(self, config: GeneralConfig, classes: int) -> None:
        self.config = config
        self.skills = config.skills if config.skills is not None else tuple(map(str, range(classes)))
        self.weights = torch.tensor([config.weights.get(skill, 1.0) for skill in self.skills])
        self.captions = torch.tensor([skill in config.captions for skill in self.skills])
        self.described = {"skills": list(self.skills)}

    def _valid(self, batch: Batch) -> Tensor:
        """Return the samples (B,) that have a target of a skill that is trained."""
        label = batch["label"]
        known = (label >= 0) & (label < len(self.skills))
        weighed = self._weights(batch) > 0
        has = batch["answer_mask"].any(1) | (batch["boxes_count"] >= 0)
        return valid_rows(batch, len(label), label.device) & known & weighed & has

    def _weights(self, batch: Batch) -> Tensor:
        return self._of_skill(self.weights, batch)

    def _of_skill(self, values: Tensor, batch: Batch) -> Tensor:
        """Return each sample's (B,) of the skills' values; those of samples without a known skill do not count."""
        label = batch["label"]
        return values.to(label.device)[label.clamp(0, len(self.skills) - 1)]

    def count(self, batch: Batch) -> Tensor:
        """Return the number of samples that have a target of a skill that is trained."""
        return self._valid(batch).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum the losses over the valid samples; count right answers and average precisions by skill."""
        valid = self._valid(batch)
        words = getattr(network(model), "words", None)
        target = answer_targets(batch, words)
        inputs = model_inputs(model, batch)
        output: dict[str, Tensor] = model(inputs) if words is None else model(inputs, {"answer": target.ids})
        text = self.text_loss(output["text"].float(), target)
        boxes, relevance = output["boxes"].float(), output["relevance"].float()
        place = self.box_loss(boxes, relevance, batch)
        weight = self._weights(batch) * valid
        loss_sum = (weight * (text + place)).sum()
        sums: dict[str, Tensor] = {"loss": loss_sum.detach()}
        for name, each in (("text", text), ("boxes", place)):
            sums[f"loss/{name}"] = (each.detach() * valid).sum()
        rows: dict[str, Tensor] = {}
        with torch.no_grad():
            shown = predicted_answers(output.get("greedy", output["text"]), words)
            right = right_answers(batch)
            figures = self._figures(batch, shown.equal(right).sum(1), boxes, relevance)
            for skill, part, chosen in self._groups(batch, valid):
                for name, values in figures.items():
                    there = chosen & values.isfinite()
                    sums[f"{name}/{skill}/{part}"] = values.where(there, torch.zeros_like(values)).sum()
                    sums[f"{name}_count/{skill}/{part}"] = there.sum().float()
                if skill in self.config.captions and not model.training:
                    chosen = chosen & batch["answer_mask"].any(1)
                    rows[f"texts/{skill}/{part}"] = shown.beside(right)[chosen]
        return LossOutput(loss_sum, sums, rows)

    def text_loss(self, logits: Tensor, target: Answers) -> Tensor:
        """Return the cross-entropy (B,) of the tokens of each answer, its end included; 0 without one."""
        size = target.ids.shape[1]
        check_length(target.ids, logits.shape[1])
        each = nn.functional.cross_entropy(logits[:, :size].transpose(1, 2), target.ids, reduction="none")
        total = (each * target.mask).sum(1)
        if self.config.reduction == "mean":
            total = total / target.mask.sum(1).clamp(min=1)
        return self.config.text * total

    def box_loss(self, boxes: Tensor, relevance: Tensor, batch: Batch) -> Tensor:
        """Return the loss (B,) of each sample's boxes by the best matching; 0 for samples that have none to find."""
        c, true, count = self.config, batch["boxes"].float(), batch["boxes_count"]
        with torch.no_grad():
            cost = c.l1 * torch.cdist(boxes, true, p=1) - c.giou * generalized_iou(boxes[:, :, None], true[:, None])
            query = match(cost - relevance.softmax(-1)[..., RELEVANT, None], count)
        matched = query >= 0
        found = boxes.gather(1, query.clamp(min=0)[..., None].expand(-1, -1, 4))
        apart = c.l1 * (found - true).abs().sum(-1) + c.giou * (1 - generalized_iou(found, true))
        near = (apart.where(matched, torch.zeros_like(apart))).sum(1) / count.clamp(min=1)
        # Index Q takes what padding would mark.
        marked = torch.zeros(len(boxes), boxes.shape[1] + 1, dtype=torch.bool, device=boxes.device)
        marked = marked.scatter(1, query.where(matched, torch.full_like(query, boxes.shape[1])), True)[:, :-1]
        share = torch.ones_like(relevance[..., 0]).where(marked, torch.full_like(relevance[..., 0], c.none_weight))
        wanted = torch.full_like(query[:, :1], 1 - RELEVANT).where(~marked, RELEVANT)
        each = nn.functional.cross_entropy(relevance.transpose(1, 2), wanted, reduction="none")
        total = near + (each * share).sum(1) / share.sum(1).clamp(min=1e-6)
        return total * (count >= 0)

    def _groups(self, batch: Batch, valid: Tensor) -> list[tuple[str, str, Tensor]]:
        """Return the samples (B,) of each skill, of pairs that are trained and of those held out."""
        hidden = batch.get("held_out")
        hidden = torch.zeros_like(valid) if hidden is None else hidden
        return [
            (skill, part, valid & (batch["label"] == number) & (hidden == (part == PARTS[1])))
            for number, skill in enumerate(self.skills)
            for part in PARTS
        ]

    def _figures(self, batch: Batch, votes: Tensor, boxes: Tensor, relevance: Tensor) -> dict[str, Tensor]:
        """Return the figures (B,) of each sample, NaN for those that a sample does not have.

        `votes` (B,) are the right texts that are the model's. Of samples with `answers`, a caption is right if there is
        one; another text as in VQA, min(votes / 3, 1).
        """
        exact = (votes > 0).float()
        if "answers" in batch:
            caption = self._of_skill(self.captions, batch)
            exact = exact.where(caption | ~batch["answers"].flatten(1).any(1), (votes / VOTES).clamp(max=1))
        exact = exact.where(batch["answer_mask"].any(1), torch.nan)
        scores, counts = relevance.softmax(-1)[..., RELEVANT], batch["boxes_count"]
        ap = [
            average_precision(each.cpu(), score.cpu(), true[:count].cpu()) if count > 0 else torch.nan
            for each, score, true, count in zip(boxes, scores, batch["boxes"], counts.tolist(), strict=True)
        ]
        none = (scores < 0.5).all(1).float().where(counts == 0, torch.nan)
        return {"exact": exact, "ap50": exact.new_tensor(ap), "none": none}

    def summarise(self, sums: Mapping[str, Any], count: float) -> dict[str, float]:
        """Return loss, its parts, and figures of each skill, see `perceiver.tasks._skills.skill_figures`."""
        count = max(count, 1.0)
        metrics = {"loss": sums["loss"] / count}
        metrics |= {f"loss_{name}": sums[f"loss/{name}"] / count for name in ("text", "boxes")}
        trained = [skill for skill in self.skills if self.config.weights.get(skill, 1.0) > 0]
        return metrics | skill_figures(trained, self.config.captions, sums)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `boxes` (B, Q, 4) in shares of the image, their `relevance` (B, Q) from 0 to 1, and the text.

        The text is `answer` (B, T) in byte ids up to its end, and `ended` (B,), False for one without an end.
        """
        net = network(model)
        output: dict[str, Tensor] = model(model_inputs(model, batch))
        shown = predicted_answers(output["text"], getattr(net, "words", None))
        relevance = output["relevance"].float().softmax(-1)[..., RELEVANT]
        return {"boxes": output["boxes"].float(), "relevance": relevance, "answer": shown.ids, "ended": shown.ended}

    texts = ("answer", "true_answer")
    """What `predict` and `known` return as byte ids of a text."""

    def known(self, batch: Batch) -> dict[str, Tensor]:
        """Return the skill as `label`, and `true_boxes`, their `true_count`, `true_answer` and `held_out`, if known."""
        names = {
            "label": "label",
            "boxes": "true_boxes",
            "boxes_count": "true_count",
            "answer": "true_answer",
            "held_out": "held_out",
        }
        return {name: batch[key] for key, name in names.items() if key in batch}

    def finish(self, output: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of an exported model: boxes, their relevance from 0 to 1, logits of the text."""
        relevance = output["relevance"].softmax(-1)[..., RELEVANT]
        return {"boxes": output["boxes"], "relevance": relevance, "answer": output["text"]}
