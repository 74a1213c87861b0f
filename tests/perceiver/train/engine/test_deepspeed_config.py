"""DeepSpeed's configuration: filled from the recipe, a JSON unchanged, contradictions refused with both keys."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from perceiver.config import UserError
from perceiver.optim.config import OptimConfig
from perceiver.train.engine.deepspeed_config import BatchPlan, DeepSpeedConfig, plan_config

OPTIM = OptimConfig(kind="adamw", lr=1e-3, clip=1.0, weight_decay=0.1)
BATCH = BatchPlan(micro_batch=4, accumulation=2, world=3)


def plan(config: Any = None, *, zero_stage: Any = None, optim: OptimConfig = OPTIM, **options: Any) -> dict[str, Any]:
    section = DeepSpeedConfig(zero_stage=zero_stage, config=config)
    return plan_config(section, optim, BATCH, **options)


def test_the_recipe_alone_fills_everything() -> None:
    config = plan()
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 24
    assert config["gradient_clipping"] == 1.0
    assert config["zero_optimization"]["stage"] == 1
    assert config["zero_allow_untested_optimizer"] is True
    assert not config["bf16"]["enabled"] and not config["fp16"]["enabled"] and not config["torch_autocast"]["enabled"]
    assert "optimizer" not in config and "scheduler" not in config


HUGGING_FACE_STYLE: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def test_a_json_file_is_taken_as_it_is_and_auto_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(HUGGING_FACE_STYLE))
    config = plan(str(path), parameters=5000)
    assert config["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "stage3_max_live_parameters": 1e9,
        "reduce_bucket_size": 5000,
    }
    assert config["steps_per_print"] == 2000
    assert config["train_batch_size"] == 24
    assert '"auto"' not in json.dumps(config)


def test_the_given_mapping_is_not_changed() -> None:
    given = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
    before = json.dumps(given)
    assert plan(given)["zero_optimization"]["stage"] == 2
    assert json.dumps(given) == before


def test_agreeing_values_are_accepted() -> None:
    given = {
        "train_batch_size": 24,
        "gradient_clipping": 1,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}},
    }
    assert plan(given, zero_stage=2)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"train_batch_size": 32}, ("train_batch_size = 32", "train.global_batch", "24")),
        ({"train_micro_batch_size_per_gpu": 8}, ("train_micro_batch_size_per_gpu = 8", "train.micro_batch", "4")),
        ({"gradient_accumulation_steps": 1}, ("gradient_accumulation_steps = 1", "train.global_batch")),
        ({"gradient_clipping": 0.5}, ("gradient_clipping = 0.5", "optim.clip", "1.0")),
        ({"zero_optimization": {"stage": 3}}, ("zero_optimization.stage = 3", "deepspeed.zero_stage", "2")),
        ({"fp16": {"enabled": True}}, ("fp16.enabled = True", "train.precision", "False")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled = True", "train.precision = 'fp32'")),
        ({"torch_autocast": {"enabled": True}}, ("torch_autocast.enabled = True", "train.precision = 'fp32'")),
        ({"zero_allow_untested_optimizer": False}, ("zero_allow_untested_optimizer = False", "optim.kind", "True")),
        ({"gradient_allreduce_op": "sum"}, ("gradient_allreduce_op = 'sum'",)),
        ({"optimizer": {"type": "Lamb"}}, ("optimizer.type = 'Lamb'", "optim.kind = 'adamw'")),
        ({"optimizer": {"params": {"lr": 2e-3}}}, ("optimizer.params.lr = 0.002", "optim.lr = 0.001")),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, ("optimizer.params.betas = [0.9, 0.95]", "optim.betas =")),
        ({"optimizer": {"params": {"momentum": 1}}}, ("optimizer.params.momentum",)),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, ("adam_w_mode = False",)),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, ("scheduler.type = 'WarmupLR'",)),
        ({"scheduler": {"type": "OneCycle"}}, ("scheduler.type = 'OneCycle'", "optim.schedule")),
    ],
)
def test_contradictions_name_both_sides(given: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        plan(given, zero_stage=2, precision="fp32")
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message, message


SGD = OptimConfig(kind="sgd", momentum=0.9, nesterov=True)
ADAM = OptimConfig(kind="adam", amsgrad=True)


def test_the_optimizer_of_a_json_may_be_any_kind() -> None:
    agreeing = {"lr": 0.001, "momentum": 0.9, "nesterov": True, "weight_decay": "auto"}
    plan({"optimizer": {"type": "SGD", "params": agreeing}}, optim=SGD)
    plan({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "amsgrad": True}}}, optim=ADAM)


@pytest.mark.parametrize(
    ("optim", "given", "parts"),
    [
        (SGD, {"type": "SGD", "params": {"momentum": 0.5}}, ("params.momentum = 0.5", "optim.momentum = 0.9")),
        (SGD, {"type": "SGD", "params": {"betas": [0.9, 0.999]}}, ("params.betas", "optim.kind = 'sgd'")),
        (SGD, {"type": "Adam"}, ("optimizer.type = 'Adam'", "optim.kind = 'sgd'")),
        (ADAM, {"type": "Adam", "params": {"amsgrad": False}}, ("params.amsgrad = False", "optim.amsgrad = True")),
        (ADAM, {"type": "Adam", "params": {"adam_w_mode": True}}, ("adam_w_mode = True", "optim.kind = 'adam'")),
        (ADAM, {"type": "AdamW"}, ("optimizer.type = 'AdamW'", "optim.kind = 'adam'")),
    ],
)
def test_contradictions_of_other_kinds_name_both_sides(optim: OptimConfig, given: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        plan({"optimizer": given}, optim=optim)
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message, message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "bf16.enabled"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device = 'nvme'"),
    ],
)
def test_what_would_not_run_rightly_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan(given)


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="zero_optimization.stage.*4"):
        plan({"zero_optimization": {"stage": 4}})


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "ds.json.*no such file"), ("{", "ds.json.*JSON"), ("[1]", "list")]
    + [("[" * 100_000, "ds.json.*JSON"), ('{"a": NaN}', "ds.json.*NaN"), ('{"a": 1, "a": 2}', "ds.json.*twice")],
)
def test_bad_files_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        plan(str(path))


def test_precision_follows_the_device_the_recipe_and_the_json() -> None:
    assert plan(device_type="cuda")["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert not plan(device_type="cuda", precision="fp32")["torch_autocast"]["enabled"]
    assert plan(precision="bf16")["torch_autocast"]["enabled"]
    native = plan({"bf16": {"enabled": True}})
    assert native["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert not native["torch_autocast"]["enabled"]
    assert not plan({"bf16": {"enabled": False}}, device_type="cuda")["torch_autocast"]["enabled"]
