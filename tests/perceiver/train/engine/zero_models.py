"""Models for the ZeRO tests: weights that are read outside their layer's forward pass."""

from typing import Any

import torch
import torch.distributed as dist

from perceiver.factory import build_model, model_config
from perceiver.optim.config import OptimConfig
from perceiver.tasks import TaskConfig, build_task
from perceiver.tasks.classification import ClassificationConfig
from perceiver.tasks.general import GeneralConfig
from perceiver.tasks.masked_language import MaskedLanguageConfig
from perceiver.text_ids import SEP
from perceiver.train.engine.deepspeed_config import BatchPlan, DeepSpeedConfig
from perceiver.train.engine.deepspeed_engine import DeepSpeedEngine
from perceiver.train.engine.protocol import Engine
from tests.perceiver.train.engine.engine_toys import Batch, share
from tests.perceiver.train.engine.torch_engine import TorchEngine

ROWS, STEPS, CLASSES = 16, 3, 3
CUT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Without it ZeRO-3 leaves small parameters unpartitioned on every rank, and nothing would be tested."""
WIDTHS = {"latents": 8, "latent_channels": 8, "self_attends_per_block": 2, "heads": 2}
TEXT = {"kind": "text", "vocabulary": 40, "length": 12, "channels": 8}
IMAGE = {
    "kind": "image",
    "channels": 1,
    "mean": (0.5,),
    "std": (0.5,),
    "size": (6, 6),
    "positions": {"kind": "fourier", "bands": 3},
}
TABLE = {
    **IMAGE,
    "front_end": "1x1",
    "front_end_channels": 4,
    "positions": {"kind": "learned", "channels": 8, "projection": 6},
}
PLAIN = {**IMAGE, "positions": {"kind": "none"}}
LAYER = {"layers": 1, "heads": 2, "hidden": 8, "dropout": 0}
SHARED = {"kind": "perceiver", "cross_attends": 3, **WIDTHS}
MODELS: dict[str, dict[str, Any]] = {
    "absorbed, tied embedding": {
        "kind": "perceiver_io",
        "inputs": TEXT,
        "blocks": 2,
        "decoder": {"kind": "tokens"},
        "query_residual": False,
        "attention": "absorbed",
        **WIDTHS,
    },
    "separable, shared weights": {**SHARED, "inputs": IMAGE, "attention": "separable"},
    "learned positions": {**SHARED, "inputs": TABLE},
    "modality vectors, recomputed": {
        **SHARED,
        "inputs": {"kind": "multimodal", "modalities": {"a": IMAGE, "b": TEXT}},
        "checkpoint_activations": True,
    },
    "boxes and text, tied embedding": {
        "kind": "perceiver_io",
        "inputs": {"kind": "multimodal", "modalities": {"image": IMAGE, "text": TEXT}},
        "blocks": 1,
        "decoder": {"kind": "general", "boxes": 4, "length": 4, "init_std": 0.5},
        **WIDTHS,
    },
    "GPV-1, tied vocabulary": {
        "kind": "gpv",
        "inputs": {"kind": "multimodal", "modalities": {"image": PLAIN, "text": TEXT}},
        "detector": {"kind": "conv", "widths": (4, 8), "queries": 4, "channels": 8, **LAYER},
        "reader": LAYER,
        "points": 2,
        "width": 8,
        **{f"{part}_{name}": size for part in ("co", "decoder") for name, size in LAYER.items() if name != "dropout"},
        "dropout": 0,
        "words": ("!",),
        "length": 5,
    },
}
GENERAL = ("boxes and text, tied embedding", "GPV-1, tied vocabulary")


def rows(step: int) -> Batch:
    """Return a global batch; the language model's masks depend on the sample ids, so the ranks' rows differ."""
    generator = torch.Generator().manual_seed(step)
    return {
        "text": torch.randint(6, 40, (ROWS, 12), generator=generator),
        "image": torch.rand(ROWS, 1, 6, 6, generator=generator),
        "label": torch.randint(0, CLASSES, (ROWS,), generator=generator),
        "answer": torch.cat([torch.randint(6, 40, (ROWS, 3), generator=generator), torch.full((ROWS, 1), SEP)], dim=1),
        "answer_mask": torch.ones(ROWS, 4, dtype=torch.bool),
        "boxes": 0.1 + 0.4 * torch.rand(ROWS, 2, 4, generator=generator),
        "boxes_count": torch.randint(-1, 3, (ROWS,), generator=generator),
        "valid": torch.ones(ROWS, dtype=torch.bool),
        "sample_id": torch.arange(ROWS),
    }


def task_of(name: str) -> TaskConfig:
    """Return the task of a model."""
    if name in GENERAL:
        return GeneralConfig()
    return MaskedLanguageConfig(probability=0.3) if MODELS[name]["inputs"] is TEXT else ClassificationConfig()


def train_model(name: str, engine: str) -> dict[str, Any]:
    """Take some steps of two micro-batches; return losses, norms, and how far each weight has moved (L1).

    SGD: an optimizer that divides by the gradient's size enlarges rounding errors, which differ between CPUs.
    """
    torch.manual_seed(0)
    model = build_model(model_config(MODELS[name]), classes=CLASSES)
    with torch.no_grad():
        for param in model.parameters():
            if not param.any():
                param.normal_(std=0.1)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    task = build_task(task_of(name), classes=CLASSES)
    optim = OptimConfig.model_validate({"kind": "sgd", "lr": 0.1, "clip": 0.5})
    ours: Engine
    if engine == "torch":
        ours = TorchEngine(model, task, optim, lambda step: 1.0, precision="fp32")
    else:
        batch = BatchPlan(ROWS // dist.get_world_size() // 2, 2, dist.get_world_size())
        section = DeepSpeedConfig.model_validate({"zero_stage": int(engine[-1]), "config": CUT_ALL})
        ours = DeepSpeedEngine(model, task, optim, lambda step: 1.0, section, batch, precision="fp32")
    results = [ours.step(share(rows(step), dist.get_rank(), dist.get_world_size(), 2), step) for step in range(STEPS)]
    weights = ours.weights()
    return {
        "loss": [result.loss for result in results],
        "norm": [result.grad_norm for result in results],
        "moves": weights and {key: float((value - start[key]).abs().sum()) for key, value in weights.items()},
    }
