"""Quotas of API keys over all orchestrators, counted in Redis.

Owns the keys `outrider:key:*:streams` and `outrider:key:*:tokens`. A request enters with one
round trip to Redis. What it uses is reported by a task, once a second, and never delays a token. A
stream is a lease: those of an orchestrator that died expire. Each orchestrator also counts its own
usage (`admission.quota`); while Redis is away, only that limit holds. Used on the event
loop only. ADR 20 explains why this is not the library `limits`.
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

REPORT_INTERVAL_S = 1.0
# Streams of an orchestrator that died expire after this time: several missed reports.
STREAM_TTL_S = 10.0
# Ended streams in one report. After an outage of Redis there may be many more.
_MAX_ENDED = 1_000
# A request waits for the reply. Without one it is admitted by the local quota alone.
REDIS_TIMEOUT_S = 0.5

# KEYS: a sorted set of streams by expiry, and a hash of spent tokens. Prelude and clock are the
# session store's. Each orchestrator (`name`) reports its total. The hash has the last total that
# arrived, so a report that arrives late, twice or out of order counts once.
_SPENT = """
local function spent_now(per_minute)
  local had = redis.call('HMGET', tokens_key, 'spent', 'at')
  local since = now_us() - (tonumber(had[2]) or 0)
  return math.max(0, (tonumber(had[1]) or 0) - since * per_minute / 60000000)
end
"""

# ARGV: stream, most streams ('' no limit), tokens per minute ('' no limit), ttl_us, ended streams …
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

# ARGV: name, tokens spent in total, reported total, tokens per minute ('' no limit), ttl_us,
# number of ended streams, ended streams …, running streams …
REPORT = Script(
    _SPENT
    + """
local name, total, reported, per_minute, ttl_us, num_ended = unpack(ARGV, 1, 6)
for i = 7, 6 + num_ended do redis.call('ZREM', key, ARGV[i]) end
local until_us = digits(now_us() + ttl_us)
for i = 7 + num_ended, #ARGV do redis.call('ZADD', key, until_us, ARGV[i]) end
redis.call('PEXPIRE', key, math.ceil(ttl_us / 1000))
local last = tonumber(redis.call('HGET', tokens_key, name)) or tonumber(reported)
if per_minute ~= '' and tonumber(total) > last then
  local spent = spent_now(per_minute) + total - last
  redis.call('HSET', tokens_key, 'spent', spent, 'at', digits(now_us()), name, total)
  redis.call('PEXPIRE', tokens_key, math.ceil((spent / per_minute + 1) * 60000))
