"""Refusal of a replica that answers but cannot be used, and the delay before the next attempt.

Either its model does not fit, or it rejects GetModelInfo: it is a service of another tier or
version, or it does not accept our credentials. The checks are in `pairing` and `models`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import structlog

from outrider.errors import ConfigError

log = structlog.get_logger()

# Delay between attempts, doubled with each refusal for the same reason. It stays short, because the
# replicas that it is compared with may change.
FIRST_RETRY_S = 0.2
MAX_RETRY_S = 5.0
# Status codes that a retry would get again.
_REFUSALS = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)


class ReplicaRefusal:
    """Refusal state of one link. `on_change` is called at each refusal."""

    def __init__(self, tier: str, endpoint: str, on_change: Callable[[], None]) -> None:
        self._log = log.bind(tier=tier, endpoint=endpoint)
        self._on_change = on_change
        self.clear()

    def clear(self) -> None:
        """The replica is in use: forget the refusal."""
        # Why its model does not fit; None also if the replica itself rejects requests.
        self.error: ConfigError | None = None
        # Reason of the refusal; empty: none.
        self.why = ""
        # Delay before the next attempt after a refusal.
        self.retry_s = FIRST_RETRY_S

    @contextlib.asynccontextmanager
    async def backing_off(self, channel: grpc.aio.Channel) -> AsyncIterator[None]:
        """Context of an attempt: a refusal is raised again when the next attempt makes sense.

        That is after the delay, or when the connection breaks: then it may be another process.
        """
        try:
            yield
        except ConfigError as error:
            self.note(error)
            await self._wait(channel)
            raise
        except grpc.aio.AioRpcError as error:
            if error.code() not in _REFUSALS:
                raise
            self._note(f"{error.code().name}: {error.details()}", None)
            await self._wait(channel)
            raise

    def note(self, error: ConfigError) -> None:
        """Record the refusal; log it if the reason is new."""
        self._note(str(error), error)

    def _note(self, why: str, error: ConfigError | None) -> None:
        if self.why != why:
            self.clear()
            self._log.error("replica_refused", why=why)
        self.why, self.error = why, error
        self._on_change()

    async def _wait(self, channel: grpc.aio.Channel) -> None:
        wait_s, self.retry_s = self.retry_s, min(2 * self.retry_s, MAX_RETRY_S)
        ready = grpc.ChannelConnectivity.READY
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while channel.get_state() is ready:
                    await channel.wait_for_state_change(ready)
