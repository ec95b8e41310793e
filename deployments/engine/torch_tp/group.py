"""The ranks of one tensor-parallel group: sums and gathers between them, and how many bytes those cost.

A group belongs to one engine. It is a process group object of its own and not torch.distributed's global one, so that
a process may hold several engines, and closing one leaves the others alone.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store


class Group(Protocol):
    """One rank's view of its group. All ranks make the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of every rank's `partial` (contiguous, any shape), in its memory. Raises RuntimeError when a rank
        is dead, or late by more than the group's timeout."""

    def sum_pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """`sum` of two tensors of one shape and dtype, in one message."""

    def gather(self, part: Tensor) -> Tensor:
        """Every rank's `part`, stacked in the order of ranks: [...] -> [world, ...]."""

    def close(self) -> None:
        """Ends the connections; may be called twice. A rank that waits for this one fails at once."""


class Solo:
    """The group of one rank, where nothing needs to be exchanged."""

    rank = 0
    world = 1

    def sum(self, partial: Tensor) -> Tensor:
        return partial

    def sum_pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first, second

    def gather(self, part: Tensor) -> Tensor:
        return part.unsqueeze(0)

    def close(self) -> None:
        pass


class Ranks:
    """A group of processes over gloo (CPU) or nccl (CUDA).

    Sums come out bit-equal on all ranks: gloo's ring reduces every element on one rank and copies the result (a test
    holds it to that), and so do nccl's rings and trees.
    """

    def __init__(
        self, store: Store, rank: int, world: int, *, device: torch.device, host: str, timeout_s: float
    ) -> None:
        """Waits for all ranks. `host` is the address at which this rank's peers reach it.

        Raises RuntimeError when the others are not there within `timeout_s`, which bounds every later wait as well.
        """
        self.rank, self.world = rank, world
        self.summed_bytes = self.gathered_bytes = 0
        make = _nccl if device.type == "cuda" else _gloo
        self._backend: Any = make(store, rank, world, host, timedelta(seconds=timeout_s))
        self._options = dist.AllreduceOptions()  # a sum, when nothing else is said
        # Both backends connect at the first call at the latest; a peer that is missing must show here.
        self.sum(torch.zeros(1, device=device))
        self.summed_bytes = 0

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent so far. A ring all-reduce of B bytes sends 2 (n - 1) / n * B on every rank (Patarasuk
        and Yuan, 2009), a gather of B bytes a rank (n - 1) * B; a rank receives as much as it sends."""
        others = self.world - 1
        return 2 * others * self.summed_bytes // self.world + others * self.gathered_bytes

    def sum(self, partial: Tensor) -> Tensor:
        self.summed_bytes += partial.numel() * partial.element_size()
        self._backend.allreduce([partial], self._options).wait()
        return partial

    def sum_pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        both = self.sum(torch.stack((first, second)))
        return both[0], both[1]

    def gather(self, part: Tensor) -> Tensor:
        self.gathered_bytes += part.numel() * part.element_size()
        parts = part.new_empty((self.world * part.shape[0], *part.shape[1:]))
        self._backend._allgather_base(parts, part).wait()
        return parts.view(self.world, *part.shape)

    def close(self) -> None:
        if self._backend is not None:
            self._backend.abort()
            self._backend = None


def _gloo(store: Store, rank: int, world: int, host: str, timeout: timedelta) -> Any:  # noqa: ANN401 - untyped
    backend: Any = dist.ProcessGroupGloo
    options = backend._Options()
    # Without it gloo takes what this machine's own name resolves to, often an address of the loopback.
    options._devices = [backend.create_device(hostname=host)]
    options._timeout = timeout
    options._threads = 1
    return backend(store, rank, world, options)


def _nccl(store: Store, rank: int, world: int, host: str, timeout: timedelta) -> Any:  # noqa: ANN401 - untyped
    # nccl finds its addresses itself (NCCL_SOCKET_IFNAME). Waits are on the stream, not on the host: a rank that is
    # stuck for longer than the timeout makes nccl's watchdog end this process.
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, world, options)
