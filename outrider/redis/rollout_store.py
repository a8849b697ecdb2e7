"""Rollouts of draft revisions in Redis: one per target model, shared by its orchestrators.

Acceptance rates of all orchestrators are added up, so that all of them see the same comparison. A
change replaces a given version, so that only one orchestrator makes it. Owns the keys
`outrider:draft_rollout:*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from outrider.draft_rollout import AcceptanceSums, Rollout, revision_name
from outrider.redis.registry import LoggedConnection
from outrider.settings.redis_address import RedisAddress

log = structlog.get_logger()

_PREFIX = "outrider:draft_rollout:"
# A rollout that no orchestrator uses any more is forgotten.
_TTL_MS = b"%d" % (30 * 24 * 3600 * 1000)
# Rates are added as integers: sums must not depend on the order.
_SCALE = 1_000_000
_SUMS = ("num", "total", "squares")

# Adds to the sums if they are of the version that Redis has. Returns all fields.
_SYNC = b"""
if redis.call('HGET', KEYS[1], 'version') == ARGV[1] then
  for i = 3, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return redis.call('HGETALL', KEYS[1])
"""
# Replaces version ARGV[1] (0: none). The sums start again.
_REPLACE = b"""
if (redis.call('HGET', KEYS[1], 'version') or '0') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'rollout', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""


@dataclass(frozen=True)
class StoredRollout:
    """`version` is that in Redis; 0: there is none. `rollout` None: none, or it is unreadable."""

    version: int
    rollout: Rollout | None
    sums: Mapping[str, AcceptanceSums]


class RolloutStore:
    """Store of one target's rollout. May be used by one task at a time.

    While Redis is unavailable methods return None or False; this is logged once.
    """

    def __init__(self, redis: RedisAddress | str, target_fingerprint: str) -> None:
        """Raises ConfigError."""
        self._key = f"{_PREFIX}{revision_name(target_fingerprint)}".encode()
        self._connection = LoggedConnection(redis, "draft rollout")
        self._malformed = b""

    async def sync(
        self, version: int, additions: Mapping[str, AcceptanceSums]
    ) -> StoredRollout | None:
        """Adds to the sums of `version`, and returns what Redis has. None: Redis is unavailable.

        If the reply is lost, the additions may be lost or count twice.
        """
        args = [b"%d" % version, _TTL_MS]
        for revision, sums in additions.items():
            for name in _SUMS:
                value = getattr(sums, name) * (1 if name == "num" else _SCALE)
                args += [f"{name}:{revision}".encode(), b"%d" % round(value)]
        replies = await self._connection.request((b"EVAL", _SYNC, b"1", self._key, *args))
        if replies is None:
            return None
        values = replies[0]
        return self._parsed(dict(zip(values[::2], values[1::2], strict=True)))

    async def replace(self, version: int, rollout: Rollout) -> bool:
        """Stores `rollout` in place of `version`. False: Redis has another version by now."""
        args = (b"%d" % version, b"%d" % rollout.version, rollout.to_json(), _TTL_MS)
        replies = await self._connection.request((b"EVAL", _REPLACE, b"1", self._key, *args))
        return replies is not None and replies[0] == 1

    async def close(self) -> None:
        await self._connection.close()

    def _parsed(self, fields: dict[bytes, bytes]) -> StoredRollout:
        if not fields:
            return StoredRollout(0, None, {})
        record = fields.pop(b"rollout", b"")
        try:
            version = int(fields.pop(b"version", b""))
            return StoredRollout(version, Rollout.from_json(record), _sums_of(fields))
        except ValueError as error:  # of another release, or not ours
            if record != self._malformed:
                log.warning("draft_rollout_malformed", key=self._key.decode(), why=str(error))
            self._malformed = record
            return StoredRollout(0, None, {})


def _sums_of(fields: Mapping[bytes, bytes]) -> dict[str, AcceptanceSums]:
    values: dict[str, dict[str, int]] = {}
    for field, number in fields.items():
        name, _, revision = field.decode().partition(":")
        if name in _SUMS:
            values.setdefault(revision, {})[name] = int(number)
    return {
        revision: AcceptanceSums(
            sums.get("num", 0), sums.get("total", 0) / _SCALE, sums.get("squares", 0) / _SCALE
        )
        for revision, sums in values.items()
    }


async def stored_targets(redis: RedisAddress | str) -> list[str] | None:
    """Targets that have a rollout, as the store's key names them. None: Redis is unavailable."""
    connection = LoggedConnection(redis, "draft rollout")
    names: list[str] = []
    cursor = b"0"
    try:
        while True:
            pattern = f"{_PREFIX}*".encode()
            replies = await connection.request((b"SCAN", cursor, b"MATCH", pattern))
            if replies is None:
                return None
            cursor, keys = replies[0]
            names += [key.decode().removeprefix(_PREFIX) for key in keys]
            if cursor == b"0":
                return sorted(set(names))
    finally:
        await connection.close()
