"""Conversion of records and of scripts' replies, in the layout of `lua`. Pure: no I/O."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from orchestrator.sessions import lua
from orchestrator.sessions.records import (
    Counters,
    KvHandle,
    SessionRecord,
    SessionSummary,
    TokenIds,
)
from outrider.errors import (
    InternalError,
    LeaseLost,
    SessionInUse,
    SessionNotFound,
    Unavailable,
    UnreadableRecord,
)

BYTES_PER_TOKEN = 4
_MAX_UINT32 = 2**32 - 1
_MAX_INT64 = 2**63 - 1


def pack_tokens(token_ids: TokenIds | Sequence[int]) -> bytes:
    """uint32 little-endian. Raises ValueError, TypeError or OverflowError for other values."""
    if isinstance(token_ids, np.ndarray) and token_ids.dtype != np.uint32 and token_ids.size:
        # numpy would wrap these silently; in a list of Python numbers it raises by itself.
        if token_ids.dtype.kind not in "iu":
            raise ValueError(f"token ids of dtype {token_ids.dtype}")
        if token_ids.min() < 0 or token_ids.max() > _MAX_UINT32:
            raise OverflowError("token id outside uint32")
    if isinstance(token_ids, list | tuple):
        token_ids = np.asarray(array("I", token_ids))  # faster than numpy with a list
    return np.asarray(token_ids, dtype="<u4").tobytes()


def unpack_tokens(packed: bytes) -> TokenIds:
    """A read-only view."""
    return np.frombuffer(packed, dtype="<u4").astype(np.uint32, copy=False)


def pack_kv(handle: KvHandle | None) -> bytes:
    if handle is None:
        return b""
    return b"%d %d %b" % (handle.epoch, handle.cached_len, handle.replica.encode())


def unpack_kv(packed: bytes) -> KvHandle | None:
    """None also where it cannot be read: without it there is a prefill more, and no harm."""
    try:
        epoch, cached_len, replica = packed.split(b" ", 2)
        return KvHandle(replica.decode(), int(epoch), int(cached_len))
    except ValueError:
        return None


def pack_messages(messages: Sequence[dict[str, str]]) -> bytes:
    return json.dumps(list(messages), ensure_ascii=False, separators=(",", ":")).encode(
        # Half a surrogate pair is valid in a Python string and in JSON, not in UTF-8.
        errors="surrogatepass"
    )


def unpack_messages(packed: bytes) -> tuple[dict[str, str], ...]:
    return tuple(json.loads(packed.decode(errors="surrogatepass"))) if packed else ()


def unpack_snapshot(session_id: str, snapshot: Sequence[Any]) -> SessionRecord:
    """`snapshot` of `lua`: {remaining ms, in use, hash as a flat list, tokens}.

    Fields that are missing were not there yet, or have no value. Raises UnreadableRecord.
    """
    try:
        return _unpack(session_id, snapshot)
    except KeyError as error:
        name = error.args[0].decode()
        raise UnreadableRecord(f"session {session_id}: its record has no field {name!r}") from None
    except (ValueError, TypeError, RecursionError) as error:
        why = f"session {session_id}: its record is malformed: {error}"
        raise UnreadableRecord(why) from None


def _unpack(session_id: str, snapshot: Sequence[Any]) -> SessionRecord:
    remaining_ms, in_use, flat, tokens = snapshot
    fields: dict[bytes, bytes] = dict(zip(flat[::2], flat[1::2], strict=True))

    def number(name: bytes, most: int = _MAX_INT64) -> int:
        return _count(fields.get(name, 0), most)

    return SessionRecord(
        session_id=session_id,
        epoch=number(b"epoch"),
        in_use=bool(in_use),
        token_ids=unpack_tokens(tokens),
        num_turns=number(b"num_turns", _MAX_UINT32),
        counters=Counters(
            number(b"num_drafts"),
            number(b"num_draft_tokens"),
            number(b"num_accepted_tokens"),
            number(b"num_emitted_tokens"),
        ),
        target_kv=unpack_kv(fields.get(b"target_kv", b"")),
        draft_kv=unpack_kv(fields.get(b"draft_kv", b"")),
        messages=unpack_messages(fields.get(b"messages", b"")),
        model=fields[b"model"].decode(),
        expires_in_s=max(0, remaining_ms) / 1000,
        turn_json=fields.get(b"turn", b"").decode(),
        turn_epoch=number(b"turn_epoch"),
        has_lost_turn=b"orphan" in fields
        or (b"lease_epoch" in fields and number(b"turn_epoch") != number(b"epoch")),
    )


def unpack_summary(session_id: str, reply: Sequence[Any]) -> SessionSummary:
    """`reply` of `lua.SUMMARY`. Raises UnreadableRecord."""
    remaining_ms, in_use, num_tokens, num_turns = reply
    expires_in_s = max(0, remaining_ms) / 1000
    try:
        counts = _count(num_tokens, _MAX_UINT32), _count(num_turns, _MAX_UINT32)
    except ValueError as error:
        raise UnreadableRecord(f"its record is malformed: {error}") from None
    return SessionSummary(session_id, *counts, bool(in_use), expires_in_s)


def _count(value: bytes | int, most: int) -> int:
    """Raises ValueError for a value that is not in [0, `most`], which no answer could carry."""
    count = int(value)
    if not 0 <= count <= most:
        raise ValueError(f"{count} is not in [0, {most}]")
    return count


def refuse(status: bytes, rest: Sequence[Any], session_id: str) -> NoReturn:
    """Raises the error for a script's reply of another status than ok."""
    if status == b"not_found":
        raise SessionNotFound(f"session {session_id} does not exist or has expired")
    if status == b"in_use":
        raise SessionInUse(f"session {session_id} is in use by another request")
    if status == b"fenced":
        raise LeaseLost(f"session {session_id} was taken over by a later request")
    if status == b"later":
        raise Unavailable(
            f"session {session_id} is leased to a later request that has not begun a turn yet"
        )
    if status == b"gone":
        raise LeaseLost(f"session {session_id} has expired or was lost by Redis")
    if status == b"newer":
        raise UnreadableRecord(
            f"session {session_id}: its record has version {rest[0].decode()}; this orchestrator "
            f"reads up to {lua.VERSION}: send the request to a newer orchestrator"
        )
    if status == b"mismatch":
        raise InternalError(
            f"session {session_id}: Redis holds {rest[0]} tokens, and they differ from the expected"
        )
    raise InternalError(f"session {session_id}: status {status!r}")
