"""`perceiver export` on small runs, and training that starts from its files or from a run."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file

import perceiver
from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.preflight import describe_start
from cluster.run.worker import first_model
from perceiver import storage
from perceiver.cli import cli
from perceiver.config import UserError
from perceiver.export.weights import load_weights, open_weights, plan_weights
from perceiver.factory import build_model, model_config
from perceiver.optim.config import OptimConfig
from pipelines.shards.manifest import load_manifest
from tests.cluster.recipes import prepare_images
from tests.perceiver.train.engine.torch_engine import TorchEngine

FEW = {"kind": "fourier", "bands": 3}
IMAGE: dict[str, Any] = {"kind": "image", "channels": 1, "size": [8, 8], "mean": [0.5], "std": [0.5], "positions": FEW}
SIZES = {"latents": 5, "latent_channels": 8, "self_attends_per_block": 2, "heads": 2}
SMALL = {"kind": "perceiver", "cross_attends": 2, "inputs": IMAGE, **SIZES}
TABLE = {"kind": "learned", "channels": 6, "init_std": 0.5}
WORDS = {
    "kind": "perceiver_io",
    "inputs": {"kind": "text", "vocabulary": 40, "length": 12, "channels": 16},
    "latents": 5,
    "latent_channels": 32,
    "blocks": 1,
    "self_attends_per_block": 2,
    "heads": 8,
    "cross_heads": 8,
    "qk_channels": 256,
    "v_channels": 32,
    "cross_qk_channels": 256,
    "cross_v_channels": 32,
    "decoder": {"kind": "tokens"},
    "query_residual": False,
    "decoder_heads": 8,
    "decoder_qk_channels": 256,
    "decoder_v_channels": 16,
}
EVALUATION = {"loss": 0.25, "accuracy": 0.875}


def made(values: dict[str, Any], classes: int | None = 4) -> Any:
    """Return a model whose head is not zero, as after training."""
    torch.manual_seed(0)
    model = build_model(model_config(values), classes=classes).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def run_folder(folder: Path, values: dict[str, Any], url: str = "nowhere") -> tuple[str, Any]:
    """Return a run's folder as training leaves it, and the model in it."""
    model = made(values, 2)
    folder.mkdir()
    recipe = {"name": "tiny", "output": "/secret/place", "data": {"url": url}, "model": values}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "run.json").write_text(json.dumps({"step": 7, "evaluation": EVALUATION}))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return str(folder), model


def export(source: str, form: str, target: Path, *more: str) -> dict[str, Any]:
    command = ["export", source, "--format", form, "--to", str(target), "--json", *more]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert sorted(path.name for path in target.iterdir()) == sorted(written["files"])
    return written


def test_safetensors_are_loaded_alone_and_described_by_the_card(tmp_path):
    source, model = run_folder(tmp_path / "run", SMALL, prepare_images(tmp_path, per_class=2))
    export(source, "safetensors", tmp_path / "out")
    again = perceiver.load_model(str(tmp_path / "out" / "model.safetensors"))
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(again(pixels), model(pixels), rtol=0, atol=0)
    card = (tmp_path / "out" / "README.md").read_text()
    parameters = sum(p.numel() for p in model.parameters())
    for fact in ("# tiny", f"{parameters:,}", "dark, light", "licence", "| accuracy | 0.875 |", "step 7", "latents: 5"):
        assert fact in card, fact
    assert "| Licence of the weights | not stated by the run; the data's is: " in card
    assert "secret" not in card and "TODO" not in card


def test_keys_of_the_model_that_the_weights_fit(tmp_path):
    source, _ = run_folder(tmp_path / "run", SMALL)
    export(source, "safetensors", tmp_path / "out", "model.inputs.size=[12, 10]")
    assert perceiver.load_model(str(tmp_path / "out")).config.inputs.size == (12, 10)
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["model"]["inputs"]["size"] == [12, 10]
    for key, value, wanted in (
        ("model.inputs.siz", 3, "did you mean model.inputs.size"),
        ("model.inputs.size", [0, 3], r"model\.inputs\.size\.0 = 0"),
        ("optim.lr", 1, "override of optim: wanted keys of the model"),
        ("model.latents", 9, r"latents.*shape \[5, 8\]; wanted .*shape \[9, 8\]"),
    ):
        with pytest.raises(UserError, match=wanted):
            perceiver.export(source, "safetensors", tmp_path / "other", **{key: value})


