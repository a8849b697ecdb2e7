"""What callers use at all orchestrators together: each tells Redis, each asks it.

Owns the keys `outrider:key:*` and a task that tells. Each orchestrator counts its own callers
beside this (`admission.quota`), which is what holds while Redis is away. Lives on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import structlog

from orchestrator.admission import session_limit
from orchestrator.admission.quota import Quota, streams_exceeded, tokens_exceeded
from orchestrator.sessions.lua import Script
from orchestrator.sessions.writer import PipelineWriter
from outrider.errors import OutriderError, Unavailable
from outrider.redis.connection import Command, RedisConnection
from outrider.settings.redis_address import RedisAddress

log = structlog.get_logger()

TELL_INTERVAL_S = 1.0
# Streams of an orchestrator that died are forgotten after so long: several missed tellings.
STREAM_TTL_S = 10.0
_MAX_ENDED = 1_000
# A call waits for the answer: who does not get it soon goes by what is known here.
REDIS_TIMEOUT_S = 0.5

# KEYS: a sorted set of streams by when they lapse, and a hash of tokens spent. Both prelude and
# clock are the session store's. Each orchestrator (`who`) sends its total, and the hash has the
# last one that came: a report that comes late, twice or after a newer one counts once.
_SPENT = """
local function spent_now(per_minute)
  local had = redis.call('HMGET', tokens_key, 'spent', 'at')
  local since = now_us() - (tonumber(had[2]) or 0)
  return math.max(0, (tonumber(had[1]) or 0) - since * per_minute / 60000000)
end
"""

# stream, most streams, tokens a minute ('' no limit), ttl_us, streams that have ended …
ENTER = Script(
    _SPENT
    + """
local stream, most, per_minute, ttl_us = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
for i = 5, #ARGV do redis.call('ZREM', key, ARGV[i]) end
redis.call('ZREMRANGEBYSCORE', key, '-inf', digits(now_us()))
if most ~= '' and not redis.call('ZSCORE', key, stream)
   and redis.call('ZCARD', key) >= tonumber(most) then
  return {'streams'}
end
if per_minute ~= '' then
  local over = spent_now(per_minute) + 1 - per_minute
  if over > 0 then return {'tokens', math.ceil(over * 60000 / per_minute)} end
end
redis.call('ZADD', key, digits(now_us() + ttl_us), stream)
redis.call('PEXPIRE', key, math.ceil(ttl_us / 1000))
return {'ok'}
"""
)

# who, tokens spent in total, of them acknowledged, tokens a minute ('' no limit), ttl_us, number of
# streams that have ended, those, streams that run …
TELL = Script(
    _SPENT
    + """
local who, total, told, per_minute, ttl_us, num_ended = unpack(ARGV, 1, 6)
for i = 7, 6 + num_ended do redis.call('ZREM', key, ARGV[i]) end
local until_us = digits(now_us() + ttl_us)
for i = 7 + num_ended, #ARGV do redis.call('ZADD', key, until_us, ARGV[i]) end
redis.call('PEXPIRE', key, math.ceil(ttl_us / 1000))
local last = tonumber(redis.call('HGET', tokens_key, who)) or tonumber(told)
if per_minute ~= '' and tonumber(total) > last then
  local spent = spent_now(per_minute) + total - last
  redis.call('HSET', tokens_key, 'spent', spent, 'at', digits(now_us()), who, total)
  redis.call('PEXPIRE', tokens_key, math.ceil((spent / per_minute + 1) * 60000))
