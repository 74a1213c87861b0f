"""Results on a GPU equal those on a CPU. Without a GPU only the Triton kernels are tested, by Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from perceiver import kernels
from perceiver.factory import build_model, model_config

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
INPUTS = {
    "image": {"kind": "image", "size": [64, 64]},
    "points": {"kind": "points", "points": 512},
    "audio": {"kind": "audio", "samples": 4096, "patch": 16},
}


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_triton_kernels_against_float64():
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "tests.perceiver.kernels.triton_cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok (2, 40, 4, 12, 20) 100.0" in done.stdout  # the last of both lists: of CPUs and of GPUs


@gpu
def test_the_triton_kernel_serves_this_gpu():
    assert kernels.usable(torch.zeros(1, 1, 4, device="cuda"))


@gpu
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", ["perceiver", "perceiver_io"])
def test_loss_and_gradients_are_those_of_the_cpu(inputs, kind):
    torch.manual_seed(0)
    depth = {"cross_attends": 2} if kind == "perceiver" else {"blocks": 2}
    values: dict[str, Any] = {
        "kind": kind,
        "inputs": INPUTS[inputs],
        "latents": 64,
        "latent_channels": 128,
        "heads": 4,
        "self_attends_per_block": 2,
        **depth,
    }
    model: Any = build_model(model_config(values), classes=10)
    raw = next(iter(model.example(4, "cpu").values()))
    x = torch.rand_like(raw) * 2 - 1 if raw.is_floating_point() else torch.randint(0, 127, raw.shape).to(raw.dtype)
    target = torch.randint(10, (4,))

    def loss_and_gradients(device: str, bf16: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        model.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = torch.nn.functional.cross_entropy(model(x.to(device)), target.to(device))
        loss.backward()
        return loss.item(), {n: p.grad.detach().cpu() for n, p in model.named_parameters() if p.grad is not None}

    wanted, gradients = loss_and_gradients("cpu")
    got, on_gpu = loss_and_gradients("cuda")
    assert got == pytest.approx(wanted, rel=1e-5)
    for name, gradient in gradients.items():
        error = (on_gpu[name] - gradient).norm() / gradient.norm().clamp(min=1e-5)
        assert error < 1e-3, f"{name}: {error}"
    rounded, _ = loss_and_gradients("cuda", bf16=True)
    assert rounded == pytest.approx(wanted, rel=2e-2)
