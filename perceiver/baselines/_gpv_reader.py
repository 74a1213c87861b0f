"""What reads the task of GPV-1: Transformer layers over its bytes, or BERT of the transformers library."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from perceiver.baselines._gpv_layers import EncoderLayer
from perceiver.baselines._grid import transformers_library
from perceiver.config import Config, Layers, Location, Real, Size, UserError
from perceiver.modalities.text import TextConfig
from perceiver.model import numbered
from perceiver.text_ids import byte_text

PAD, START, END, UNKNOWN = "[PAD]", "[CLS]", "[SEP]", "[UNK]"
POSITIONS = 512
"""Of BERT; longer texts are cut."""
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class ReaderConfig(Config):
    """Layers that read the task, as wide as the text's inputs (`channels`); the sizes are those of BERT-base."""

    kind: Literal["bytes", "bert"] = Field(
        default="bytes",
        description="bytes: Transformer layers over the text's inputs; bert: BERT of the transformers library over "
        "word pieces, whose weights are the user's (train.init_from: {reader: FILE}).",
    )
    layers: Layers = Field(default=12, description="Layers.")
    heads: Size = Field(default=12, description="Heads of each.")
    hidden: Size = Field(default=3072, description="Inner width of the feed-forward parts.")
    dropout: Real = Field(default=0.1, ge=0, lt=1, description="In the layers.")
    vocabulary: Size = Field(default=30_522, description="Word pieces (kind bert).")
    pieces: tuple[str, ...] = Field(
        default=(), description="The word pieces by id (kind bert); default: those of pieces_file, which a run keeps."
    )
    pieces_file: Location | None = Field(
        default=None, description="File or URL with a word piece per line, such as BERT's vocab.txt (kind bert)."
    )
    cased: bool = Field(default=False, description="Whether the word pieces tell upper from lower case (kind bert).")

    @model_validator(mode="after")
    def _known(self) -> "ReaderConfig":
        if self.kind != "bert" and (self.pieces or self.pieces_file):
            raise ValueError("pieces and pieces_file belong to kind bert: set kind to bert, or remove them")
        if not self.pieces:
            return self
        if self.pieces_file:
            raise ValueError("got pieces and pieces_file; wanted one of them")
        if len(set(self.pieces)) < len(self.pieces):
            twice = Counter(self.pieces).most_common(1)[0][0]
            raise ValueError(f"the word piece {twice[:40]!r} appears twice: take the vocab.txt of a BERT")
        if len(self.pieces) != self.vocabulary:
            raise ValueError(
                f"got {len(self.pieces):,} word pieces; wanted vocabulary = {self.vocabulary:,} of them: set "
                f"vocabulary to {len(self.pieces)}, or take the word pieces of these weights"
            )
        if missing := [name for name in (PAD, START, END, UNKNOWN) if name not in self.pieces]:
            raise ValueError(f"the word pieces lack {', '.join(missing)}: take the vocab.txt of a BERT")
        return self

    def build(self, text: TextConfig) -> "nn.ModuleList | BertReader":
        """Build the layers of kind bytes, or BERT.

        Raises:
            UserError: the heads do not divide the text's channels.
        """
        if text.channels % self.heads:
            raise UserError(
                f"model.reader.heads: got {self.heads} heads of the text's {text.channels} channels; wanted a divisor"
            )
        if self.kind == "bert":
            return BertReader(self, text)
        return nn.ModuleList(
            EncoderLayer(text.channels, self.heads, self.hidden, self.dropout) for _ in range(self.layers)
        )


class BertReader(nn.Module):
    """Reads texts in bytes as word pieces; the module `bert` has the names of `transformers.BertModel`."""

    def __init__(self, config: ReaderConfig, text: TextConfig) -> None:
        super().__init__()
        library = transformers_library()
        self.bert = library.BertModel(
            library.BertConfig(
                vocab_size=config.vocabulary,
                hidden_size=text.channels,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.hidden,
                max_position_embeddings=POSITIONS,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
            ),
            add_pooling_layer=False,
        )
        self.pieces = WordPieces(config.pieces, cased=config.cased) if config.pieces else None

    def layer_names(self, name: str) -> list[str]:
        """Return the names of the layers that follow each other, in order, in a model that has this under a name."""
        return numbered(f"{name}.bert.encoder.layer", self.bert.encoder.layer)

    def published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of this module among those of a BERT as published: with its heads and older names."""
        own = self.state_dict()
        named = {name if name.startswith("bert.") else f"bert.{name}": tensor for name, tensor in tensors.items()}
        for old, new in OLD_NAMES.items():
            named = {name.replace(old, new): tensor for name, tensor in named.items()}
        return {name: tensor for name, tensor in named.items() if name in own}

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map byte ids (B, M) to states (B, P, C) of word pieces and their mask (B, P).

        Raises:
            UserError: the model has no word pieces.
        """
        ids, mask = self._encoded(text)
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        # With a mask in the shape of the scores, since the library reads values of other masks.
        seen = mask[:, None, None].expand(-1, -1, ids.shape[1], -1)
        states = self.bert(
            input_ids=ids, attention_mask=seen, position_ids=places, token_type_ids=torch.zeros_like(ids)
        )
        return states.last_hidden_state, mask

    def _encoded(self, text: Tensor) -> tuple[Tensor, Tensor]:
        if text.is_meta:  # sizes only: as many pieces as bytes
            return text, torch.ones_like(text, dtype=torch.bool)
        if self.pieces is None:
            raise UserError("model.reader.pieces is empty: set model.reader.pieces_file to the weights' vocab.txt")
        return self.pieces.encode(text)


class WordPieces:
    """Splits texts into word pieces as BERT does.

    Args:
        pieces: the word pieces by id.
        cased: whether they tell upper from lower case.
    """

    def __init__(self, pieces: Sequence[str], *, cased: bool) -> None:
        from tokenizers import BertWordPieceTokenizer

        ids = {piece: number for number, piece in enumerate(pieces)}
        self.tokenizer = BertWordPieceTokenizer(ids, lowercase=not cased)
        self.tokenizer.enable_truncation(POSITIONS)
        self.tokenizer.enable_padding(pad_id=ids[PAD])

    def encode(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids (B, P) of byte ids (B, M), from [CLS] to [SEP], and where there is one, bool."""
        found = self.tokenizer.encode_batch([byte_text(row) for row in text.tolist()])
        ids, mask = ([getattr(one, name) for one in found] for name in ("ids", "attention_mask"))
        return torch.tensor(ids, device=text.device), torch.tensor(mask, device=text.device).bool()
