"""Registry of replicas in Redis: replicas announce themselves, orchestrators watch.

Each replica has a record that expires by Redis' clock unless it is renewed. An index per tier lists
the records. While Redis is unavailable both sides keep trying and log this once. Owns the keys
`outrider:replica:*` and `outrider:replicas:*`.
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

# A record survives five missed renewals: a Redis restart or a busy machine.
TTL_MS = 3_000
ANNOUNCE_INTERVAL_S = 0.5
# Together with the time to write the record, a change is seen well within a second.
WATCH_INTERVAL_S = 0.3
# Timeout of one exchange; a frozen Redis delays only one or two renewals.
REDIS_TIMEOUT_S = 1.0
# A record has about 400 bytes.
MAX_RECORD_BYTES = 8_192

# Removes members whose record has expired from the index, atomically: no renewal can come in
# between. One script is also one round trip.
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


class LoggedConnection:
    """Connection that logs once when Redis is lost and once when it is back."""

    def __init__(self, redis: RedisAddress | str, name: str) -> None:
        self._connection = RedisConnection(redis, timeout_s=REDIS_TIMEOUT_S, preamble=())
        self._name = name
        self._is_unavailable = False

    async def request(self, *commands: Command) -> Sequence[Reply] | None:
        """The replies; None if Redis is unavailable or a command fails."""
        try:
            replies = await self._connection.exchange(commands)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        except OutriderError as error:
            if not self._is_unavailable:
                log.warning("registry_away", who=self._name, why=str(error))
            self._is_unavailable = True
            return None
        if self._is_unavailable:
            log.info("registry_back", who=self._name)
        self._is_unavailable = False
        return replies

    async def close(self) -> None:
        await self._connection.close()


class Announcer:
    """Announces one replica and renews its record. `run` is its only task."""

    def __init__(self, redis: RedisAddress | str, describe: Callable[[], Replica]) -> None:
        """`describe` returns the replica's current record; its id is fixed. Raises ConfigError."""
        self._describe = describe
        self._connection = LoggedConnection(redis, "announcer")
        self._renewal = asyncio.Event()

    def renew(self) -> None:
        """Writes the record now, without waiting for the next interval."""
        self._renewal.set()

    async def run(self) -> None:
        """Runs until cancelled, then removes the record if Redis is available."""
        try:
            while True:
                self._renewal.clear()
                await self._write(self._describe())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ANNOUNCE_INTERVAL_S):
                        await self._renewal.wait()
        finally:
            await self._withdraw(self._describe())

    async def _write(self, replica: Replica) -> None:
        index, ttl_ms = _index_key(replica.tier), b"%d" % TTL_MS
        record = _record_key(replica.tier, replica.id)
        await self._connection.request(
            (b"SET", record, replica.to_json(), b"PX", ttl_ms),
            (b"ZADD", index, b"0", replica.id.encode()),
            # The index expires after the last replica, even if no watcher cleans it up.
            (b"PEXPIRE", index, ttl_ms),
        )

    async def _withdraw(self, replica: Replica) -> None:
        with contextlib.suppress(TimeoutError):  # otherwise the record expires
            async with asyncio.timeout(REDIS_TIMEOUT_S):
                await self._connection.request(
                    (b"DEL", _record_key(replica.tier, replica.id)),
                    (b"ZREM", _index_key(replica.tier), replica.id.encode()),
                )
        await self._connection.close()


class Watcher:
    """Watches the replicas of one tier. `run` is its only task."""

    def __init__(
        self, redis: RedisAddress | str, tier: str, on_change: Callable[[list[Replica]], None]
    ) -> None:
        """`on_change` receives the whole list, sorted by id, whenever it has changed.

        It is called on the event loop and must not block. The first list is reported even if it is
        empty. While Redis is unavailable the last list remains valid. After Redis has restarted
        empty, the list is empty until the replicas announce themselves again. Raises ConfigError if
        the URL is invalid.
        """
        self._tier = tier
        self._on_change = on_change
        self._connection = LoggedConnection(redis, f"watcher of {tier}")
        self._replicas: list[Replica] | None = None
        self._malformed: set[bytes] = set()

    async def run(self) -> None:
        """Runs until cancelled."""
        prefix = _record_key(self._tier, "")
        read = (b"EVAL", _READ, b"1", _index_key(self._tier), prefix)
        try:
            while True:
                replies = await self._connection.request(read)
                if replies is not None:
                    self._update(replies[0])
                await asyncio.sleep(WATCH_INTERVAL_S)
        finally:
            await self._connection.close()

    def _update(self, pairs: list[bytes]) -> None:
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
            raise ValueError(f"{len(record)} bytes; at most {MAX_RECORD_BYTES}")
        replica = Replica.from_json(record)
        if (replica.tier, replica.id.encode()) != (self._tier, replica_id):
            raise ValueError(f"its content is of replica {replica.tier}:{replica.id}")
        return replica
