"""Parameters, FLOPs and memory of any model, before it is built on a device.

Everything is measured on the meta device, where a forward pass costs nothing: FLOPs by counting each matrix product and
convolution, multiply and add apart (as Perceiver App. B does), activations by adding up what autograd keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from perceiver.attention import CrossAttention, SelfAttention
from perceiver.config import Config
from perceiver.factory import build_model, on_meta, preset_config
from perceiver.optim.freezing import freeze


@dataclass(frozen=True)
class Account:
    """The cost of a model.

    Args:
        parameters: number of values, shared ones once.
        forward_flops: FLOPs of a forward pass of one sample as the papers count them, by the plain path.
        executed_flops: FLOPs of the matrix products that remain by the chosen path, one sample, forward.
        activation_bytes: memory that a forward pass of one sample keeps for the backward pass, float32, chosen path.
    """

    parameters: int
    forward_flops: int
    executed_flops: int
    activation_bytes: int
    float32_activation_bytes: int = 0
    """Those of them that autocast does not halve: attention by products over float32 copies, see `is_fused`."""
    frozen: int = 0
    """Those of the parameters that are not trained."""

    @property
    def trained(self) -> int:
        """Number of trained values."""
        return self.parameters - self.frozen


def count_parameters(model: nn.Module) -> int:
    """Return the number of values of a model, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def _meta(config: Config, classes: int | None) -> nn.Module:
    with on_meta():
        return build_model(config, classes=classes)


def _run(model: nn.Module, batch: int) -> Any:
    raw: dict[str, Tensor] = cast(Any, model).example(batch, "meta")
    return model(next(iter(raw.values())) if len(raw) == 1 else raw)


def count_flops(model: nn.Module, batch: int = 1) -> int:
    """Return the FLOPs of matrix products and convolutions in a forward pass of a model on the meta device."""
    with FlopCounterMode(display=False) as counter:
        _run(model.eval(), batch)
    return counter.get_total_flops()


FUSED_HEAD_WIDTH = 256
"""Channels per head up to which torch has a flash kernel on GPUs."""


def is_fused(q: Tensor, v: Tensor) -> bool:
    """Return whether torch's attention on a GPU, in half precision and without a mask, never writes its scores.

    Wider heads take its memory-efficient kernel if their widths are multiples of 8, and else products over float32.
    """
    widths = q.shape[-1], v.shape[-1]
    return max(widths) <= FUSED_HEAD_WIDTH or all(width % 8 == 0 for width in widths)


class _Attention(torch.autograd.Function):
    """Saves the tensors that torch's attention on a GPU saves; its values are never used."""

    @staticmethod
    def forward(ctx: Any, count: "_CountAttention", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, queries = q.shape[:3]
        out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
        if is_fused(q, v):
            ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        else:
            copies = [q.new_empty(each.shape) for each in (q, k, v)] + [q.new_empty(*q.shape[:-1], k.shape[-2])]
            count.float32_bytes += sum(each.untyped_storage().nbytes() for each in copies)
            ctx.save_for_backward(*copies)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("only counts what is kept")


class _CountAttention(TorchFunctionMode):
    """Replaces the attention of the meta device by `_Attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.float32_bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _Attention.apply(self, *args[:3])
        return func(*args, **(kwargs or {}))


def count_activation_bytes(model: nn.Module, batch: int = 1) -> int:
    """Return the bytes that autograd keeps for the backward pass of a model on the meta device, without parameters."""
    return _activation_bytes(model, batch)[0]


def _activation_bytes(model: nn.Module, batch: int) -> tuple[int, int]:
    """Return the bytes of `count_activation_bytes`, and those of them that stay in float32 under autocast."""
    # Storages by their ids; they are kept, so that no other one gets the same id.
    own = {id(storage): storage for storage in (p.untyped_storage() for p in model.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage
        return tensor

    with _CountAttention() as attention, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = _run(model.train(), batch)
    del output
    return sum(storage.nbytes() for storage in kept.values()), attention.float32_bytes


def account(config: Config, *, classes: int | None = None, frozen: Sequence[str] = ()) -> Account:
    """Return the cost of a config's model; takes a second or two and no memory for weights.

    Args:
        config: a member of the `ModelConfig` union.
        classes: number of classes, for classifiers.
        frozen: patterns of the parameters that are not trained (`train.freeze`).
    """
    chosen = _meta(config, classes)
    not_trained = freeze(chosen, frozen)
    plain = chosen
    if "attention" in type(config).model_fields:
        plain = _meta(config.model_copy(update={"attention": "plain"}), classes)
    # Two samples, halved: batch norm refuses one.
    activations, float32 = _activation_bytes(chosen, batch=2)
    return Account(
        parameters=count_parameters(chosen),
        forward_flops=count_flops(plain),
        executed_flops=count_flops(chosen),
        activation_bytes=activations // 2,
        float32_activation_bytes=float32 // 2,
        frozen=not_trained,
    )


class _Found(Exception):
    """Carries the number of positions out of a forward pass, which needs no later layer."""


def count_input_positions(config: Config, *, classes: int | None = None) -> int | None:
    """Return how many input positions one unit after the first mixing layer depends on (Perceiver Table 2, Input RF).

    The first mixing layer is a convolution over more than one position, or the first attention. Of a convolution, the
    positions are those whose gradient of one interior unit is not zero; an attention depends on all its inputs.

    Args:
        config: a member of the `ModelConfig` union.
        classes: number of classes, for classifiers.

    Returns:
        The count; None for a model without such a layer, or whose raw tensors receive no gradient.
    """
    # Memory without values: only the convolution's weights are filled, and only they are in the gradient.
    model = _meta(config, classes).to_empty(device="cpu").eval()
    raw = {
        key: value.float().requires_grad_() if value.dtype == torch.uint8 else value
        for key, value in cast(Any, model).example(1, "cpu").items()
    }

    def fill(layer: nn.Module, args: Any) -> None:
        nn.init.ones_(cast(Any, layer).weight)

    def convolved(layer: nn.Module, args: Any, output: Tensor) -> None:
        unit = output[0, 0][tuple(side // 2 for side in output.shape[2:])]
        pixels = [tensor for tensor in raw.values() if tensor.requires_grad]
        if not (pixels and unit.requires_grad):
            raise _Found(None)
        grads = torch.autograd.grad(unit, pixels, materialize_grads=True)
        raise _Found(sum(int(grad.ne(0).any(-3).sum()) for grad in grads))  # (..., channels, height, width)

    def attends(layer: nn.Module, args: Any) -> None:
        raise _Found(args[1].elements if isinstance(layer, CrossAttention) else args[0].shape[1])

    for layer in model.modules():
        if isinstance(layer, (CrossAttention, SelfAttention)):
            layer.register_forward_pre_hook(attends)
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and max(layer.kernel_size) > 1:
            layer.register_forward_pre_hook(fill)
            layer.register_forward_hook(convolved)
    try:
        model(next(iter(raw.values())) if len(raw) == 1 else raw)
    except _Found as found:
        return found.args[0]
    return None


def preset_cost(name: str, *, flops: bool = True) -> tuple[int, int | None]:
    """Return a preset's parameters and, unless left out, its forward FLOPs of one sample by the plain path."""
    config, classes = preset_config(name)
    if "attention" in type(config).model_fields:
        config = config.model_copy(update={"attention": "plain"})
    model = _meta(config, classes)
    return count_parameters(model), count_flops(model) if flops else None
