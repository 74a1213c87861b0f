"""The processes that train together: sums over ranks, and the random generators of a rank."""

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from perceiver.config import UserError
from perceiver.storage import first_line


class Pending(Protocol):
    """A collective operation in progress."""

    def wait(self) -> object:
        """Block until the tensor contains the result (on GPUs: order later work after it)."""
        ...


class Ranks:
    """The processes that train together: torch.distributed if it is initialised, else this process alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world = dist.get_world_size() if self.distributed else 1

    def start_sum(self, tensor: Tensor) -> Pending:
        """Start to sum a tensor over the ranks in place; call `.wait()` on the result before reading the tensor."""
        return cast(Pending, dist.all_reduce(tensor, async_op=True)) if self.world > 1 else _Done()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return numbers summed over the ranks, in float64; of one rank, without waiting for the device."""
        if self.world == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.start_sum(total).wait()
        return total.tolist()

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows (n, width) of all ranks, one rank's after the other's; n may differ."""
        if self.world == 1:
            return rows
        counts = [int(n) for n in self.sum([float(len(rows)) * (rank == self.rank) for rank in range(self.world)])]
        whole = rows.new_zeros(sum(counts), rows.shape[1])
        start = sum(counts[: self.rank])
        whole[start : start + len(rows)] = rows
        self.start_sum(whole).wait()
        return whole


class _Done:
    """A sum that needs no communication."""

    def wait(self) -> None:
        return None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators on this rank (dropout draws from them)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the states that `random_state` returned; raise `UserError` if they are not states of generators."""
    try:
        torch.set_rng_state(state["cpu"].cpu())
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"the checkpoint's random state is damaged ({first_line(error)}): take another") from None
