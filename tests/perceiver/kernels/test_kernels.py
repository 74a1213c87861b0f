"""The compiled kernel against float64, its cache, and what happens without it."""

import os
import shutil
import subprocess
import sys
from typing import Any, cast

import pytest
import torch

from perceiver import kernels
from perceiver.kernels import attend, dense, extension
from perceiver.kernels.shared_kv import moments_backward, moments_forward, separable_moments, shared_kv

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def problem(batch: int, queries: int, features: int, height: int, width: int, strength: float = 2.0) -> tuple[Any, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, queries, features), (batch, queries, height), (batch, queries, width)]
    parameters = [strength * torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    fixed = [
        torch.randn(batch, features, height * width, generator=g, dtype=torch.float64),
        torch.rand(batch, height * width, generator=g, dtype=torch.float64) + 0.5,
    ]
    return parameters, fixed


@compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", [(3, 5, 2, 7, 9), (2, 8, 4, 3, 32), (1, 1, 5, 1, 50), (2, 6, 3, 20, 1)])
@pytest.mark.parametrize("strength", [0.5, 20.0])
def test_kernel_against_float64(sizes, strength, threads):
    parameters, fixed = cast(Any, problem)(*sizes, strength)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        single = cast(Any, [t.float() for t in (*parameters, *fixed)])
        assert kernels.usable(single[0])
        forward = cast(Any, kernels.forward)
        reference = cast(Any, moments_forward)
        got, expected = forward(*single), reference(*parameters, *fixed)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
        slopes = cast(Any, [torch.randn_like(t) for t in expected[:3]])
        delta = torch.randn_like(expected[3])
        compiled = cast(Any, kernels.backward)
        got = compiled(*single, got[3], [s.float() for s in slopes], delta.float())
        arguments = cast(Any, [*parameters, *fixed, expected[3], slopes, delta])
        backward = cast(Any, moments_backward)
        expected = backward(*arguments)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-4)
    finally:
        torch.set_num_threads(before)


def test_pure_torch_when_turned_off(monkeypatch):
    parameters, fixed = problem(2, 3, 4, 5, 6)
    single = cast(Any, [t.float() for t in (*parameters, *fixed)])
    expected = separable_moments(*single)
    monkeypatch.setenv("PERCEIVER_KERNELS", "0")
    extension.load.cache_clear()
    try:
        assert not kernels.usable(single[0])
        torch.testing.assert_close(separable_moments(*single), expected, rtol=1e-4, atol=1e-5)
    finally:
        extension.load.cache_clear()


def test_silent_without_a_compiler_or_with_a_broken_one(monkeypatch, tmp_path, capfd):
    broken = tmp_path / "broken-cxx"
    broken.write_text("#!/bin/sh\necho no >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler_path in (str(broken), None):
        monkeypatch.setenv("CXX", compiler_path or "g++")
        if compiler_path is None:
            monkeypatch.setattr(extension.shutil, "which", lambda _: None)
        extension.load.cache_clear()
        assert extension.load() is None
    extension.load.cache_clear()
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled on Linux")
def test_another_compiler_at_the_same_place_builds_again(tmp_path, monkeypatch):
    built, compiler = [], tmp_path / "cxx"
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("PERCEIVER_CACHE", str(tmp_path / "cache"))
    for version in ("1", "22"):
        script = f'#!/bin/sh\n# {version}\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n'
        compiler.write_text(script)
        compiler.chmod(0o755)
        built.append(extension.library())
        assert extension.library() == built[-1]
    assert built[0] != built[1]


@compiler
def test_two_processes_build_once(tmp_path):
    """Both processes load the same library, built by at most one compiler run each, and no temporary files are left."""
    counter = tmp_path / "g++"
    counter.write_text(f'#!/bin/sh\necho x >> "{tmp_path}/runs"\nexec {shutil.which("g++")} "$@"\n')
    counter.chmod(0o755)
    code = "from perceiver.kernels.extension import load; import sys; sys.exit(load() is None)"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(counter)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [p.wait(180) for p in processes] == [0, 0]
    assert (tmp_path / "runs").read_text().count("x") == 1
    left = sorted(p.suffix for p in (tmp_path / "cache" / "perceiver" / "kernels").iterdir())
    assert left == [".lock", ".so"]


@pytest.mark.skipif(not dense.faster(), reason="needs an AVX-512 CPU that is not Intel's")
@pytest.mark.parametrize("shape", [(64, 48), (3, 33, 48), (5, 1, 7, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_by_onednn_against_float64(shape, bias, monkeypatch):
    monkeypatch.setattr(dense, "MIN_PRODUCT", 1)
    torch.manual_seed(0)
    exact = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, (21, 48), (21,))[: 2 + bias]]
    single = [t.detach().float().requires_grad_() for t in exact]
    assert dense.usable(single[0], single[1]) and not dense.usable(exact[0], exact[1])
    assert_close_to_float64(dense.linear, dense.linear, exact)


def test_linear_is_torchs_own_where_onednn_is_not_faster(monkeypatch):
    x, weight = torch.randn(64, 48), torch.randn(21, 48)
    monkeypatch.setattr(dense, "MIN_PRODUCT", 1)
    monkeypatch.setattr(dense, "faster", lambda: False)
    assert torch.equal(dense.linear(x, weight), torch.nn.functional.linear(x, weight))
    monkeypatch.setattr(dense, "faster", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        assert dense.linear(x, weight).dtype == torch.bfloat16
    assert not dense.usable(x.double(), weight.double())
    assert not dense.usable(x.to("meta"), weight.to("meta"))


def values_and_gradients(function: Any, tensors: list[torch.Tensor], *others: Any) -> list[torch.Tensor]:
    out = function(*tensors, *others)
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * slope).sum(), [t for t in tensors if t.requires_grad])]


