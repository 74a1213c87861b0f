"""Ranks of a process group that are forked after the imports, so that libraries are imported once."""

import os
import traceback
from collections.abc import Callable, Sequence

import torch

from cluster.runtime.local import free_port


def import_what_a_step_imports() -> None:
    """Import before the forks what each of them would import in its first step."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()


def start_ranks(work: Callable[[], None], world: int) -> list[int]:
    """Fork this number of processes, each with the environment of its rank over Gloo on loopback; return their ids."""
    port = free_port("127.0.0.1")
    return [_fork(work, world, rank, port) for rank in range(world)]


def failed(processes: Sequence[int]) -> int:
    """Wait for processes; return how many of them failed."""
    return sum(os.waitpid(process, 0)[1] != 0 for process in processes)


def _fork(work: Callable[[], None], world: int, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        work()
    except Exception:  # noqa: BLE001  a fork must not return from here
        traceback.print_exc()
        os._exit(1)
    finally:
        os._exit(0)  # Gloo's threads may hold tensors while the interpreter ends
