"""Who calls: the key of each call, whose it is, and what they may use.

A call's caller is a variable of its task's context, set before the method runs. Knows keys and
quotas; nothing of requests or sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass

import structlog

from orchestrator.admission.quota import Quota
from orchestrator.admission.shared_quota import SharedQuotas
from outrider.errors import CapacityExceeded, Unauthenticated
from outrider.runtime.interceptors import AccessInterceptor, Context, Reason
from outrider.security.files import WatchedFiles
from outrider.security.keys import KeyLimits, KeyRing

_BEARER = "bearer "
_MAX_KEY_CHARS = 512


@dataclass(frozen=True)
class ApiClient:
    """`name`: of the key; empty where no keys are asked for, and all callers are one.

    `min_priority`: the lowest priority number that counts against other callers; None: any does.
    """

    name: str
    quota: Quota
    min_priority: int | None = None
    gate: ApiKeyInterceptor | None = None

    @contextlib.asynccontextmanager
    async def making(self, session_id: str | None) -> AsyncIterator[None]:
        """Around a call that may make this session; None: it makes none.

        Raises CapacityExceeded where the caller has as many as it may. A call that ends early may
        leave no session: its place is then given back.
        """
        if self.gate is None or session_id is None:
            yield
            return
        places, limits = self.gate.shared.sessions, self.quota.limits
        try:
            await places.take(self.name, session_id, limits.sessions)
        except CapacityExceeded:
            self.gate.refusals.count(Reason.OVER_SESSIONS)
            raise
        try:
            yield
        except BaseException:
            await asyncio.shield(places.settle(self.name, session_id))
            raise

    async def deleted(self, session_id: str) -> None:
        """The session is gone, and counts no more."""
        if self.gate is not None:
            await self.gate.shared.sessions.settle(self.name, session_id)


_ANYBODY = ApiClient("", Quota("", KeyLimits()))
_CALLER: ContextVar[ApiClient] = ContextVar("caller", default=_ANYBODY)


def current_client() -> ApiClient:
    """Of the call whose task this is."""
    return _CALLER.get()


class ApiKeyInterceptor(AccessInterceptor):
    """Lets in whoever shows a key that is known. Lives on the event loop.

    `metered`: the full name of the method whose calls count as streams.
    """

    def __init__(self, keys: WatchedFiles[KeyRing], metered: str, shared: SharedQuotas) -> None:
        super().__init__()
        self.keys = keys
        self.shared = shared
        self._metered = metered
        self._quotas: dict[str, Quota] = {}

    @contextlib.asynccontextmanager
    async def around(self, context: Context, method: str) -> AsyncIterator[None]:
        client = self._identify(context, method)
        _CALLER.set(client)
        structlog.contextvars.bind_contextvars(client=client.name)
        if method != self._metered:
            yield
            return
        async with contextlib.AsyncExitStack() as stream:
            try:
                stream.enter_context(client.quota.stream())
                await stream.enter_async_context(self.shared.stream(client.quota))
            except CapacityExceeded:
                self.refusals.count(Reason.OVER_LIMIT)
                raise
            yield

    def _identify(self, context: Context, method: str) -> ApiClient:
        presented = _presented(context)
        key = self.keys.current.find(presented) if presented else None
        if key is None:
            reason = Reason.UNKNOWN_KEY if presented else Reason.NO_KEY
            why = "the key is not known" if presented else "no key was shown"
            self.refusals.say(context, method, reason, why)
            raise Unauthenticated(
                f"{why}: send one as metadata, `authorization: Bearer KEY` or `x-api-key: KEY`"
            )
        quota = self._quotas.get(key.name)
        if quota is None:
            quota = self._quotas[key.name] = Quota(key.name, key.limits)
        quota.limits = key.limits
        return ApiClient(key.name, quota, key.limits.min_priority or 0, self)


def _presented(context: Context) -> str:
    """Empty: none, or two that differ."""
    shown: set[str] = set()
    for name, value in context.invocation_metadata() or ():
        if not isinstance(value, str) or len(value) > _MAX_KEY_CHARS:
            continue
        if name == "x-api-key":
            shown.add(value.strip())
        elif name == "authorization" and value[: len(_BEARER)].lower() == _BEARER:
            shown.add(value[len(_BEARER) :].strip())
    return shown.pop() if len(shown) == 1 else ""
