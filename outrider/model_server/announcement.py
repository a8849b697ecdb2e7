"""What the registry is told of this replica, from the first moment it listens.

Owns the replica's name and the address it gives. Knows nothing of Redis, nor of what the replica
does. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from outrider.model_server.messages import ServiceStatistics
from outrider.model_server.replica_status import ReplicaStatus
from outrider.redis.registry import Announcer, Replica
from outrider.settings.redis_address import RedisAddress
from outrider.settings.services import ModelServiceConfig
from outrider.v1 import model_pb2

_ANY_HOST = ("0.0.0.0", "::", "[::]", "")
# Of networks that exist in documents only (RFC 5737, RFC 3849): asking the system which of its own
# addresses would lead there sends nothing.
_ANYWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


class Announcement:
    """The replica as it is to be known; what the model says is empty until it is loaded."""

    def __init__(self, tier: str, address: str, status: ReplicaStatus) -> None:
        self._status = status
        self._statistics: Callable[[], ServiceStatistics] = ServiceStatistics
        self._announcer: Announcer | None = None
        # A process, not an address: one that comes after it at the same place is another.
        replica_id = secrets.token_hex(6)
        self._replica = Replica(tier, replica_id, address, status.state)

    def loaded(
        self, model: model_pb2.ModelInfo, statistics: Callable[[], ServiceStatistics]
    ) -> None:
        self._statistics = statistics
        self._replica = replace(
            self._replica,
            model_fingerprint=model.model_fingerprint,
            tokenizer_fingerprint=model.tokenizer_fingerprint,
            vocab_size=model.vocab_size,
            kv_capacity_tokens=model.kv_capacity_tokens,
        )
        self.renew()

    def renew(self) -> None:
        """The state has changed: whoever is told of it is told now."""
        if self._announcer is not None:
            self._announcer.renew()

    def replica(self) -> Replica:
        """Of this moment."""
        load = self._statistics()
        return replace(
            self._replica,
            state=self._status.state,
            kv_used_tokens=load.kv_used_tokens,
            num_open_generations=load.num_open_generations,
        )

    @contextlib.asynccontextmanager
    async def announced(self, redis: RedisAddress | None) -> AsyncIterator[None]:
        """For the time of a block; None: to nobody. Raises ConfigError for the address."""
        if redis is None:
            yield
            return
        self._announcer = Announcer(redis, self.replica)
        async with asyncio.TaskGroup() as tasks:
            announcing = tasks.create_task(self._announcer.run(), name="announcer")
            try:
                yield
            finally:
                announcing.cancel()


def advertised_address(config: ModelServiceConfig, port: int) -> str:
    """host:port as others reach the replica that listens on `port`."""
    if config.advertise is not None:
        return config.advertise
    host = _own_host() if config.host in _ANY_HOST else config.host
    return f"{host}:{port}"


def _own_host() -> str:
    """The machine's address on its way to others; without any way its name."""
    for family, anywhere in _ANYWHERE:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))
            host = str(probe.getsockname()[0])
            return f"[{host}]" if family is socket.AF_INET6 else host
    return socket.gethostname()
