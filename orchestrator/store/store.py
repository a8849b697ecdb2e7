"""The session store: one method per transition of a session, each one script in Redis.

Owns the keys' names, the leases' bookkeeping and the meaning of replies. Knows nothing of rounds
beyond what they add.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Sequence
from typing import Any, NoReturn

from orchestrator.store import lua
from orchestrator.store.codec import (
    BYTES_PER_TOKEN,
    pack_kv,
    pack_messages,
    pack_tokens,
    unpack_snapshot,
    unpack_summary,
)
from orchestrator.store.listing import scan
from orchestrator.store.records import (
    Cursor,
    KvHandle,
    Lease,
    RoundRecord,
    SessionRecord,
    SessionSummary,
    StoreOptions,
    TokenIds,
    session_key,
    validate_session_id,
)
from orchestrator.store.writer import PipelineWriter
from outrider.errors import (
    InternalError,
    InvalidRequest,
    LeaseLost,
    OutriderError,
    SessionInUse,
    SessionNotFound,
    Unavailable,
    UnreadableRecord,
)
from outrider.redis_address import RedisAddress
from outrider.redis_link import Command, Link


class SessionStore:
    """All methods may be called by any task of the loop that called start.

    Each raises Unavailable where Redis cannot be reached, within about 2 x socket_timeout_s.
    """

    def __init__(self, redis: RedisAddress | str, options: StoreOptions | None = None) -> None:
        """A URL is redis://, rediss:// or unix://. Raises ConfigError for another."""
        self._options = options = options or StoreOptions()
        preamble = [(b"SCRIPT", b"LOAD", script.source) for script in lua.SCRIPTS]
        self._writer = PipelineWriter(
            Link(redis, timeout_s=options.socket_timeout_s, preamble=preamble)
        )
        self._lease_us = b"%d" % round(options.lease_ttl_s * 1e6)
        self._session_ttl_ms = b"%d" % round(options.session_ttl_s * 1e3)
        self._name = secrets.token_hex(6)
        self._acquisitions = itertools.count()

    async def start(self) -> None:
        """Raises Unavailable, having closed, where Redis does not answer now."""
        self._writer.start()
        try:
            await self._writer.command(b"PING")
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """What is pending is written first. Leases are left to their holders."""
        await self._writer.close()

    @property
    def is_away(self) -> bool:
        """Redis has not answered, or could not do what it was last asked for."""
        return self._writer.is_away

    async def takes_writes(self) -> bool:
        """Asks Redis now, so that `is_away` is known where nobody else asks."""
        key = f"{self._options.prefix}:probe".encode()
        with contextlib.suppress(OutriderError):
            await self._writer.run(lua.PROBE, (key, key), ())
            return True
        return False

    async def ping(self) -> bool:
        try:
            return bool(await self._writer.command(b"PING") == b"PONG")
        except Unavailable:
            return False

    async def acquire(
        self,
        session_id: str,
        *,
        create: bool,
        model: str,
        takeover: bool = False,
        caller: str = "",
    ) -> Lease:
        """Raises SessionNotFound, SessionInUse, InvalidRequest.

        `caller`: whose session; another's of the same name is another.
        `takeover` asks nobody: whoever holds the session can write no more, from this very moment.
        A caller cancelled here may leave a lease behind; it lapses after lease_ttl_s.
        """
        owner = f"{self._name}:{next(self._acquisitions)}"
        status, *rest = await self._run(
            lua.ACQUIRE,
            session_id,
            caller,
            (
                owner.encode(),
                b"1" if create else b"0",
                b"1" if takeover else b"0",
                model.encode(),
                self._lease_us,
                self._session_ttl_ms,
            ),
        )
        if status == b"other_model":
            raise InvalidRequest(
                "session_id", f"made with model {rest[0].decode()}; this one is {model}"
            )
        if status != b"ok":
            _refuse(status, rest, session_id)
        epoch, created, snapshot = rest
        snapshot[1] = 0  # not in use but by this very call, if that had to be sent twice
        try:
            record = unpack_snapshot(session_id, snapshot)
        except UnreadableRecord:
            await self._run(
                lua.RELEASE,
                session_id,
                caller,
                (epoch, b"", b"", b"", b"0", self._session_ttl_ms),
            )
            raise
        cursor = Cursor(committed_len=len(record.token_ids), counters=record.counters)
        return Lease(session_id, int(epoch), record, bool(created), caller=caller, cursor=cursor)

    async def begin_turn(
        self,
        lease: Lease,
        token_ids: TokenIds | Sequence[int],
        *,
        keep_len: int,
        messages: Sequence[dict[str, str]],
        turn_json: str,
    ) -> None:
        """Once per lease: the committed tokens become the first keep_len of them + token_ids.

        Raises LeaseLost. After Unavailable only the same call may follow, or release. Where later
        leases were given, but none of them is held or has begun a turn, it is still good (`lua`).
        """
        cursor = lease.cursor
        async with cursor.lock:
            if not 0 <= keep_len <= cursor.committed_len:
                raise InternalError(f"keep_len {keep_len} of {cursor.committed_len} tokens")
            tokens = pack_tokens(token_ids)
            cursor.turn_owed = True
            await self._write(
                lua.BEGIN_TURN,
                lease,
                _bytes_of(cursor.committed_len),
                _bytes_of(keep_len),
                tokens,
                pack_messages(messages),
                turn_json.encode(),
                self._lease_us,
                self._session_ttl_ms,
            )
            cursor.turn_owed = False
            cursor.committed_len = keep_len + len(tokens) // BYTES_PER_TOKEN

    async def record(self, lease: Lease, round: RoundRecord) -> None:
        """Appends a round; returns when Redis has it. Renews the lease. Raises LeaseLost.

        After Unavailable the round is the caller's to send again: as it was, or with later ones
        joined to it (RoundRecord.then). What had arrived is not added twice. Calls for one lease
        are served in their order, one at a time.
        """
        cursor = lease.cursor
        tokens = pack_tokens(round.token_ids)
        async with cursor.lock:
            if cursor.turn_owed:
                raise Unavailable("the turn itself is not recorded yet")
            if not tokens.startswith(cursor.owed):
                raise Unavailable("an earlier round is not recorded yet")
            counters = cursor.counters + round.counters
            cursor.owed = tokens
            await self._write(
                lua.RECORD,
                lease,
                _bytes_of(cursor.committed_len),
                tokens,
                # Totals, not increments: the same however often they arrive.
                b"%d" % counters.num_drafts,
                b"%d" % counters.num_draft_tokens,
                b"%d" % counters.num_accepted_tokens,
                b"%d" % counters.num_emitted_tokens,
                pack_kv(round.target_kv),
                pack_kv(round.draft_kv),
                self._lease_us,
                self._session_ttl_ms,
            )
            cursor.owed = b""
            cursor.committed_len += len(tokens) // BYTES_PER_TOKEN
            cursor.counters = counters

    async def renew(self, lease: Lease) -> None:
        """For rounds longer than the lease. Raises LeaseLost."""
        await self._write(lua.RENEW, lease, self._lease_us, self._session_ttl_ms)

    async def release(
        self,
        lease: Lease,
        *,
        target_kv: KvHandle | None,
        draft_kv: KvHandle | None,
        messages: Sequence[dict[str, str]] | None = None,
        delete: bool = False,
    ) -> None:
        """Ends the lease after the writes before it. None messages: as they are.

        delete removes the session. Raises LeaseLost. Shield it: cancelled, it may not happen.
        """
        async with lease.cursor.lock:
            await self._write(
                lua.RELEASE,
                lease,
                pack_kv(target_kv),
                pack_kv(draft_kv),
                b"" if messages is None else pack_messages(messages),
                b"1" if delete else b"0",
                self._session_ttl_ms,
            )

    async def get(self, session_id: str, caller: str = "") -> SessionRecord:
        """Raises SessionNotFound. Does not make the session live longer."""
        return await self._read(lua.GET, session_id, caller)

    async def page(self, cursor: int, caller: str = "") -> tuple[list[SessionSummary], int]:
        """Some of the caller's sessions, and the cursor of the next page; 0 begins and ends."""
        names, cursor = await scan(self._writer, self._options.prefix, cursor, caller)
        runs = (self._run(lua.SUMMARY, name, caller, ()) for name in names)
        replies = zip(names, await asyncio.gather(*runs), strict=True)
        return [unpack_summary(name, rest) for name, (_, *rest) in replies if rest], cursor

    async def delete(self, session_id: str, caller: str = "") -> SessionRecord:
        """What it was, so that its KV can be freed. Raises SessionNotFound, SessionInUse."""
        return await self._read(lua.DELETE, session_id, caller)

    async def _read(self, script: lua.Script, session_id: str, caller: str) -> SessionRecord:
        status, *rest = await self._run(script, session_id, caller, ())
        if status != b"ok":
            _refuse(status, rest, session_id)
        return unpack_snapshot(session_id, rest[0])

    async def _write(self, script: lua.Script, lease: Lease, *args: bytes) -> None:
        status, *rest = await self._run(
            script, lease.session_id, lease.caller, (b"%d" % lease.epoch, *args)
        )
        if status != b"ok":
            _refuse(status, rest, lease.session_id)

    async def _run(
        self, script: lua.Script, session_id: str, caller: str, args: Command
    ) -> Sequence[Any]:
        try:
            reply: Sequence[Any] = await self._writer.run(
                script, self._keys(session_id, caller), args
            )
        except UnreadableRecord as error:
            raise UnreadableRecord(f"session {session_id}: {error}") from None
        return reply

    def _keys(self, session_id: str, caller: str) -> Command:
        key = session_key(validate_session_id(session_id), caller, self._options.prefix)
        return key.encode(), f"{key}:tokens".encode()


def _bytes_of(num_tokens: int) -> bytes:
    return b"%d" % (num_tokens * BYTES_PER_TOKEN)


def _refuse(status: bytes, rest: Sequence[Any], session_id: str) -> NoReturn:
    if status == b"not_found":
        raise SessionNotFound(f"session {session_id} does not exist or has expired")
    if status == b"in_use":
        raise SessionInUse(f"session {session_id} is held by another call")
    if status == b"fenced":
        raise LeaseLost(f"session {session_id} has been taken by a later call")
    if status == b"later":
        raise Unavailable(f"session {session_id} is held by a later call, which has begun nothing")
    if status == b"gone":
        raise LeaseLost(f"session {session_id} has expired, or Redis has lost it")
    if status == b"newer":
        raise UnreadableRecord(
            f"session {session_id}: its record has version {rest[0].decode()}; this orchestrator "
            f"reads up to {lua.VERSION}: ask a newer one"
        )
    if status == b"mismatch":
        raise InternalError(f"session {session_id}: Redis has {rest[0]} tokens, not those expected")
    raise InternalError(f"session {session_id}: status {status!r}")