end
return {'ok'}
"""
)


@dataclass
class _ClientUsage:
    """Usage of one API key at this orchestrator: streams by name, and reported tokens."""

    quota: Quota
    running: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    # Spent tokens whose report Redis has confirmed.
    num_reported: int = 0
    # Redis has another type of value under this key's names; only the local quota counts.
    is_unreadable: bool = False

    def first_ended(self) -> list[str]:
        """The ended streams that the next script reports."""
        return list(itertools.islice(self.ended, _MAX_ENDED))

    @property
    def is_report_due(self) -> bool:
        return bool(self.running or self.ended or self.quota.num_spent > self.num_reported)


class SharedQuotas:
    """Quotas of all API keys. Enter `running` before use.

    A key without limits causes no round trip.
    """

    def __init__(
        self,
        redis: RedisAddress | str,
        *,
        session_ttl_s: float = 3600.0,
        max_sessions: int = 10_000,
    ) -> None:
        """`max_sessions`: of a key without its own limit. Raises ConfigError for `redis`."""
        scripts = (ENTER, REPORT, *session_limit.SCRIPTS)
        preamble = [(b"SCRIPT", b"LOAD", script.source) for script in scripts]
        self._writer = PipelineWriter(
            RedisConnection(redis, timeout_s=REDIS_TIMEOUT_S, preamble=preamble)
        )
        self.sessions = session_limit.SessionLimit(
            self._writer, session_ttl_s=session_ttl_s, most=max_sessions
        )
        self._name = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._usages: dict[str, _ClientUsage] = {}
        self._is_away = False
        self._due = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connects to Redis and reports usage, for the block."""
        self._writer.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                reporting = tasks.create_task(self._keep_reporting(), name="quotas")
                try:
                    yield
                finally:
                    reporting.cancel()
            with contextlib.suppress(TimeoutError):  # streams that are not reported expire
                async with asyncio.timeout(2 * REDIS_TIMEOUT_S):
                    await self._report_all()
        finally:
            await self._writer.close()

    @contextlib.asynccontextmanager
    async def stream(self, quota: Quota) -> AsyncIterator[None]:
        """Counts a stream for the block. Raises CapacityExceeded with a retry hint."""
        if quota.limits.streams is None and quota.limits.tokens_per_minute is None:
            yield
            return
        usage = self._usages.setdefault(quota.name, _ClientUsage(quota))
        stream = f"{self._name}:{next(self._numbers)}"
        try:
            await self._enter(usage, stream)
            usage.running.add(stream)
            yield
        finally:  # also after a cancelled entry: Redis may have counted it
            usage.running.discard(stream)
            usage.ended.add(stream)
            self._due.set()

    async def _enter(self, usage: _ClientUsage, stream: str) -> None:
        limits, ended = usage.quota.limits, usage.first_ended()
        most, per_minute = limits.streams, limits.tokens_per_minute
        args = (stream, _optional(most), _optional(per_minute), _TTL_US, *ended)
        reply = await self._run(ENTER, usage, args)
        if reply is None:
            return
        usage.ended.difference_update(ended)
        if reply[0] == b"streams":
            assert most is not None, "it is the limit"
            raise streams_exceeded(usage.quota.name, most)
        if reply[0] == b"tokens":
            assert per_minute is not None, "it is the limit"
            raise tokens_exceeded(usage.quota.name, per_minute, reply[1] / 1000)

    async def _keep_reporting(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await self._due.wait()
            self._due.clear()
            await self._report_all()
            await asyncio.sleep(REPORT_INTERVAL_S / 10)  # one report for many streams that end

    async def _report_all(self) -> None:
        for usage in list(self._usages.values()):
            if usage.is_report_due:
                await self._report(usage)
                if self._is_away:
                    return  # each other report would wait for the same timeout

    async def _report(self, usage: _ClientUsage) -> None:
        quota, ended = usage.quota, usage.first_ended()
        total = quota.num_spent
        args = (
            self._name,
            str(total),
            str(usage.num_reported),
            _optional(quota.limits.tokens_per_minute),
            _TTL_US,
            str(len(ended)),
            *ended,
            *usage.running,
        )
        if await self._run(REPORT, usage, args) is None:
            return
        usage.ended.difference_update(ended)
        usage.num_reported = total

    async def _run(self, script: Script, usage: _ClientUsage, args: tuple[str, ...]) -> Any:
        """The script's reply. None: Redis is away or cannot read this API key's keys.

        Either is logged once.
        """
        name = usage.quota.name
        key = f"outrider:key:{{{name}}}"
        keys: Command = (f"{key}:streams".encode(), f"{key}:tokens".encode())
        try:
            reply = await self._writer.run(script, keys, tuple(arg.encode() for arg in args))
        except Unavailable as error:
            if not self._is_away:
                log.warning("quotas_not_shared", why=str(error))
            self._is_away = True
            return None
        except OutriderError as error:
            self._is_away = False
            if not usage.is_unreadable:
                log.warning("quota_unreadable", key=name, why=str(error))
            usage.is_unreadable = True
            return None
        self._is_away = usage.is_unreadable = False
        return reply


_TTL_US = str(round(STREAM_TTL_S * 1e6))


def _optional(limit: int | None) -> str:
    return "" if limit is None else str(limit)