end
return {'ok'}
"""
)


@dataclass
class _ClientUsage:
    """Of one caller, here: streams by name."""

    quota: Quota
    running: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    # Of the tokens spent, those that Redis has acknowledged.
    num_told: int = 0
    # Redis holds something else under this API key's keys; the count here goes on.
    is_unreadable: bool = False

    def first_ended(self) -> list[str]:
        """As many as fit into one call of a script: after an outage of Redis there may be many."""
        return list(itertools.islice(self.ended, _MAX_ENDED))

    @property
    def has_news(self) -> bool:
        return bool(self.running or self.ended or self.quota.num_spent > self.num_told)


class SharedQuotas:
    """`running` around all use. Who has no limits costs nothing."""

    def __init__(
        self,
        redis: RedisAddress | str,
        *,
        session_ttl_s: float = 3600.0,
        max_sessions: int = 10_000,
    ) -> None:
        """`max_sessions`: of a key without a limit of its own. Raises ConfigError (`redis`)."""
        scripts = (ENTER, TELL, *session_limit.SCRIPTS)
        preamble = [(b"SCRIPT", b"LOAD", script.source) for script in scripts]
        self._writer = PipelineWriter(
            RedisConnection(redis, timeout_s=REDIS_TIMEOUT_S, preamble=preamble)
        )
        self.sessions = session_limit.SessionLimit(
            self._writer, session_ttl_s=session_ttl_s, most=max_sessions
        )
        self._name = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._uses: dict[str, _ClientUsage] = {}
        self._is_away = False
        self._due = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._writer.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                telling = tasks.create_task(self._keep_telling(), name="quotas")
                try:
                    yield
                finally:
                    telling.cancel()
            with contextlib.suppress(TimeoutError):  # what is not told lapses
                async with asyncio.timeout(2 * REDIS_TIMEOUT_S):
                    await self._tell_all()
        finally:
            await self._writer.close()

    @contextlib.asynccontextmanager
    async def stream(self, quota: Quota) -> AsyncIterator[None]:
        """For the time of one call. Raises CapacityExceeded with a hint when to come back."""
        if quota.limits.streams is None and quota.limits.tokens_per_minute is None:
            yield
            return
        use = self._uses.setdefault(quota.name, _ClientUsage(quota))
        stream = f"{self._name}:{next(self._numbers)}"
        try:
            await self._enter(use, stream)
            use.running.add(stream)
            yield
        finally:  # cancelled on its way in it may be there all the same
            use.running.discard(stream)
            use.ended.add(stream)
            self._due.set()

    async def _enter(self, use: _ClientUsage, stream: str) -> None:
        limits, ended = use.quota.limits, use.first_ended()
        words = (stream, _said(limits.streams), _said(limits.tokens_per_minute), _TTL_US, *ended)
        answer = await self._ask(ENTER, use, words)
        if answer is None:
            return
        use.ended.difference_update(ended)
        if answer[0] == b"streams":
            assert limits.streams is not None, "it is the limit"
            raise streams_exceeded(use.quota.name, limits.streams)
        if answer[0] == b"tokens":
            assert limits.tokens_per_minute is not None, "it is the limit"
            raise tokens_exceeded(use.quota.name, limits.tokens_per_minute, answer[1] / 1000)

    async def _keep_telling(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_INTERVAL_S):
                    await self._due.wait()
            self._due.clear()
            await self._tell_all()
            await asyncio.sleep(TELL_INTERVAL_S / 10)  # many ends at a time are one telling

    async def _tell_all(self) -> None:
        for use in list(self._uses.values()):
            if use.has_news:
                await self._tell(use)
                if self._is_away:
                    return  # each of the others would wait for the same time-out

    async def _tell(self, use: _ClientUsage) -> None:
        quota, ended = use.quota, use.first_ended()
        total = quota.num_spent
        words = (
            self._name,
            str(total),
            str(use.num_told),
            _said(quota.limits.tokens_per_minute),
            _TTL_US,
            str(len(ended)),
            *ended,
            *use.running,
        )
        if await self._ask(TELL, use, words) is None:
            return
        use.ended.difference_update(ended)
        use.num_told = total

    async def _ask(self, script: Script, use: _ClientUsage, words: tuple[str, ...]) -> Any:
        """None: Redis is away, or holds something else under this key. Each is logged once."""
        name = use.quota.name
        key = f"outrider:key:{{{name}}}"
        keys: Command = (f"{key}:streams".encode(), f"{key}:tokens".encode())
        try:
            answer = await self._writer.run(script, keys, tuple(word.encode() for word in words))
        except Unavailable as error:
            if not self._is_away:
                log.warning("quotas_not_shared", why=str(error))
            self._is_away = True
            return None
        except OutriderError as error:
            self._is_away = False
            if not use.is_unreadable:
                log.warning("quota_unreadable", key=name, why=str(error))
            use.is_unreadable = True
            return None
        self._is_away = use.is_unreadable = False
        return answer


_TTL_US = str(round(STREAM_TTL_S * 1e6))


def _said(limit: int | None) -> str:
    return "" if limit is None else str(limit)
