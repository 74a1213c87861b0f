"""GPV-1: an image and a task in words go in, boxes with their relevance and words come out.

Source: Gupta, Kamath, Kembhavi, Hoiem, CVPR 2022 (arXiv 2104.00743), section 3, and its code: DETR, RoIAlign of the
predicted boxes, BERT, co-attention of ViLBERT, a Transformer that decodes words. Differs: the text's padding does not
take part; the embeddings of the words are learned, by default also the encoder of the text, which reads bytes.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.attention import linear
from perceiver.baselines._gpv_detector import ConvDetectorConfig, Detector, DetrDetectorConfig, region_features
from perceiver.baselines._gpv_layers import CoAttention, DecoderLayer, causal_mask, key_mask
from perceiver.baselines._gpv_reader import BertReader, ReaderConfig
from perceiver.baselines._gpv_words import START, Words, count_words
from perceiver.config import Config, Layers, Real, Size, UserError
from perceiver.modalities import InputsConfig
from perceiver.model import Raw, latent_array, numbered


class GpvConfig(Config):
    """GPV-1; the defaults are the published sizes."""

    decodes: ClassVar[str] = "general"
    """The decoder of Perceiver IO whose outputs the model has."""
    kind: Literal["gpv"] = "gpv"
    inputs: InputsConfig = Field(description="Kind multimodal with an image without positions, and a text.")
    detector: Annotated[ConvDetectorConfig | DetrDetectorConfig, Field(discriminator="kind")] = Field(
        default=DetrDetectorConfig(), description="What finds boxes."
    )
    reader: ReaderConfig = Field(default=ReaderConfig(), description="What reads the task.")
    points: Size = Field(default=7, description="Places per side of a box at which the features are read.")
    width: Size = Field(default=768, description="Width of regions, text and words after detector and reader.")
    co_layers: Layers = Field(default=3, description="Layers of co-attention.")
    co_heads: Size = Field(default=16, description="Heads of each.")
    co_hidden: Size = Field(default=3072, description="Inner width of their feed-forward parts.")
    decoder_layers: Layers = Field(default=3, description="Layers of the decoder of words.")
    decoder_heads: Size = Field(default=8, description="Heads of each.")
    decoder_hidden: Size = Field(default=2048, description="Inner width of their feed-forward parts.")
    dropout: Real = Field(default=0.1, ge=0, lt=1, description="In co-attention and decoder.")
    words: tuple[str, ...] = Field(
        default=(),
        description="Vocabulary of the answers; default: the words of the training answers, which a run keeps.",
    )
    least_count: Size = Field(default=1, description="How often a word must occur in the training answers.")
    length: Size = Field(default=20, description="Most words of an answer, its end included.")

    def build(self, *, classes: int | None = None) -> nn.Module:
        """Build the module."""
        return Gpv(self)


class Memory(NamedTuple):
    """What the decoder reads, and the boxes."""

    states: Tensor
    mask: Tensor | None
    boxes: Tensor
    relevance: Tensor


class Gpv(nn.Module):
    """See `GpvConfig`.

    Attributes: `words` maps answers to the words that the model decodes (`perceiver.tasks.general`).
    """

    input_keys = ("image", "text")
    optional_keys = ("text_mask",)

    def __init__(self, config: GpvConfig) -> None:
        super().__init__()
        self.config = config
        self.words = Words(config.words, config.length)
        image, text = _parts(config)
        self.image, self.text_length = image.build(), text.length
        self.text = None if config.reader.kind == "bert" else text.build()
        self.detector: Detector = config.detector.build(cast(Any, self.image).channels)
        read, width, drop = text.channels, config.width, config.dropout
        self.reader = config.reader.build(text)
        self.join_regions = linear(self.detector.width + self.detector.channels, width)
        self.join_text = linear(read, width)
        self.connect = nn.ModuleList(
            CoAttention(width, config.co_heads, config.co_hidden, drop) for _ in range(config.co_layers)
        )
        self.relevance = linear(width, 2)
        self.condition = latent_array(2, width, 0.02)
        self.vocabulary = nn.Embedding(self.words.size, width)
        nn.init.normal_(self.vocabulary.weight, std=width**-0.5)  # so that the first logits are about 1
        self.say, self.judge = linear(width, width), linear(width, width)
        self.decoder = nn.ModuleList(
            DecoderLayer(width, config.decoder_heads, config.decoder_hidden, drop) for _ in range(config.decoder_layers)
        )

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for each input key."""
        text = {"text": torch.zeros(batch, self.text_length, dtype=torch.int64, device=device)}
        return {**cast(Any, self.image).example(batch, device), **text}

    def layer_names(self) -> list[str]:
        """Return the names of the layers that follow each other, in order; the decoder of words is the head."""
        reader = self.reader
        first = reader.layer_names("reader") if isinstance(reader, BertReader) else numbered("reader", reader)
        return [*first, *numbered("connect", self.connect)]

    def forward(self, raw: Raw, asked: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return `boxes` (B, R, 4), `relevance` (B, R, 2) and the logits `text` (B, W, words) of an answer.

        Without `asked` each word is the most likely one after those before it (greedy), and `text` has the logits at
        which they were chosen. With `asked["answer"]`, ids of words (B, W), `text` has the logits after the words of
        that answer, as training and the loss need them; in evaluation `greedy` has those without them.
        """
        tensors = cast(Mapping[str, Tensor], raw)
        memory = self.understand(tensors)
        found = {"boxes": memory.boxes, "relevance": memory.relevance}
        if asked is not None:
            answer = asked["answer"]
            before = torch.cat([torch.full_like(answer[:, :1], START), answer[:, :-1]], dim=1)
            found["text"] = self.decode(before, memory)
            return found if self.training else {**found, "greedy": self.greedy(memory)}
        return {**found, "text": self.greedy(memory)}

    def understand(self, raw: Mapping[str, Tensor]) -> Memory:
        """Return what the decoder of words reads: the regions, conditioned on their relevance, and the text."""
        x, mask = self.read(raw)
        x = self.join_text(x)
        regions, boxes, objectness = self.look(raw)
        for layer in self.connect:
            regions, x = layer(regions, x, mask)
        relevance = objectness + self.relevance(regions)
        regions = regions + relevance.softmax(-1) @ self.condition
        if mask is not None:
            mask = torch.cat([torch.ones(regions.shape[:2], dtype=torch.bool, device=x.device), mask], dim=1)
        return Memory(torch.cat([regions, x], dim=1), mask, boxes, relevance)

    def read(self, raw: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the states (B, T, C) of the task's bytes or word pieces, and where there is one (B, T)."""
        if isinstance(self.reader, BertReader):
            return self.reader(raw["text"])
        text = cast(Any, self.text)(raw, torch.float32)
        x, mask = text.dense, text.mask
        if mask is not None:
            mask = mask | ~mask.any(1, keepdim=True)  # a padding row of a batch has no text: all of it counts
        for layer in self.reader:
            x = layer(x, key_mask(mask))
        return x, mask

    def look(self, raw: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the regions (B, R, width), their boxes (B, R, 4) and the logits of objectness (B, R, 2)."""
        inputs = cast(Any, self.image)(raw, torch.float32)
        pixels = inputs.dense.transpose(1, 2).unflatten(2, raw["image"].shape[2:])
        features, states = self.detector(pixels)
        boxes = self.detector.bbox_predictor(states)
        read = region_features(features, boxes, self.config.points)
        regions = self.join_regions(torch.cat([read, states], dim=-1))
        return regions, boxes, self.detector.objectness(states)

    def decode(self, before: Tensor, memory: Memory) -> Tensor:
        """Return the logits (B, W, words) of the word after each of (B, W) words."""
        x = self.say(self.vocabulary(before))
        mask = causal_mask(before.shape[1], before.device)
        for layer in self.decoder:
            x = layer(x, memory.states, mask, key_mask(memory.mask))
        return x @ self.judge(self.vocabulary.weight).t()

    def greedy(self, memory: Memory) -> Tensor:
        """Return the logits (B, length, words) of the most likely words, one after the other; what follows an end is
        arbitrary."""
        before = torch.full((memory.states.shape[0], 1), START, device=memory.states.device)
        found: list[Tensor] = []
        for _ in range(self.config.length):
            found.append(self.decode(before, memory)[:, -1])
            before = torch.cat([before, found[-1].argmax(-1, keepdim=True)], dim=1)
        return torch.stack(found, dim=1)


def _parts(config: GpvConfig) -> tuple[Any, Any]:
    """Return the configs of image and text."""
    given: Any = config.inputs
    found = dict(getattr(given, "modalities", {}))
    kinds: dict[str, Any] = {getattr(one, "kind", ""): one for one in found.values()}
    if len(found) != 2 or set(kinds) != {"image", "text"}:
        raise UserError(
            f"model.inputs: got {', '.join(sorted(kinds)) or given.kind} for model.kind gpv; wanted kind "
            "multimodal with one image and one text"
        )
    image, text = kinds["image"], kinds["text"]
    if image.positions.kind != "none" or image.front_end != "none" or image.resize or image.permute is not None:
        raise UserError(
            "model.inputs: got an image with positions, a front end, a permutation or resizing for model.kind gpv; "
            "wanted plain pixels: positions {kind: none}, front_end none, resize false"
        )
    return image, text


__all__ = ["BertReader", "Gpv", "GpvConfig", "ReaderConfig", "Words", "count_words"]
