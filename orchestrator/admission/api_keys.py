"""API keys: authenticates each call, over gRPC or HTTP, and applies the quota of its client.

The client of a call is a context variable of the call's task, set before the method runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from contextvars import ContextVar
from dataclasses import dataclass

import structlog

from orchestrator.admission.quota import Quota
from orchestrator.admission.shared_quota import SharedQuotas
from outrider.errors import CapacityExceeded, Unauthenticated
from outrider.runtime.interceptors import AccessInterceptor, Context, Reason, Refusals
from outrider.security.files import WatchedFiles
from outrider.security.keys import KeyLimits, KeyRing

_BEARER = "bearer "
_MAX_KEY_CHARS = 512


@dataclass(frozen=True)
class ApiClient:
    """Client of a call. `name`: of its API key; empty without API keys.

    `min_priority`: lowest priority number that counts against other clients; None: no limit.
    """

    name: str
    quota: Quota
    min_priority: int | None = None
    keys: ApiKeys | None = None

    def stream(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Counts a stream for the block. Raises CapacityExceeded with a retry hint."""
        return contextlib.nullcontext() if self.keys is None else self.keys.stream(self.quota)

    @contextlib.asynccontextmanager
    async def making(self, session_id: str | None) -> AsyncIterator[None]:
        """Counts the session that a request may create, for the block. None: it creates none.

        Raises CapacityExceeded at the session limit. If the request fails without having created
        the session, it is no longer counted.
        """
        if self.keys is None or session_id is None:
            yield
            return
        sessions, limits = self.keys.shared.sessions, self.quota.limits
        try:
            await sessions.reserve(self.name, session_id, limits.sessions)
        except CapacityExceeded:
            self.keys.refusals.count(Reason.OVER_SESSIONS)
            raise
        try:
            yield
        except BaseException:
            await asyncio.shield(sessions.release_if_gone(self.name, session_id))
            raise

    async def deleted(self, session_id: str) -> None:
        """Stops counting a session that was deleted."""
        if self.keys is not None:
            await self.keys.shared.sessions.release_if_gone(self.name, session_id)


_ANONYMOUS = ApiClient("", Quota("", KeyLimits()))
_CLIENT: ContextVar[ApiClient] = ContextVar("client", default=_ANONYMOUS)


def current_client() -> ApiClient:
    """Client of the call that this task serves."""
    return _CLIENT.get()


class ApiKeys:
    """Clients by API key, with their quotas. For use on the event loop only."""

    def __init__(self, keys: WatchedFiles[KeyRing], shared: SharedQuotas) -> None:
        self.keys = keys
        self.shared = shared
        self.refusals = Refusals()
        self._quotas: dict[str, Quota] = {}

    def enter(self, headers: Iterable[tuple[str, str | bytes]], method: str, peer: str) -> None:
        """Makes the client whose key is in the headers the current one. Raises Unauthenticated.

        `method`, `peer`: what is called and the client's address, for the log.
        """
        client = self._identify(_presented(headers), method, peer)
        _CLIENT.set(client)
        structlog.contextvars.bind_contextvars(client=client.name)

    @contextlib.asynccontextmanager
    async def stream(self, quota: Quota) -> AsyncIterator[None]:
        """Counts a stream of the key for the block. Raises CapacityExceeded with a retry hint."""
        async with contextlib.AsyncExitStack() as stream:
            try:
                stream.enter_context(quota.stream())
                await stream.enter_async_context(self.shared.stream(quota))
            except CapacityExceeded:
                self.refusals.count(Reason.OVER_LIMIT)
                raise
            yield

    def _identify(self, presented: str, method: str, peer: str) -> ApiClient:
        key = self.keys.current.find(presented) if presented else None
        if key is None:
            reason = Reason.UNKNOWN_KEY if presented else Reason.NO_KEY
            why = "unknown API key" if presented else "no API key"
            self.refusals.record(peer, method, reason, why)
            raise Unauthenticated(
                f"{why}: send a key as metadata or header, `authorization: Bearer KEY` or "
                "`x-api-key: KEY`"
            )
        quota = self._quotas.get(key.name)
        if quota is None:
            quota = self._quotas[key.name] = Quota(key.name, key.limits)
        quota.limits = key.limits
        return ApiClient(key.name, quota, key.limits.min_priority or 0, self)


class ApiKeyInterceptor(AccessInterceptor):
    """Requires a known API key of each gRPC call and counts streams.

    `metered`: full name of the method whose calls count as streams.
    """

    def __init__(self, keys: ApiKeys, metered: str) -> None:
        super().__init__()
        self.refusals = keys.refusals
        self._keys = keys
        self._metered = metered

    @contextlib.asynccontextmanager
    async def around(self, context: Context, method: str) -> AsyncIterator[None]:
        self._keys.enter(context.invocation_metadata() or (), method, context.peer())
        if method != self._metered:
            yield
            return
        async with current_client().stream():
            yield


def _presented(headers: Iterable[tuple[str, str | bytes]]) -> str:
    """The key in a call's headers. Empty: there is none, or two that differ."""
    keys: set[str] = set()
    for name, value in headers:
        if not isinstance(value, str) or len(value) > _MAX_KEY_CHARS:
            continue
        if name == "x-api-key":
            keys.add(value.strip())
        elif name == "authorization" and value[: len(_BEARER)].lower() == _BEARER:
            keys.add(value[len(_BEARER) :].strip())
    return keys.pop() if len(keys) == 1 else ""
