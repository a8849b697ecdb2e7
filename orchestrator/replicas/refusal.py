"""Why a replica is not used though it answers, and when it is asked again.

Either its model does not fit here, or it refuses the question itself: it is no service of this
tier, or of another version, or takes no calls of ours. Owns the backoff; the checks are `pairing`'s
and `models`'.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import structlog

from outrider.errors import ConfigError

log = structlog.get_logger()

# Between two questions, doubled with each refusal for the same reason. A replica of another model
# stays what it is; only what it is compared with may change.
FIRST_RETRY_S = 0.2
MAX_RETRY_S = 5.0
# Answers of a server that will say the same the next time.
_REFUSALS = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)


class ReplicaRefusal:
    """Of one link. `on_change` is called when a replica is refused, or for another reason."""

    def __init__(self, tier: str, endpoint: str, on_change: Callable[[], None]) -> None:
        self._log = log.bind(tier=tier, endpoint=endpoint)
        self._on_change = on_change
        self.clear()

    def clear(self) -> None:
        """The replica is used."""
        # Of a replica whose model does not fit; None also where it is the replica that refuses.
        self.error: ConfigError | None = None
        # Empty: it is not refused, as far as is known.
        self.why = ""
        # How long the next question waits, if the last answer was a refusal.
        self.retry_s = FIRST_RETRY_S

    @contextlib.asynccontextmanager
    async def backing_off(self, channel: grpc.aio.Channel) -> AsyncIterator[None]:
        """Around the questions: what refuses is raised again once it is worth asking anew.

        After a while; or at once when the connection breaks: the replica may be another process.
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
        """Logs it, where it is another than before."""
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
