"""All uses of private DeepSpeed names. Each function documents what happens without it.

`PERCEIVER_PUBLIC_API=1` disables them all; so does a DeepSpeed version that has renamed them.
"""

import logging
import os
from typing import Any

from perceiver.optim.partition import FlatLayout, Layouts, Piece, whole_layouts

log = logging.getLogger(__name__)

REFRESHING = {
    1: ("update_lp_params",),
    2: ("update_lp_params",),
    3: ("_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters", "_post_step"),
}
"""Methods by stage that `refresh_weights` calls."""


def allowed() -> bool:
    """Return whether private names may be used."""
    return os.environ.get("PERCEIVER_PUBLIC_API") != "1"


def skip_shared_memory_build() -> None:
    """Tell DeepSpeed that its shared-memory all-reduce for CPUs cannot be built.

    Without this `deepspeed.init_distributed` compiles it at the first start on a machine (2 to 4 minutes) and then sums
    gradients through it.
    """
    import deepspeed

    ops: Any = deepspeed.ops

    if not allowed():
        return
    if hasattr(type(ops), "__compatible_ops__") or "_probe_compatible_ops" in vars(ops):
        ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    elif "__compatible_ops__" in vars(ops):
        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def external_parameters(module: Any) -> list[Any]:
    """Return the parameters that a module uses but does not own, as ZeRO-3 has recorded them.

    Without this a module that uses another one's parameters needs `deepspeed.zero.register_external_parameter`.
    """
    return list(getattr(module, "_external_params", {}).values()) if allowed() else []


def flat_layouts(
    groups: list[list[Any]], optimizer: Any, zero: Any, names: dict[int, str], stage: int, rank: int
) -> Layouts | None:
    """Return which elements of which parameters the optimizer's tensors contain on this rank.

    Without this (None) a checkpoint gathers whole tensors on rank 0 and each rank reads all of them: exact, but slower
    and with more memory on rank 0; LAMB then needs stage 0.

    Args:
        groups: the parameters of each group as they were before DeepSpeed replaced them.
        optimizer: the client optimizer, whose groups now have DeepSpeed's tensors.
        zero: DeepSpeed's optimizer around it.
        names: name of each parameter by its id.
        stage: the ZeRO stage.
        rank: of this process.
    """
    if stage == 0:
        return whole_layouts((names[id(param)], param) for params in groups for param in params)
    if not allowed():
        return None
    try:
        for name in REFRESHING[stage]:
            getattr(zero, name)
        if stage == 3:
            return _stage3_layouts(zero, names, rank)
        return _stage12_layouts(groups, optimizer, names)
    except AttributeError as error:
        log.warning("this DeepSpeed version does not expose how ZeRO shards tensors (%s): they are gathered", error)
        return None


def _stage12_layouts(groups: list[list[Any]], optimizer: Any, names: dict[int, str]) -> Layouts:
    """Stages 1 and 2 flatten each group and partition it over the ranks, also within a parameter."""
    layouts = {}
    for params, group in zip(groups, optimizer.param_groups, strict=True):
        (flat,) = group["params"]
        pieces = []
        for number, param in enumerate(params):
            part = param._hp_mapping
            if part is not None and part.hp_fragment_address.numel > 0:
                here, there = part.hp_fragment_address, part.lp_fragment_address
                pieces.append(Piece(number, there.start, here.start, here.numel))
        layouts[flat] = FlatLayout(tuple(names[id(param)] for param in params), tuple(pieces))
    return layouts


def _stage3_layouts(zero: Any, names: dict[int, str], rank: int) -> Layouts:
    """Stage 3 partitions every parameter over the ranks and stores the partitions consecutively, in sub-groups."""
    layouts = {}
    for params, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        pieces, offset = [], 0
        for number, param in enumerate(params):
            share = param.partition_numel()
            length = min(share, max(0, param.ds_numel - rank * share))
            if length:
                pieces.append(Piece(number, rank * share, offset, length))
            offset += share
        layouts[flat] = FlatLayout(tuple(names[id(param)] for param in params), tuple(pieces))
    return layouts


def refresh_weights(zero: Any, stage: int) -> None:
    """Copy the optimizer's flat tensors, which were written directly, to the model's weights.

    Only called after `flat_layouts` returned layouts; the public functions that are used otherwise do both.
    """
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        zero._partition_all_parameters()
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero._post_step(set())
