"""Session store: one method per transition of a session, each one a script in Redis.

Owns the names of the keys, the state of leases and the meaning of the scripts' replies.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Sequence
from typing import Any

from orchestrator.sessions import lua
from orchestrator.sessions.codec import (
    BYTES_PER_TOKEN,
    pack_kv,
    pack_messages,
    pack_tokens,
    refuse,
    unpack_snapshot,
    unpack_summary,
)
from orchestrator.sessions.listing import read_page, scan
from orchestrator.sessions.records import (
    Cursor,
    KvHandle,
    Lease,
    RoundRecord,
    SessionPage,
    SessionRecord,
    SessionSummary,
    StoreOptions,
    TokenIds,
    session_key,
    validate_session_id,
)
from orchestrator.sessions.writer import PipelineWriter
from outrider.errors import (
    InternalError,
    InvalidRequest,
    OutriderError,
    Unavailable,
    UnreadableRecord,
)
from outrider.redis.connection import Command, RedisConnection
from outrider.settings.redis_address import RedisAddress


class SessionStore:
    """Reads and writes sessions; any task of the event loop that called `start` may use it.

    Every method raises Unavailable when Redis cannot be reached, after at most about
    2 x socket_timeout_s.
    """

    def __init__(self, redis: RedisAddress | str, options: StoreOptions | None = None) -> None:
        """`redis`: an address, or a redis://, rediss:// or unix:// URL. Raises ConfigError."""
        self._options = options = options or StoreOptions()
        preamble = [(b"SCRIPT", b"LOAD", script.source) for script in lua.SCRIPTS]
        self._writer = PipelineWriter(
            RedisConnection(redis, timeout_s=options.socket_timeout_s, preamble=preamble)
        )
        self._lease_us = b"%d" % round(options.lease_ttl_s * 1e6)
        self._session_ttl_ms = b"%d" % round(options.session_ttl_s * 1e3)
        self._name = secrets.token_hex(6)
        self._acquisitions = itertools.count()

    async def start(self) -> None:
        """Connects. Raises Unavailable, with the store closed again, when Redis does not answer."""
        self._writer.start()
        try:
            await self._writer.command(b"PING")
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Sends pending writes, then disconnects. Leases that are not released expire."""
        await self._writer.close()

    @property
    def is_away(self) -> bool:
        """Whether the last exchange with Redis failed."""
        return self._writer.is_away

    @property
    def certificate_expires_at(self) -> float | None:
        """End of the certificate that Redis showed at the last connection, Unix time."""
        return self._writer.certificate_expires_at

    async def takes_writes(self) -> bool:
        """Writes a probe to Redis, which also updates `is_away` while there are no requests."""
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
        client: str = "",
    ) -> Lease:
        """Acquires the session's lease. Raises SessionNotFound, SessionInUse, InvalidRequest.

        `client`: the owner of the session; each owner has session ids of its own.
        `takeover`: take the lease although it is held; the former holder is fenced at once.
        When the task is cancelled here, a lease may stay until lease_ttl_s have passed.
        """
        owner = f"{self._name}:{next(self._acquisitions)}"
        status, *rest = await self._run(
            lua.ACQUIRE,
            session_id,
            client,
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
            refuse(status, rest, session_id)
        epoch, created, snapshot = rest
        snapshot[1] = 0  # if the command was sent twice, the first one is what uses the session
        try:
            record = unpack_snapshot(session_id, snapshot)
        except UnreadableRecord:
            await self._run(
                lua.RELEASE,
                session_id,
                client,
                (epoch, b"", b"", b"", b"0", self._session_ttl_ms),
            )
            raise
        cursor = Cursor(committed_len=len(record.token_ids), counters=record.counters)
        return Lease(session_id, int(epoch), record, bool(created), client=client, cursor=cursor)

    async def begin_turn(
        self,
        lease: Lease,
        token_ids: TokenIds | Sequence[int],
        *,
        keep_len: int,
        messages: Sequence[dict[str, str]],
        turn_json: str,
    ) -> None:
        """Begins a turn: keeps the first `keep_len` committed tokens and appends `token_ids`.

        Once per lease. Raises LeaseLost. After Unavailable only the same call or release may
        follow. It still succeeds after later leases were given, as long as none of them is held or
        has begun a turn (`lua`).
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
        """Appends a round, renews the lease, and returns once Redis has both. Raises LeaseLost.

        After Unavailable send the same round again, alone or joined with later ones
        (RoundRecord.then). Tokens that had arrived are not appended twice. Calls for one lease run
        one at a time, in order.
        """
        cursor = lease.cursor
        tokens = pack_tokens(round.token_ids)
        async with cursor.lock:
            if cursor.turn_owed:
                raise Unavailable("the turn's prompt is not recorded yet")
            if not tokens.startswith(cursor.owed):
                raise Unavailable("an earlier round is not recorded yet")
            counters = cursor.counters + round.counters
            cursor.owed = tokens
            await self._write(
                lua.RECORD,
                lease,
                _bytes_of(cursor.committed_len),
                tokens,
                # Totals, not increments, so that a repeated command changes nothing.
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
        """Extends the lease, for rounds that take longer than it. Raises LeaseLost."""
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
        """Ends the lease after all writes before it. `messages` None: leave them unchanged.

        `delete` removes the session. Raises LeaseLost. Shield this call from cancellation:
        otherwise the lease may stay until it expires.
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

    async def get(self, session_id: str, client: str = "") -> SessionRecord:
        """Reads a session without extending its expiry. Raises SessionNotFound."""
        return await self._read(lua.GET, session_id, client)

    async def page(self, cursor: int, client: str = "") -> SessionPage:
        """Part of the list of the caller's sessions, from `cursor` on; 0 is the first page.

        Keys that do not hold a readable session are logged and counted, not raised.
        """

        async def summary(session_id: str) -> SessionSummary | None:
            _, *rest = await self._run(lua.SUMMARY, session_id, client, ())
            return unpack_summary(session_id, rest) if rest else None

        names, cursor = await scan(self._writer, self._options.prefix, cursor, client)
        return await read_page(names, cursor, summary)

    async def delete(self, session_id: str, client: str = "") -> SessionRecord:
        """Deletes a session and returns its last record, so that its KV can be freed.

        Raises SessionNotFound, SessionInUse.
        """
        return await self._read(lua.DELETE, session_id, client)

    async def _read(self, script: lua.Script, session_id: str, client: str) -> SessionRecord:
        status, *rest = await self._run(script, session_id, client, ())
        if status != b"ok":
            refuse(status, rest, session_id)
        return unpack_snapshot(session_id, rest[0])

    async def _write(self, script: lua.Script, lease: Lease, *args: bytes) -> None:
        status, *rest = await self._run(
            script, lease.session_id, lease.client, (b"%d" % lease.epoch, *args)
        )
        if status != b"ok":
            refuse(status, rest, lease.session_id)

    async def _run(
        self, script: lua.Script, session_id: str, client: str, args: Command
    ) -> Sequence[Any]:
        try:
            reply: Sequence[Any] = await self._writer.run(
                script, self._keys(session_id, client), args
            )
        except UnreadableRecord as error:
            raise UnreadableRecord(f"session {session_id}: {error}") from None
        return reply

    def _keys(self, session_id: str, client: str) -> Command:
        key = session_key(validate_session_id(session_id), client, self._options.prefix)
        return key.encode(), f"{key}:tokens".encode()


def _bytes_of(num_tokens: int) -> bytes:
    return b"%d" % (num_tokens * BYTES_PER_TOKEN)
