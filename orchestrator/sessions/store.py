"""Session store: one method per transition of a session, each of them one script in Redis.

A write whose reply was lost may have been applied; the caller sends it again. Three parts make this
safe, and each is needed. The scripts apply a repeated write once, since only Redis knows whether it
arrived (`lua`). The lease's `Cursor` has the confirmed length, which is the offset of the next
write; it also refuses a round that would leave out an unconfirmed one. The recorder
(`orchestrator.generation.recorder`) has the rounds themselves until they are confirmed.
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
)
from orchestrator.sessions.listing import SUMMARY, SessionPage, read_page, scan
from orchestrator.sessions.records import (
    Cursor,
    KvHandle,
    Lease,
    RoundRecord,
    SessionRecord,
    StoreOptions,
    TokenIds,
    session_key,
    validate_session_id,
)
from orchestrator.sessions.writer import PipelineWriter
from outrider.errors import (
    InternalError,
    OutriderError,
    Unavailable,
    UnreadableRecord,
)
from outrider.redis.connection import Command, RedisConnection
from outrider.settings.redis_address import RedisAddress

# Belongs to no session: shows whether Redis accepts writes. Leaves nothing.
_PROBE = lua.Script("""
redis.call('HSET', key, 'at', digits(now_us()))
redis.call('DEL', key)
return {'ok'}
""")
_SCRIPTS = (*lua.SCRIPTS, SUMMARY, _PROBE)


class SessionStore:
    """Reads and writes sessions. Any task of the event loop that called `start` may use it.

    Every method raises Unavailable if Redis cannot be reached, after at most about
    2 x socket_timeout_s; and UnreadableRecord, which names the session, for a malformed record, one
    of a newer version, and a key that is not a session.
    """

    def __init__(self, redis: RedisAddress | str, options: StoreOptions | None = None) -> None:
        """`redis`: an address, or a redis://, rediss:// or unix:// URL. Raises ConfigError."""
        self._options = options = options or StoreOptions()
        preamble = [(b"SCRIPT", b"LOAD", script.source) for script in _SCRIPTS]
        self._writer = PipelineWriter(
            RedisConnection(redis, timeout_s=options.socket_timeout_s, preamble=preamble)
        )
        self._session_ttl_ms = b"%d" % round(options.session_ttl_s * 1e3)
        # Arguments lease_us and session_ttl_ms of the scripts that renew a lease.
        self._ttls = (b"%d" % round(options.lease_ttl_s * 1e6), self._session_ttl_ms)
        self._name = secrets.token_hex(6)
        self._acquisitions = itertools.count()

    async def start(self) -> None:
        """Connects. If Redis does not answer, closes the store and raises Unavailable."""
        self._writer.start()
        try:
            await self._writer.command(b"PING")
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Sends pending writes, then disconnects. Unreleased leases expire."""
        await self._writer.close()

    @property
    def is_away(self) -> bool:
        """Whether the last exchange with Redis failed."""
        return self._writer.is_away

    @property
    def certificate_expires_at(self) -> float | None:
        """End of validity of the certificate that Redis presented last, Unix time. None: no TLS."""
        return self._writer.certificate_expires_at

    async def takes_writes(self) -> bool:
        """Whether Redis accepts writes: writes a probe. Also updates `is_away` between requests."""
        key = f"{self._options.prefix}:probe".encode()
        with contextlib.suppress(OutriderError):
            await self._writer.run(_PROBE, (key, key), ())
            return True
        return False

    async def ping(self) -> bool:
        """Whether Redis answers."""
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

        `client`: owner of the session; each client has its own session ids. `takeover`: acquire the
        lease also while another holder has it; that holder is fenced at once. If the task is
        cancelled here, the lease may remain until lease_ttl_s have passed.
        """
        owner = f"{self._name}:{next(self._acquisitions)}"
        args = (owner.encode(), _flag(create), _flag(takeover), model.encode(), *self._ttls)
        status, *rest = await self._run(lua.ACQUIRE, session_id, client, args)
        if status != b"ok":
            refuse(status, rest, session_id)
        epoch, created, snapshot = rest
        snapshot[1] = 0  # in use only by this call, if the command was sent twice
        try:
            record = unpack_snapshot(session_id, snapshot)
        except UnreadableRecord:
            args = (epoch, b"", b"", b"", b"0", self._session_ttl_ms)
            await self._run(lua.RELEASE, session_id, client, args)
            raise
        cursor = Cursor(committed_len=len(record.token_ids), counters=record.counters)
        return Lease(session_id, int(epoch), record, bool(created), client=client, cursor=cursor)

    async def begin_turn(
        self,
        lease: Lease,
        token_ids: TokenIds | Sequence[int],
        *,
        keep_len: int,
        messages: Sequence[dict[str, Any]],
        turn_json: str,
    ) -> None:
        """Begins a turn: keeps the first `keep_len` committed tokens and appends `token_ids`.

        Call it once per lease. Raises LeaseLost. After Unavailable only the same call or release
        may follow. It succeeds even if other leases came later, provided that none exists now
        and none began a turn (orphans, in `lua`).
        """
        cursor = lease.cursor
        async with cursor.lock:
            if not 0 <= keep_len <= cursor.committed_len:
                raise InternalError(f"keep_len {keep_len} of {cursor.committed_len} tokens")
            tokens = pack_tokens(token_ids)
            cursor.is_turn_unconfirmed = True
            await self._write(
                lua.BEGIN_TURN,
                lease,
                _bytes_of(cursor.committed_len),
                _bytes_of(keep_len),
                tokens,
                pack_messages(messages),
                turn_json.encode(),
                *self._ttls,
            )
            cursor.is_turn_unconfirmed = False
            cursor.committed_len = keep_len + len(tokens) // BYTES_PER_TOKEN

    async def record(self, lease: Lease, round: RoundRecord) -> None:
        """Appends a round, renews the lease, and returns once Redis has both. Raises LeaseLost.

        After Unavailable, send the same round again, alone or joined with later ones
        (RoundRecord.then). No token is appended twice. Calls for one lease run one at a time, in
        order.
        """
        cursor = lease.cursor
        tokens = pack_tokens(round.token_ids)
        async with cursor.lock:
            if cursor.is_turn_unconfirmed:
                raise Unavailable("the turn's prompt is not recorded yet")
            if not tokens.startswith(cursor.unconfirmed):
                raise Unavailable("an earlier round is not recorded yet")
            counters = cursor.counters + round.counters
            cursor.unconfirmed = tokens
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
                *self._ttls,
            )
            cursor.unconfirmed = b""
            cursor.committed_len += len(tokens) // BYTES_PER_TOKEN
            cursor.counters = counters

    async def renew(self, lease: Lease) -> None:
        """Extends the lease during a round that takes longer than its TTL. Raises LeaseLost."""
        await self._write(lua.RENEW, lease, *self._ttls)

    async def release(
        self,
        lease: Lease,
        *,
        target_kv: KvHandle | None,
        draft_kv: KvHandle | None,
        messages: Sequence[dict[str, Any]] | None = None,
        delete: bool = False,
    ) -> None:
        """Releases the lease, after all its earlier writes. Raises LeaseLost.

        `messages` None: leave them unchanged. `delete`: delete the session, even a malformed one.
        Shield this call from cancellation: otherwise the lease may remain until it expires.
        """
        async with lease.cursor.lock:
            await self._write(
                lua.RELEASE,
                lease,
                pack_kv(target_kv),
                pack_kv(draft_kv),
                b"" if messages is None else pack_messages(messages),
                _flag(delete),
                self._session_ttl_ms,
            )

    async def get(self, session_id: str, client: str = "") -> SessionRecord:
        """Reads a session without extending its expiry. Raises SessionNotFound."""
        status, *rest = await self._run(lua.GET, session_id, client, ())
        if status != b"ok":
            refuse(status, rest, session_id)
        return unpack_snapshot(session_id, rest[0])

    async def page(self, cursor: int, client: str = "") -> SessionPage:
        """Page of the list of the client's sessions, from `cursor` on; 0 is the first page.

        Unreadable sessions are logged and counted, not raised.
        """

        async def summarize(session_id: str) -> Sequence[Any]:
            return await self._run(SUMMARY, session_id, client, ())

        names, cursor = await scan(self._writer, self._options.prefix, cursor, client)
        return await read_page(names, cursor, summarize)

    async def delete(self, session_id: str, client: str = "") -> None:
        """Deletes a session, even a malformed one. Raises SessionNotFound, SessionInUse.

        Raises UnreadableRecord for a session of a newer version and for a key that is not a
        session; these are left unchanged.
        """
        status, *rest = await self._run(lua.DELETE, session_id, client, ())
        if status != b"ok":
            refuse(status, rest, session_id)

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


def _flag(value: bool) -> bytes:
    return b"1" if value else b"0"


def _bytes_of(num_tokens: int) -> bytes:
    return b"%d" % (num_tokens * BYTES_PER_TOKEN)
