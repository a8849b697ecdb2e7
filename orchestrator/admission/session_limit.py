"""How many sessions each API key has in Redis, against what it may have.

Owns the keys `outrider:key:*:sessions`: a sorted set of a caller's session keys by when each may
have expired. A place is taken before a session is made, and given back when the session is gone.
The set lives as long as its sessions: each write to one of them sees to that (`store.lua`).
"""

from __future__ import annotations

from orchestrator.sessions import StoreOptions
from orchestrator.sessions.lua import PLACES_KEY, Script
from orchestrator.sessions.records import session_key
from orchestrator.sessions.writer import PipelineWriter
from outrider.errors import CapacityExceeded, OutriderError

# KEYS: the set and the session's own key. The scripts look at other keys of the set's, too: Redis
# has no cluster mode here (docs/deploy.md). Members whose time is over may have been used since, so
# they are looked up; at most 32 in one call, and only where the set is full.
TAKE = Script("""
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

# The session may be gone: then its place is free.
SETTLE = Script("""
if redis.call('EXISTS', tokens_key) == 0 then redis.call('ZREM', key, tokens_key) end
return {'ok'}
""")

SCRIPTS = (TAKE, SETTLE)


class SessionLimit:
    """Lives on the event loop. While Redis is away nothing is refused here: no session is made."""

    def __init__(self, writer: PipelineWriter, *, session_ttl_s: float, most: int) -> None:
        """`most`: of a key without a limit of its own."""
        self._writer = writer
        self._ttl_ms = b"%d" % round(session_ttl_s * 1e3)
        self._most = most

    async def take(self, client: str, session_id: str, most: int | None) -> None:
        """A session that is there keeps its place. Raises CapacityExceeded."""
        most = self._most if most is None else most
        args = (b"%d" % most, self._ttl_ms)
        try:
            status, *rest = await self._writer.run(TAKE, _keys(client, session_id), args)
        except OutriderError:
            return
        if status == b"full":
            raise CapacityExceeded(
                f"key {client}: {most} sessions, the most allowed; delete one", rest[0] / 1000
            )

    async def settle(self, client: str, session_id: str) -> None:
        """Gives the place back where the session is gone. What fails here ends by time."""
        try:
            await self._writer.run(SETTLE, _keys(client, session_id), ())
        except OutriderError:
            return


def _keys(client: str, session_id: str) -> tuple[bytes, bytes]:
    session = session_key(session_id, client, StoreOptions().prefix)
    return (PLACES_KEY % client).encode(), session.encode()
