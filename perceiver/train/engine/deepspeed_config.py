"""The DeepSpeed configuration of a run, derived from the recipe without importing DeepSpeed.

A DeepSpeed JSON is accepted. "auto" is replaced by the recipe's value; any other value of a setting that the recipe
decides must agree with the recipe.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from perceiver.config import Config, UserError, expand_home
from perceiver.optim.config import OptimConfig
from perceiver.storage import parse_json
from perceiver.train.engine.protocol import Precision

AUTO = "auto"
_DECIDED_BY_DEEPSPEED = 5e8  # reduce_bucket_size, elements


class DeepSpeedConfig(Config):
    """Settings of DeepSpeed (recipe key `deepspeed`)."""

    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        default=None,
        description="ZeRO stage. Sharded: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights; default 1.",
    )
    config: str | dict[str, Any] | None = Field(
        default=None, description='A DeepSpeed JSON: its path, or the mapping itself; "auto" takes the recipe\'s value.'
    )

    @field_validator("config")
    @classmethod
    def _strings_name_files(cls, config: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if isinstance(config, str) and not config.strip():
            raise ValueError("an empty path; wanted a JSON file, a mapping, or null")
        if isinstance(config, str):
            return expand_home(config)
        if isinstance(config, dict):
            json.dumps(config, allow_nan=False)
        return config


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is divided among the workers.

    Attributes:
        micro_batch: rows per forward pass on one worker.
        accumulation: micro-batches per step on one worker.
        world: number of workers.
        samples: samples per optimizer step; default: the rows of all workers. Rows beyond the samples are padding.
    """

    micro_batch: int
    accumulation: int
    world: int
    samples: int | None = None

    @property
    def rows(self) -> int:
        """Rows per optimizer step over all workers, padding included."""
        return self.micro_batch * self.accumulation * self.world


def read_config(section: DeepSpeedConfig) -> dict[str, Any]:
    """Return the user's DeepSpeed settings as a new mapping.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    if not isinstance(section.config, str):
        return deepcopy(section.config or {})
    path = Path(section.config)
    try:
        if not path.is_file():
            raise UserError(f"deepspeed.config = {section.config}: no such file; wanted a DeepSpeed JSON")
        given = parse_json(path.read_bytes(), f"deepspeed.config = {section.config}", finite=True)
    except OSError as error:
        raise UserError(f"deepspeed.config = {section.config} cannot be read ({error.strerror})") from None
    if not isinstance(given, dict):
        raise UserError(f"deepspeed.config = {section.config} contains a JSON {type(given).__name__}; wanted an object")
    return given


def plan_config(
    section: DeepSpeedConfig,
    optim: OptimConfig,
    batch: BatchPlan,
    *,
    precision: Precision = "auto",
    device_type: str = "cpu",
    parameters: int | None = None,
) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize` with a client optimizer.

    Args:
        section: the recipe's `deepspeed`.
        optim: the recipe's `optim`.
        batch: how a global batch is divided.
        precision: the recipe's; "auto" follows the JSON, else it is bf16 on GPUs and fp32 on CPUs.
        device_type: "cpu" or "cuda".
        parameters: trainable elements of the model; limits the buffers in which gradients are reduced.

    Raises:
        UserError: the JSON contradicts the recipe; the message has both keys and both values.
    """
    config = read_config(section)
    _check_optimizer(config.pop("optimizer", None), optim)
    _check_scheduler(config.pop("scheduler", None))
    half = _wants_bf16(config, precision, device_type)
    for path, key, value in _decided_by_recipe(config, section, optim, batch):
        _settle(config, path, key, value)
    config["train_batch_size"] = batch.rows  # DeepSpeed requires the product of its three numbers
    _set_precision(config, half)
    _refuse_unsupported(config)
    _drop_autos(config)
    _set_defaults(config, device_type, parameters)
    return config


def _decided_by_recipe(
    config: Mapping[str, Any], section: DeepSpeedConfig, optim: OptimConfig, batch: BatchPlan
) -> list[tuple[str, str, Any]]:
    """Return (DeepSpeed's key, the recipe's key, the value) of each setting that the recipe decides."""
    stage = section.zero_stage
    if stage is None:
        stage = _get(config, "zero_optimization.stage")
        stage = 1 if stage in (None, AUTO) else stage
    if stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed.config: zero_optimization.stage = {stage!r}; wanted 0, 1, 2 or 3")
    return [
        ("train_micro_batch_size_per_gpu", "train.micro_batch", batch.micro_batch),
        ("gradient_accumulation_steps", "train.global_batch / (workers x train.micro_batch)", batch.accumulation),
        ("train_batch_size", "train.global_batch", batch.samples or batch.rows),
        ("gradient_clipping", "optim.clip", optim.clip or 0.0),
        ("zero_optimization.stage", "deepspeed.zero_stage", stage),
        ("zero_allow_untested_optimizer", "optim.kind", True),
        ("managed_gradient_accumulation", "the engine's steps", True),
        ("gradient_allreduce_op", "the engine's global mean", "mean"),
        ("fp16.enabled", "train.precision", False),
    ]


def _settle(config: dict[str, Any], path: str, key: str, value: Any) -> None:
    """Set the recipe's value where the JSON has none or "auto"; refuse a different one."""
    given = _get(config, path)
    if given not in (None, AUTO) and given != value:
        raise UserError(
            f"deepspeed.config has {path} = {given!r}, but {key} gives {value!r}; "
            f'set it to "auto" there, or make the two agree'
        )
    _set(config, path, value)


