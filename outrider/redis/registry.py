"""The registry of replicas in Redis: those that run announce themselves, orchestrators watch.

A record lives by Redis' own clock and expires unless it is renewed; an index says which records
there are. While Redis is away both sides keep trying, and say so once. Owns the keys
`outrider:replica:*` and `outrider:replicas:*`. Knows nothing of what replicas are chosen by.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import structlog

from outrider.errors import OutriderError
from outrider.redis.connection import Command, RedisConnection, Reply
from outrider.replica import Replica, ReplicaState
from outrider.settings.redis_address import RedisAddress

__all__ = ["Announcer", "Replica", "ReplicaState", "Watcher"]

log = structlog.get_logger()

# A record outlives five missed renewals: more than a Redis that is restarted, or a busy machine.
TTL_MS = 3_000
ANNOUNCE_INTERVAL_S = 0.5
# With the announcer's own time to write, a change is seen well within a second.
WATCH_INTERVAL_S = 0.3
# Of one exchange; a frozen Redis must not hold up more than one or two renewals.
REDIS_TIMEOUT_S = 1.0
# A record has about 400 bytes.
MAX_RECORD_BYTES = 8_192

# Members whose record has expired leave the index here, in the same instant in which they are seen
# to be gone: a renewal cannot come in between. One script is also one round trip.
_READ = b"""
local found = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local record = redis.pcall('GET', ARGV[1] .. id)
  if type(record) == 'string' then
    found[#found + 1] = id
    found[#found + 1] = record
  else
    redis.call('ZREM', KEYS[1], id)
  end
end
return found
"""


def _index_key(tier: str) -> bytes:
    return f"outrider:replicas:{tier}".encode()


def _record_key(tier: str, replica_id: str) -> bytes:
    return f"outrider:replica:{tier}:{replica_id}".encode()


class _RegistryConnection:
    """Exchanges with Redis; says once that it is away, and once that it is back."""

    def __init__(self, redis: RedisAddress | str, who: str) -> None:
        self._link = RedisConnection(redis, timeout_s=REDIS_TIMEOUT_S, preamble=())
        self._who = who
        self._is_away = False

    async def ask(self, *commands: Command) -> Sequence[Reply] | None:
        """None where Redis is away or refuses."""
        try:
            replies = await self._link.exchange(commands)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        except OutriderError as error:
            if not self._is_away:
                log.warning("registry_away", who=self._who, why=str(error))
            self._is_away = True
            return None
        if self._is_away:
            log.info("registry_back", who=self._who)
        self._is_away = False
        return replies

    async def close(self) -> None:
        await self._link.close()


class Announcer:
    """Keeps one replica's record fresh. `run` is its only task."""

    def __init__(self, redis: RedisAddress | str, describe: Callable[[], Replica]) -> None:
        """`describe`: the replica as it is now; its id stays. Raises ConfigError for the URL."""
        self._describe = describe
        self._line = _RegistryConnection(redis, "announcer")
        self._due = asyncio.Event()

    def renew(self) -> None:
        """Writes the record now: something has changed that others should know at once."""
        self._due.set()

    async def run(self) -> None:
        """Ends by cancellation, having taken the record back (if Redis is there)."""
        try:
            while True:
                self._due.clear()
                await self._write(self._describe())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ANNOUNCE_INTERVAL_S):
                        await self._due.wait()
        finally:
            await self._take_back(self._describe())

    async def _write(self, replica: Replica) -> None:
        index, ttl_ms = _index_key(replica.tier), b"%d" % TTL_MS
        record = _record_key(replica.tier, replica.id)
        await self._line.ask(
            (b"SET", record, replica.to_json(), b"PX", ttl_ms),
            (b"ZADD", index, b"0", replica.id.encode()),
            # With its last replica the index goes too, though nobody watches.
            (b"PEXPIRE", index, ttl_ms),
        )

    async def _take_back(self, replica: Replica) -> None:
        with contextlib.suppress(TimeoutError):  # it expires as well
            async with asyncio.timeout(REDIS_TIMEOUT_S):
                await self._line.ask(
                    (b"DEL", _record_key(replica.tier, replica.id)),
                    (b"ZREM", _index_key(replica.tier), replica.id.encode()),
                )
        await self._line.close()


class Watcher:
    """Follows the replicas of one tier. `run` is its only task."""

    def __init__(
        self, redis: RedisAddress | str, tier: str, on_change: Callable[[list[Replica]], None]
    ) -> None:
        """`on_change` gets the whole list, in the order of ids, whenever it differs.

        It is called on the event loop and must not block. The first list is told even if it is
        empty. While Redis is away the last list holds; a Redis that comes back empty names nobody
        until the replicas have announced themselves anew. Raises ConfigError for the URL.
        """
        self._tier = tier
        self._on_change = on_change
        self._line = _RegistryConnection(redis, f"watcher of {tier}")
        self._replicas: list[Replica] | None = None
        self._malformed: set[bytes] = set()

    async def run(self) -> None:
        """Ends by cancellation."""
        prefix = _record_key(self._tier, "")
        read = (b"EVAL", _READ, b"1", _index_key(self._tier), prefix)
        try:
            while True:
                replies = await self._line.ask(read)
                if replies is not None:
                    self._heard(replies[0])
                await asyncio.sleep(WATCH_INTERVAL_S)
        finally:
            await self._line.close()

    def _heard(self, pairs: list[bytes]) -> None:
        replicas: list[Replica] = []
        malformed: set[bytes] = set()
        for replica_id, record in zip(pairs[::2], pairs[1::2], strict=True):
            try:
                replicas.append(self._parse(replica_id, record))
            except ValueError as error:
                malformed.add(replica_id)
                if replica_id not in self._malformed:
                    log.warning("replica_record_malformed", id=replica_id[:64], why=str(error))
        self._malformed = malformed
        replicas.sort(key=lambda replica: replica.id)
        if replicas != self._replicas:
            self._replicas = replicas
            self._on_change(list(replicas))

    def _parse(self, replica_id: bytes, record: bytes) -> Replica:
        if len(record) > MAX_RECORD_BYTES:
            raise ValueError(f"{len(record)} bytes")
        replica = Replica.from_json(record)
        if (replica.tier, replica.id.encode()) != (self._tier, replica_id):
            raise ValueError(f"it calls itself {replica.tier}:{replica.id}")
        return replica