def test_the_card_states_licence_and_limits_also_where_the_data_cannot_be_read(tmp_path):
    source, _ = run_folder(tmp_path / "run", SMALL)
    export(source, "safetensors", tmp_path / "bare")
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "| Licence of the weights | not stated by the run |" in card and "could not be read at export" in card
    limits = card.partition("## Intended use and limits")[2].partition("##")[0]
    assert "`nowhere`" in limits and "not calibrated" in limits
    export(source, "safetensors", tmp_path / "free", "--licence", "CC0-1.0")
    export(str(tmp_path / "free"), "safetensors", tmp_path / "again")
    assert "| Licence of the weights | CC0-1.0 |" in (tmp_path / "again" / "README.md").read_text()
    facts = {"name": "shapes", "licence": "ODbL", "source": "a friend", "classes": ["round", "square"]}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"data": facts}))
    export(source, "safetensors", tmp_path / "known")
    card = (tmp_path / "known" / "README.md").read_text()
    assert "round, square" in card and "the data's is: ODbL" in card and "evaluate the model before" in card


@pytest.mark.slow
def test_onnx_of_a_run_has_a_free_batch_and_the_same_outputs(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    source, model = run_folder(tmp_path / "run", SMALL)
    facts = {"name": "shapes", "licence": "ODbL", "source": "a friend", "classes": ["round", 'a "square"\n```']}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"data": facts}))
    written = export(source, "onnx", tmp_path / "out")
    assert written["max_difference"] <= written["tolerance"] and written["inputs"] == {"image": ["batch", 1, 8, 8]}
    assert written["dtypes"] == {"image": "uint8"}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    pixels = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    (got,) = session.run(None, {"image": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(pixels).detach(), rtol=1e-4, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `image` | uint8 | batch, 1, 8, 8 | pixels of 0 to 255" in card and "divided by 255 give a wrong" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    shown: list[str] = []
    exec(code, {"print": shown.append})
    assert shown[0] in facts["classes"]


def test_a_transformers_folder_there_and_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    source, model = run_folder(tmp_path / "run", WORDS)
    written = export(source, "transformers", tmp_path / "out")
    assert written["class"] == "PerceiverForMaskedLM"
    theirs = transformers.PerceiverForMaskedLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(6, 40, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    again = perceiver.load_model(str(tmp_path / "out"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def sharded(folder: Path) -> tuple[Any, Path]:
    """Write a transformers folder of several shards; return our model and the index."""
    transformers = pytest.importorskip("transformers")
    source, model = run_folder(folder / "run", WORDS)
    export(source, "transformers", folder / "one")
    theirs = transformers.PerceiverForMaskedLM.from_pretrained(folder / "one")
    theirs.save_pretrained(folder / "many", max_shard_size="20KB")
    assert not (folder / "many" / "model.safetensors").exists()
    return model, folder / "many" / "model.safetensors.index.json"


def test_a_transformers_folder_of_shards(tmp_path):
    """Such a folder was once refused as pickled weights."""
    model, index = sharded(tmp_path)
    again = perceiver.load_model(str(index.parent)).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    places = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(places.items()))

    def refused(tree: Any) -> str:
        index.write_text(json.dumps(tree))
        with pytest.raises(UserError) as caught:
            open_weights(str(index.parent))
        return str(caught.value)

    for strange in ("../one/model.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors", 3, "pickle.bin"):
        assert repr(strange) in refused({"weight_map": {**places, name: strange}})
    (index.parent / "link.safetensors").symlink_to(tmp_path / "one" / "model.safetensors")
    assert "link" in refused({"weight_map": {**places, name: "link.safetensors"}})
    assert "none.safetensors is missing" in refused({"weight_map": {**places, name: "none.safetensors"}})
    assert "no tensor other" in refused({"weight_map": {**places, "other": shard}})
    for tree in ([], {}, {"weight_map": []}):
        assert "weight_map" in refused(tree)
    index.unlink()
    assert "no weights" in refused_without(index.parent)
    (index.parent / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights (pytorch_model.bin)" in refused_without(index.parent)


def refused_without(folder: Path) -> str:
    """Return the message for a folder without safetensors."""
    with pytest.raises(UserError) as caught:
        open_weights(str(folder))
    return str(caught.value)


@pytest.mark.slow
def test_onnx_of_a_transformers_folder_with_a_mask(tmp_path):
    pytest.importorskip("onnxruntime")
    transformers = pytest.importorskip("transformers")
    config = transformers.PerceiverConfig(
        num_latents=5,
        d_latents=32,
        num_self_attends_per_block=1,
        num_self_attention_heads=4,
        vocab_size=40,
        num_cross_attention_heads=4,
        qk_channels=16,
        v_channels=32,
        d_model=16,
        max_position_embeddings=12,
    )
    transformers.PerceiverForMaskedLM(config).save_pretrained(tmp_path / "theirs")
    written = export(str(tmp_path / "theirs"), "onnx", tmp_path / "out")
    assert set(written["inputs"]) == {"text", "text_mask"} and written["max_difference"] <= 1e-4


def test_what_cannot_be_exported_is_one_line(tmp_path):
    source, _ = run_folder(tmp_path / "run", SMALL)

    def refused(*arguments: str) -> str:
        error = CliRunner().invoke(cli, ["export", *arguments, "--to", str(tmp_path / "out")]).exception
        assert isinstance(error, UserError) and "\n" not in str(error), error
        return str(error)

    assert "model.kind" in refused(source, "--format", "transformers")
    assert f"{tmp_path / 'nothing'}" in refused(str(tmp_path / "nothing"), "--format", "onnx")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    assert "broken.safetensors" in refused(str(tmp_path / "broken.safetensors"), "--format", "onnx")
    save_file({"a": torch.zeros(2)}, tmp_path / "alone.safetensors")
    assert "alone.safetensors" in refused(str(tmp_path / "alone.safetensors"), "--format", "safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "export.json"])
def test_an_export_does_not_write_through_links(tmp_path, name):
    source, _ = run_folder(tmp_path / "run", SMALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    command = ["export", source, "--format", "safetensors", "--to", str(tmp_path / "out")]
    error = CliRunner().invoke(cli, command).exception
    assert isinstance(error, UserError) and name in str(error)
    assert not (tmp_path / "elsewhere").exists() and len(list((tmp_path / "out").iterdir())) == 1


def test_an_export_that_a_full_disk_ended_is_repeated(tmp_path, monkeypatch):
    source, _ = run_folder(tmp_path / "run", SMALL)
    out = tmp_path / "out"
    export(source, "safetensors", out)

    def full(file: Path, folder: Any, name: str) -> None:
        if name == "model.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        put_whole(file, folder, name)

    put_whole = storage.put_whole
    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_whole", full)
        command = ["export", source, "--format", "safetensors", "--to", str(out), "--licence", "CC0-1.0"]
        error = CliRunner().invoke(cli, command).exception
    assert isinstance(error, OSError) and error.errno == errno.ENOSPC
    assert "CC0-1.0" in (out / "README.md").read_text(), "one file was replaced, the others not"
    export(source, "safetensors", out, "--licence", "MIT")
    (out / "README.md").write_text("mine")
    command = ["export", source, "--format", "safetensors", "--to", str(out)]
    assert "README.md" in str(CliRunner().invoke(cli, command).exception)


def test_a_checkpoint_gives_the_weights_that_the_engine_had(tmp_path):
    values = {**SMALL, "inputs": {**IMAGE, "front_end": "conv", "size": [16, 16]}}
    engine = TorchEngine(made(values), None, OptimConfig(), lambda step: 1.0)  # type: ignore[arg-type]
    engine.save(tmp_path)
    from perceiver.train.checkpoint.shards import read_weights

    got, wanted = read_weights(tmp_path), engine.module.state_dict()
    assert list(got) == list(wanted) and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_other_classes_initialize_a_new_head_and_keep_the_rest(tmp_path):
    source, trained = run_folder(tmp_path / "run", SMALL)
    model = made(SMALL, classes=9)
    start = load_weights(model, open_weights(source))
    assert start.fresh == ("head.weight", "head.bias") and not start.resized
    assert "fresh head.weight, head.bias" in start.describe("x")
    assert torch.equal(model.latents, trained.latents) and model.head.weight.shape == (9, 8)


def test_a_masked_language_model_becomes_a_classifier(tmp_path):
    source, trained = run_folder(tmp_path / "run", WORDS)
    changes = {"decoder": {"kind": "class", "channels": 16}}
    start = plan_weights(made({**WORDS, **changes}), open_weights(source))
    assert "decoder.query" in start.fresh and "encoder.attention.key.weight" in start.taken


def test_learned_positions_are_interpolated_to_a_higher_resolution(tmp_path):
    source, trained = run_folder(tmp_path / "run", {**SMALL, "inputs": {**IMAGE, "positions": TABLE}})
    model = made({**SMALL, "inputs": {**IMAGE, "size": [15, 15], "positions": TABLE}}, classes=2)
    assert load_weights(model, open_weights(source)).resized == ("inputs.positions.table",)
    old, new = trained.inputs.positions.table.view(8, 8, 6), model.inputs.positions.table.view(15, 15, 6)
    torch.testing.assert_close(new[::2, ::2], old)
    torch.testing.assert_close(new[3, 4], (old[1, 2] + old[2, 2]) / 2)


def test_fourier_positions_need_nothing_for_a_higher_resolution(tmp_path):
    source, _ = run_folder(tmp_path / "run", SMALL)
    model = made({**SMALL, "inputs": {**IMAGE, "size": [12, 12]}}, classes=2)
    start = load_weights(model, open_weights(source))
    assert not start.fresh and not start.resized


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"latents": 6}, r"latents.*\[5, 8\].*\[6, 8\]"),
        ({"self_attends_per_block": 3}, r"blocks\.0\.2"),
        ({"self_attends_per_block": 1}, r"blocks\.0\.1"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, change, wanted):
    source, _ = run_folder(tmp_path / "run", SMALL)
    with pytest.raises(UserError, match=wanted):
        plan_weights(made({**SMALL, **change}), open_weights(source))


def fine_tuning(url: str, model: dict[str, Any], place: Path) -> Recipe:
    """Return a recipe that starts from weights and has two classes."""
    return build_recipe(
        {
            "name": "tuned",
            "seed": 5,
            "data": {"url": url},
            "model": model,
            "task": {"kind": "classification"},
            "optim": {"lr": 0.1},
            "train": {"epochs": 1, "init_from": str(place)},
        }
    )


def test_training_starts_from_an_export(tmp_path, images):
    source, trained = run_folder(tmp_path / "run", SMALL)
    export(source, "safetensors", tmp_path / "out")
    recipe = fine_tuning(images, SMALL, tmp_path / "out")
    said, wanted = describe_start(recipe, load_manifest(images)), trained.state_dict()
    assert said.startswith(f"starts from {len(wanted)} tensors from {tmp_path / 'out'}; its head is taken, although ")
    begun = first_model(recipe, 2).state_dict()
    assert all(torch.equal(begun[name], wanted[name]) for name in wanted)
    restored = first_model(recipe, 2, restored=True)
    assert not torch.equal(restored.get_parameter("latents"), wanted["latents"]), "what a checkpoint will replace"


def test_training_starts_from_official_weights_with_a_new_head(tmp_path, images):
    transformers = pytest.importorskip("transformers")
    config = transformers.PerceiverConfig(
        num_latents=5,
        d_latents=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
        num_labels=6,
        image_size=12,
    )
    torch.manual_seed(1)
    theirs = transformers.PerceiverForImageClassificationFourier(config)
    theirs.save_pretrained(tmp_path / "official")
    values = open_weights(str(tmp_path / "official")).model
    assert values is not None
    recipe = fine_tuning(images, values.model_dump(mode="json"), tmp_path / "official")
    head = ["decoder.heads.0.weight", "decoder.heads.0.bias"]
    assert describe_start(recipe, load_manifest(images)).endswith(f"; fresh {', '.join(head)}")
    begun, state = first_model(recipe, 2).state_dict(), theirs.state_dict()
    assert torch.equal(begun["latents"], state["perceiver.embeddings.latents"])
    for number in (0, 1):
        theirs_name = f"perceiver.encoder.self_attends.{number}.mlp.dense1.weight"
        assert torch.equal(begun[f"blocks.0.{number}.mlp.expand.weight"], state[theirs_name])
    unread = first_model(recipe, 2, restored=True).state_dict()
    assert begun[head[0]].shape == (2, 16) and all(torch.equal(begun[name], unread[name]) for name in head)