def assert_close_to_float64(function: Any, reference: Any, exact: list[torch.Tensor], *others: Any) -> None:
    single = [t.detach().float().requires_grad_(t.requires_grad) for t in exact]
    got, expected = (values_and_gradients(f, t, *others) for f, t in ((function, single), (reference, exact)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * max(1.0, float(b.detach().abs().max())))


@pytest.fixture
def all_sizes(monkeypatch):
    """Use the kernels for arrays of any size, not only for those that are large enough to gain."""
    monkeypatch.setattr(attend, "MIN_SCORES", 1)
    monkeypatch.setattr(dense, "MIN_PRODUCT", 1)


@compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "sizes", [(2, 3, 7, 9, 5, 6), (1, 2, 100, 300, 64, 64), (2, 1, 97, 257, 200, 33), (1, 1, 1, 40, 16, 8)]
)
@pytest.mark.parametrize("strength", [0.5, 4.0])
def test_attention_kernel_against_float64(sizes, masked, threads, strength, all_sizes):
    batch, heads, queries, keys, width, values = sizes
    torch.manual_seed(0)
    shapes = [(batch, queries, heads, width), (batch, keys, heads, width), (batch, keys, heads, values)]
    exact = [(strength * torch.randn(s, dtype=torch.float64)).transpose(1, 2).requires_grad_() for s in shapes]
    mask = torch.rand(batch, keys) > 0.4 if masked else None
    q, k, v = exact
    assert attend.usable(q.float(), k.float(), v.float()) and not attend.usable(q, k, v)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close_to_float64(attend.attention, attend.attention, exact, mask)
    finally:
        torch.set_num_threads(before)


@compiler
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_shared_kv_kernel_against_float64(learned, masked, all_sizes):
    torch.manual_seed(0)
    q = torch.randn(2, 101, 45, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 270, 45, dtype=torch.float64, requires_grad=learned)
    mask = torch.rand(2, 270) > 0.4 if masked else None
    assert_close_to_float64(shared_kv, shared_kv, [q, x], mask)


@compiler
def test_attention_kernel_is_finite_where_no_key_exists(all_sizes):
    tensors = [torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3)]
    results = values_and_gradients(attend.attention, tensors, torch.zeros(1, 8, dtype=torch.bool))
    assert all(t.isfinite().all() for t in results)


def test_attention_is_torchs_own_without_the_kernel(monkeypatch):
    q, k, v = (torch.randn(2, 2, 80, 16) for _ in range(3))
    monkeypatch.setattr(attend, "load", lambda: None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend.attention(q, k, v), expected)