def _check_optimizer(given: Any, optim: OptimConfig) -> None:
    """Refuse an optimizer in the JSON that differs from the recipe's, which is built as a client optimizer."""
    if given in (None, AUTO):
        return
    kind = str(given.get("type", AUTO)).lower()
    if kind not in (AUTO, optim.kind) and not (kind == "adam" and optim.kind == "adamw"):
        raise UserError(
            f"deepspeed.config has optimizer.type = {given['type']!r}, but optim.kind = {optim.kind!r}; "
            "remove it there, or make the two agree"
        )
    params = dict(given.get("params", {}))
    for name, value in optim.settings().items():
        value = list(value) if isinstance(value, tuple) else value
        theirs = params.pop(name, AUTO)
        theirs = list(theirs) if isinstance(theirs, tuple) else theirs
        if theirs not in (AUTO, value):
            raise UserError(
                f"deepspeed.config has optimizer.params.{name} = {theirs!r}, but optim.{name} = {value!r}; "
                'set it to "auto" there, or make the two agree'
            )
    unknown = sorted(set(params) - {"adam_w_mode", "torch_adam", "bias_correction", "fused"})
    if unknown:
        raise UserError(
            f"deepspeed.config has optimizer.params.{unknown[0]}, which optim has no key for with optim.kind = "
            f"{optim.kind!r}; remove it"
        )
    decoupled = params.get("adam_w_mode")
    if (optim.kind, decoupled) in (("adamw", False), ("adam", True)):
        does = "decouples decay" if optim.kind == "adamw" else "adds the decay to the gradient"
        raise UserError(
            f"deepspeed.config has optimizer.params.adam_w_mode = {decoupled}, but optim.kind = {optim.kind!r} {does}; "
            "remove it, or make the two agree"
        )


def _check_scheduler(given: Any) -> None:
    """Refuse a scheduler with its own values in the JSON: the recipe's schedule is used."""
    if given in (None, AUTO):
        return
    set_there = [name for name, value in given.get("params", {}).items() if value != AUTO]
    if set_there or not given.get("params"):
        raise UserError(
            f"deepspeed.config has scheduler.type = {given.get('type')!r}, but optim.schedule decides the learning "
            "rate; remove the scheduler there"
        )


def _wants_bf16(config: Mapping[str, Any], precision: Precision, device_type: str) -> bool:
    """Return whether the run is in bf16; refuse a JSON that contradicts the recipe."""
    given = {path: _get(config, path) for path in ("bf16.enabled", "torch_autocast.enabled")}
    theirs = {path: bool(value) for path, value in given.items() if value not in (None, AUTO)}
    there = any(theirs.values()) if theirs else None
    if precision == "auto":
        return there if there is not None else device_type == "cuda"
    half = precision == "bf16"
    if there is not None and there != half:
        path = next(path for path, value in theirs.items() if value == there)
        raise UserError(
            f"deepspeed.config has {path} = {there}, but train.precision = {precision!r}; "
            'set it to "auto" there, or make the two agree'
        )
    return half


def _set_precision(config: dict[str, Any], half: bool) -> None:
    """Set bf16 as torch's autocast over float32 weights, unless the JSON requests DeepSpeed's bf16 weights."""
    native = _get(config, "bf16.enabled") is True
    _set(config, "bf16.enabled", native)
    if native:
        config["bf16"].setdefault("check_grad_overflow", True)
    autocast = half and not native
    _set(config, "torch_autocast.enabled", autocast)
    if autocast and _get(config, "torch_autocast.dtype") in (None, AUTO):
        _set(config, "torch_autocast.dtype", "bfloat16")


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Refuse settings that would run with wrong results."""
    if config["bf16"]["enabled"] and _get(config, "zero_optimization.stage") == 0:
        raise UserError(
            "deepspeed.config has bf16.enabled = True, which needs ZeRO here: set deepspeed.zero_stage=1, "
            'or set it to "auto" there and train.precision=bf16'
        )
    for part in ("offload_optimizer", "offload_param"):
        if _get(config, f"zero_optimization.{part}.device") == "nvme":
            raise UserError(
                f"deepspeed.config has zero_optimization.{part}.device = 'nvme', which checkpoints do not cover; "
                "wanted 'cpu' or 'none'"
            )


def _drop_autos(config: dict[str, Any]) -> None:
    """Remove settings that are still "auto", so that DeepSpeed's defaults apply."""
    for key, value in list(config.items()):
        if value == AUTO:
            del config[key]
        elif isinstance(value, dict):
            _drop_autos(value)


def _set_defaults(config: dict[str, Any], device_type: str, parameters: int | None) -> None:
    """Set our defaults where neither the recipe nor the JSON has a value."""
    zero = config["zero_optimization"]
    if parameters is not None:
        zero.setdefault("reduce_bucket_size", int(min(_DECIDED_BY_DEEPSPEED, max(parameters, 1024))))
    if device_type == "cpu":
        zero.setdefault("overlap_comm", False)
        if zero["stage"] == 1:
            # Reducing the gradients after the backward pass, in place, saves a quarter of the engine's time there.
            zero.setdefault("contiguous_gradients", False)
            zero.setdefault("reduce_scatter", False)
    config.setdefault("zero_force_ds_cpu_optimizer", False)


def _get(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path; None if absent."""
    node: Any = config
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _set(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        if not isinstance(config.get(name), dict):
            config[name] = {}
        config = config[name]
    config[leaf] = value
