"""Session limit: bounds the number of sessions that each API key has in Redis.

Owns the keys `outrider:key:*:sessions`: a sorted set of a client's session keys, by the earliest
time at which each may have expired. A session is counted before it is created, and removed when it
is gone. Each write to a session extends the life of the set (`orchestrator.sessions.lua`).
"""

from __future__ import annotations

from orchestrator.sessions import StoreOptions
from orchestrator.sessions.lua import SESSIONS_KEY, Script
from orchestrator.sessions.records import session_key
from orchestrator.sessions.writer import PipelineWriter
from outrider.errors import CapacityExceeded, OutriderError

# KEYS: the set and the session's key. ARGV: most sessions, session_ttl_ms. A session whose time has
# passed may have been used since; so it is looked up, at most 32 of them in one call, and only if
# the set is full. These keys are not declared, which a Redis cluster would refuse.
RESERVE = Script("""
local most, ttl_ms = unpack(ARGV)
local now = now_us()
local function after(left_ms) return digits(now + left_ms * 1000) end
local is_counted = redis.call('ZSCORE', key, tokens_key)
if not is_counted and redis.call('ZCARD', key) >= tonumber(most)
   and redis.call('EXISTS', tokens_key) == 0 then
  local due = redis.call('ZRANGEBYSCORE', key, '-inf', digits(now), 'LIMIT', 0, 32)
  for _, other in ipairs(due) do
    local left_ms = redis.call('PTTL', other)
    if left_ms > 0 then
      redis.call('ZADD', key, after(left_ms), other)
    else
      redis.call('ZREM', key, other)
    end
  end
  if redis.call('ZCARD', key) >= tonumber(most) then
    local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
    return {'full', math.max(1, math.ceil((first[2] - now) / 1000))}
  end
end
redis.call('ZADD', key, after(ttl_ms), tokens_key)
outlive(key, ttl_ms)
return {'ok'}
""")

# Removes the session from the set if it does not exist.
RELEASE_IF_GONE = Script("""
if redis.call('EXISTS', tokens_key) == 0 then redis.call('ZREM', key, tokens_key) end
return {'ok'}
""")

SCRIPTS = (RESERVE, RELEASE_IF_GONE)


class SessionLimit:
    """Counts the sessions of API keys in Redis. For use on the event loop only.

    While Redis is away it refuses nothing: no session can be created then.
    """

    def __init__(self, writer: PipelineWriter, *, session_ttl_s: float, most: int) -> None:
        """`most`: sessions of a key without its own limit."""
        self._writer = writer
        self._ttl_ms = b"%d" % round(session_ttl_s * 1e3)
        self._most = most

    async def reserve(self, client: str, session_id: str, most: int | None) -> None:
        """Counts the session, once. `most` None: the default limit. Raises CapacityExceeded."""
        most = self._most if most is None else most
        args = (b"%d" % most, self._ttl_ms)
        try:
            status, *rest = await self._writer.run(RESERVE, _keys(client, session_id), args)
        except OutriderError:
            return
        if status == b"full":
            raise CapacityExceeded(
                f"key {client}: {most} sessions, the most allowed; delete one", rest[0] / 1000
            )

    async def release_if_gone(self, client: str, session_id: str) -> None:
        """Stops counting the session if it is gone. If this fails, its time in the set expires."""
        try:
            await self._writer.run(RELEASE_IF_GONE, _keys(client, session_id), ())
        except OutriderError:
            return


def _keys(client: str, session_id: str) -> tuple[bytes, bytes]:
    session = session_key(session_id, client, StoreOptions().prefix)
    return (SESSIONS_KEY % client).encode(), session.encode()
