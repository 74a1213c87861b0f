"""The baseline GPV-1: published sizes, greedy decoding, padding that takes no part, words and texts."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from perceiver.baselines._gpv_detector import DetrDetectorConfig, region_features
from perceiver.baselines._gpv_layers import CoAttention, DecoderLayer
from perceiver.baselines._gpv_words import END, UNKNOWN, Words, count_words
from perceiver.config import UserError
from perceiver.export.formats import export_onnx
from perceiver.export.parts import load_parts
from perceiver.export.weights import Saved
from perceiver.factory import build_model, create_model, input_keys, model_config
from perceiver.text_ids import byte_ids, byte_text

IMAGE = {"kind": "image", "size": (16, 16), "positions": {"kind": "none"}}
TEXT = {"kind": "text", "length": 12, "channels": 8}
INPUTS: dict[str, Any] = {"kind": "multimodal", "modalities": {"image": IMAGE, "text": TEXT}}
SMALL: dict[str, Any] = {
    "kind": "gpv",
    "inputs": INPUTS,
    "detector": {"kind": "conv", "widths": (4, 8), "queries": 5, "channels": 8, "layers": 1, "heads": 2, "hidden": 8},
    "reader": {"layers": 1, "heads": 2, "hidden": 8, "dropout": 0},
    "points": 2,
    "width": 8,
    "co_layers": 1,
    "co_heads": 2,
    "co_hidden": 8,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "decoder_hidden": 8,
    "dropout": 0,
    "words": ("a", "red", "seven", ","),
    "length": 6,
}

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "find", "red", "##s")


def build(**changes: Any) -> Any:
    torch.manual_seed(0)
    return build_model(model_config({**SMALL, **changes}))


def raw(rows: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "image": torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8),
        "text": torch.randint(6, 99, (rows, 12)),
    }


def test_published_sizes():
    """Two linear layers of the published co-attention have no effect and are left out."""
    with torch.device("meta"):
        connect, decode = CoAttention(768, 16, 3072, 0.1), DecoderLayer(768, 8, 2048, 0.1)
        model: Any = create_model("gpv1", device="meta")
    sizes = [sum(p.numel() for p in part.parameters()) for part in (connect, decode, model.detector)]
    assert sizes[0] + 2 * (768 * 768 + 768) == 15_356_928
    assert sizes[1] == 7_877_888
    assert sizes[2] // 1_000_000 == 41
    assert len(model.connect) == len(model.decoder) == 3 and model.example(1, "meta")["image"].shape[2:] == (480, 640)


def test_contract():
    model = build()
    assert input_keys(model) == ("image", "text")
    output = model(raw(), {"answer": torch.tensor([[4, 5, 2, 0, 0, 0], [6, 2, 0, 0, 0, 0]])})
    assert {name: tuple(value.shape) for name, value in output.items()} == {
        "boxes": (2, 5, 4),
        "relevance": (2, 5, 2),
        "text": (2, 6, 8),
    }
    sum(value.square().sum() for value in output.values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_greedy_decoding_is_that_of_the_chosen_words():
    model = build().eval()
    with torch.no_grad():
        free = model(raw())["text"]
        taught = model(raw(), {"answer": free.argmax(-1)})
    torch.testing.assert_close(taught["text"], free)
    torch.testing.assert_close(taught["greedy"], free)


def test_padding_takes_no_part():
    """The published model attends to it."""
    model, whole = build().eval(), raw()
    short = {**whole, "text": whole["text"][:, :7]}
    padded = {**whole, "text_mask": torch.arange(12).expand(2, -1) < 7}
    with torch.no_grad():
        for name, value in model(short).items():
            torch.testing.assert_close(model(padded)[name], value, msg=name)


def test_region_features_are_those_of_the_box():
    features = torch.zeros(1, 3, 8, 8)
    features[0, 0, :4], features[0, 1, 4:] = 1.0, 1.0
    boxes = torch.tensor([[[0.5, 0.25, 0.5, 0.2], [0.5, 0.75, 0.5, 0.2]]])
    wanted = F.layer_norm(torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]), (3,))
    torch.testing.assert_close(region_features(features, boxes, 3), wanted)


def test_detr_is_that_of_the_transformers_library():
    small = DetrDetectorConfig(
        queries=5, channels=16, layers=1, heads=2, hidden=8, depths=(1, 1), widths=(8, 16), stem=4
    )
    detector: Any = small.build(3).eval()
    image = torch.randn(2, 3, 64, 96)
    seen = detector.see(image)
    assert seen.features.shape == (2, 16, 8, 12)
    torch.testing.assert_close(seen.states, detector.model(image).last_hidden_state)


def bert(**changes: Any) -> Any:
    reader = {"kind": "bert", "layers": 2, "heads": 2, "hidden": 8, "vocabulary": len(PIECES), "pieces": PIECES}
    return build(reader={**reader, "dropout": 0, **changes})


def texts(*given: str) -> dict[str, torch.Tensor]:
    ids = torch.zeros(len(given), 30, dtype=torch.int64)
    for row, text in zip(ids, given, strict=True):
        found = byte_ids(text, 30)
        row[: len(found)] = torch.tensor(found)
    return {**raw(len(given)), "text": ids, "text_mask": ids > 0}


def test_bert_reads_word_pieces():
    """Also an empty text, as in a padding row of a batch, has a start and an end."""
    model, batch = bert(), texts("find Reds", "")
    states, mask = model.read(batch)
    assert mask.tolist() == [[True] * 5, [True, True, False, False, False]]
    wanted = model.reader.bert(input_ids=torch.tensor([[2, 4, 5, 6, 3]])).last_hidden_state
    torch.testing.assert_close(states[:1], wanted)
    torch.testing.assert_close(states[1:, :2], model.reader.bert(input_ids=torch.tensor([[2, 3]])).last_hidden_state)
    output = model(batch, {"answer": torch.tensor([[4, 5, 2, 0, 0, 0], [6, 2, 0, 0, 0, 0]])})
    sum(value.square().sum() for value in output.values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert model.layer_names()[:3] == [
        "reader.bert.encoder.layer.0",
        "reader.bert.encoder.layer.1",
        "connect.0",
    ]


def test_bert_of_published_names_is_loaded(tmp_path):
    """A published file has the heads of its training, a pooler and the names of older versions of the library."""
    from safetensors.torch import save_file
    from transformers import BertForPreTraining

    model = bert()
    theirs = BertForPreTraining(model.reader.bert.config).state_dict()
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor.clone() for name, tensor in theirs.items()}
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in old.items()}
    save_file(old, tmp_path / "model.safetensors")
    load_parts(model, {"reader": str(tmp_path / "model.safetensors")})
    for name, tensor in model.reader.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], msg=name)
    del old["bert.encoder.layer.1.output.dense.bias"]
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"train\.init_from\.reader: .*lacks bert\.encoder\.layer\.1\.output\.dense\.bias"
    ):
        load_parts(model, {"reader": str(tmp_path / "model.safetensors")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pieces": PIECES[:-1]}, "got 6 word pieces; wanted vocabulary = 7"),
        ({"pieces": (*PIECES[:-1], "red")}, "'red' appears twice"),
        ({"pieces": (*PIECES[:3], *"abcd")}, r"lack \[SEP\]"),
        ({"pieces_file": "vocab.txt"}, "got pieces and pieces_file"),
        ({"kind": "bytes"}, "belong to kind bert"),
        ({"heads": 3}, r"model\.reader\.heads: got 3 heads of the text's 8 channels"),
    ],
)
def test_word_pieces_of_another_model_are_refused(changes, message):
    with pytest.raises((UserError, ValidationError), match=message):
        bert(**changes)


def test_bert_without_word_pieces_has_a_size_and_reads_nothing(tmp_path):
    with torch.device("meta"):
        whole = bert(pieces=(), vocabulary=30_522)
    assert whole(whole.example(2, "meta"))["boxes"].shape == (2, 5, 4)
    with pytest.raises(UserError, match=r"model\.reader\.pieces is empty: set model\.reader\.pieces_file"):
        bert(pieces=())(texts("find"))
    saved = Saved("run", bert().state_dict(), bert().config, {})
    with pytest.raises(UserError, match=r"onnx: .*model\.reader\.kind bert"):
        export_onnx(saved, tmp_path)


def test_words_and_bytes():
    known, longest = count_words(["a red seven, a blue two", "a green one"])
    words = Words(known, 8)
    assert longest == 7 and len(count_words(["a a b"], 2)[0]) == 1
    ids = torch.tensor([byte_ids(text, 30)[1:] for text in ("a red seven, a blue two",)])
    found, mask = words.encode(F.pad(ids, (0, 3)), F.pad(ids, (0, 3)) > 0)
    assert mask.all() and found[0, -1] == END
    assert byte_text(words.bytes(found)[0].tolist()) == "a red seven, a blue two"
    unknown = torch.tensor([byte_ids("a pink", 30)[1:]])
    assert words.encode(unknown, unknown > 0)[0][0, 1] == UNKNOWN
    assert "\ufffd" in byte_text(words.bytes(words.encode(unknown, unknown > 0)[0])[0].tolist())
    cut, mask = Words(("a", "b"), 3).encode(ids, ids > 0)
    assert mask.all() and END not in cut, "a longer answer has no end"


@pytest.mark.parametrize(
    "inputs",
    [IMAGE, {"kind": "multimodal", "modalities": {"image": {**IMAGE, "positions": {"kind": "fourier"}}, "text": TEXT}}],
)
def test_other_inputs_are_refused(inputs):
    with pytest.raises(UserError, match=r"model\.inputs.*gpv"):
        build(inputs=inputs)
