"""Registry announcement of this replica, from the moment its server listens.

Owns the replica's id and its advertised address. The Redis side is in `outrider.redis.registry`.
For use on the event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from outrider.model_server.messages import ServiceStatistics
from outrider.model_server.replica_status import ReplicaStatus
from outrider.redis.registry import Announcer, Replica
from outrider.settings.redis_address import RedisAddress
from outrider.settings.services import ModelServiceConfig
from outrider.v1 import model_pb2

_ANY_HOST = ("0.0.0.0", "::", "[::]", "")
# Documentation networks (RFC 5737, RFC 3849). Connecting a UDP socket to one sends nothing; it only
# makes the system choose a source address.
_ROUTE_PROBES = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


class Announcement:
    """The replica's record in the registry; model fields are empty until the model is loaded."""

    def __init__(self, tier: str, address: str, status: ReplicaStatus) -> None:
        self._status = status
        self._statistics: Callable[[], ServiceStatistics] = ServiceStatistics
        self._announcers: list[Announcer] = []
        # The id names a process, not an address: a restarted replica is a new one.
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
        """Announces the current state at once, without waiting for the next interval."""
        for announcer in self._announcers:
            announcer.renew()

    def replica(self) -> Replica:
        """The record as of now."""
        load = self._statistics()
        return replace(
            self._replica,
            state=self._status.state,
            kv_used_tokens=load.kv_used_tokens,
            num_open_generations=load.num_open_generations,
        )

    @contextlib.asynccontextmanager
    async def announced(self, registries: Sequence[RedisAddress]) -> AsyncIterator[None]:
        """Announces the replica in each registry for the time of a block.

        Raises ConfigError if an address is invalid.
        """
        self._announcers = [Announcer(redis, self.replica) for redis in registries]
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(each.run(), name="announcer") for each in self._announcers]
            try:
                yield
            finally:
                for announcing in running:
                    announcing.cancel()


def advertised_address(config: ModelServiceConfig, port: int) -> str:
    """host:port under which other hosts reach the replica that listens on `port`."""
    if config.advertise is not None:
        return config.advertise
    host = _own_host() if config.host in _ANY_HOST else config.host
    return f"{host}:{port}"


def _own_host() -> str:
    """The address this machine uses towards other hosts; its host name where it has no route."""
    for family, probe_address in _ROUTE_PROBES:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((probe_address, 9))
            host = str(probe.getsockname()[0])
            return f"[{host}]" if family is socket.AF_INET6 else host
    return socket.gethostname()
