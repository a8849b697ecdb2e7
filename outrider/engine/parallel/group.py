"""Rank group: the processes that hold one model, connected by torch.distributed.

Two process groups. The model's all-reduces use NCCL on CUDA and gloo on CPU, with a time-out. The
control group (gloo, CPU tensors) carries agreements at load and the operation log
(`operations.py`); an idle replica sends nothing there for days, so it has no time-out of its own.
A rank that dies closes its connections, which ends a wait in either group at once.
"""

from __future__ import annotations

import datetime
import socket
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

Message = npt.NDArray[np.int64]

# torch does not export its stores to type checkers.
_untyped: Any = dist

# Ranks read their shards at different speeds.
LOAD_TIMEOUT = datetime.timedelta(minutes=30)
_IDLE_TIMEOUT = datetime.timedelta(days=3650)

# Values of a message that travel with its length, in one broadcast; longer ones take a second.
_FIRST_VALUES = 512


def listening_store(host: str, port: int) -> Any:
    """The store at which the ranks meet, on rank 0. Listens on `host` only; port 0: a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    port = listener.getsockname()[1]
    return _untyped.TCPStore(
        host,
        port,
        is_master=True,
        timeout=LOAD_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def joined_store(host: str, port: int) -> Any:
    """The store of rank 0, on another rank. Waits until rank 0 listens."""
    return _untyped.TCPStore(host, port, is_master=False, timeout=LOAD_TIMEOUT)


class Place(NamedTuple):
    """Which rank this process is: rank 0 is the service."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of its CUDA device."""
    num_local: int = 1
    """Ranks that share this machine's memory and cores."""


_ALONE = Place()


class RankGroup:
    """This process's place among the ranks. Call it on the thread that runs the engine only."""

    def __init__(self, place: Place = _ALONE) -> None:
        self.place = place
        self._control: Any = None

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    @classmethod
    def join(cls, store: Any, place: Place, device_type: str) -> RankGroup:
        """Connect this rank with all others; returns when all have joined."""
        if dist.is_initialized():  # an earlier engine's, whose ranks have ended
            dist.destroy_process_group()
        group = cls(place)
        device = None
        if device_type == "cuda":
            device = torch.device("cuda", place.local_rank)
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend="gloo" if device is None else "nccl",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=LOAD_TIMEOUT,
            device_id=device,
        )
        group._control = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
        return group

    def lowest(self, value: int) -> int:
        """The lowest `value` of any rank. Every rank calls it."""
        if self.size == 1:
            return value
        lowest = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._control)
        return int(lowest)

    def limit_waits(self, module: Any, timeout_s: float) -> None:
        """Set the longest wait of the model's all-reduces for another rank, after loading."""
        if self.size > 1:
            timeout = datetime.timedelta(seconds=timeout_s)
            mesh = module._device_mesh
            names = mesh.mesh_dim_names or (None,)
            groups = [mesh.get_group(name) if name else mesh.get_group() for name in names]
            for group in (None, *groups):
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def send(self, message: Message) -> None:
        """Send a message to all other ranks; on rank 0 only."""
        first = torch.zeros(_FIRST_VALUES + 1, dtype=torch.int64)
        first[0] = message.size
        head = torch.from_numpy(message[:_FIRST_VALUES])
        first[1 : 1 + head.numel()] = head
        dist.broadcast(first, 0, group=self._control)
        if message.size > _FIRST_VALUES:
            dist.broadcast(torch.from_numpy(message[_FIRST_VALUES:]), 0, group=self._control)

    def receive(self) -> Message:
        """The next message of rank 0, on another rank. Waits without limit."""
        first = torch.zeros(_FIRST_VALUES + 1, dtype=torch.int64)
        dist.broadcast(first, 0, group=self._control)
        size = int(first[0])
        head: Message = first[1 : 1 + min(size, _FIRST_VALUES)].numpy()
        if size <= _FIRST_VALUES:
            return head
        tail = torch.empty(size - _FIRST_VALUES, dtype=torch.int64)
        dist.broadcast(tail, 0, group=self._control)
        return np.concatenate((head, tail.numpy()))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all shards of a sharded one, for which every rank must call it."""
    gather = getattr(tensor, "full_tensor", None)
    result: torch.Tensor = tensor if gather is None else gather()
    return result
