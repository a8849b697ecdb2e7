"""Encoding of records for Redis, and decoding of the scripts' replies (layout: `lua`). No I/O."""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from orchestrator.sessions import lua
from orchestrator.sessions.records import Counters, KvHandle, SessionRecord, TokenIds
from outrider.errors import (
    InternalError,
    InvalidRequest,
    LeaseLost,
    SessionInUse,
    SessionNotFound,
    Unavailable,
    UnreadableRecord,
)

BYTES_PER_TOKEN = 4
_MAX_UINT32 = 2**32 - 1
_MAX_NUMBER = 2**53 - 1


def pack_tokens(token_ids: TokenIds | Sequence[int]) -> bytes:
    """Token ids as uint32 little-endian. Raises ValueError, TypeError or OverflowError."""
    if isinstance(token_ids, np.ndarray) and token_ids.dtype != np.uint32 and token_ids.size:
        # numpy wraps such values silently; for a list of Python numbers it raises.
        if token_ids.dtype.kind not in "iu":
            raise ValueError(f"token ids of dtype {token_ids.dtype}")
        if token_ids.min() < 0 or token_ids.max() > _MAX_UINT32:
            raise OverflowError("token id outside uint32")
    if isinstance(token_ids, list | tuple):
        token_ids = np.asarray(array("I", token_ids))  # faster than numpy with a list
    return np.asarray(token_ids, dtype="<u4").tobytes()


def unpack_tokens(packed: bytes) -> TokenIds:
    """A read-only view of `packed` as uint32."""
    return np.frombuffer(packed, dtype="<u4").astype(np.uint32, copy=False)


def pack_kv(handle: KvHandle | None) -> bytes:
    if handle is None:
        return b""
    return b"%d %d %b" % (handle.epoch, handle.cached_len, handle.replica.encode())


def unpack_kv(packed: bytes) -> KvHandle | None:
    """None also for a malformed handle: without it the next turn only needs one more prefill."""
    try:
        epoch, cached_len, replica = packed.split(b" ", 2)
        return KvHandle(
            replica.decode(),
            unpack_count("epoch", epoch, _MAX_NUMBER),
            unpack_count("cached_len", cached_len),
        )
    except ValueError:
        return None


def pack_messages(messages: Sequence[dict[str, Any]]) -> bytes:
    return json.dumps(list(messages), ensure_ascii=False, separators=(",", ":")).encode(
        # Half a surrogate pair is valid in a Python string and in JSON, not in UTF-8.
        errors="surrogatepass"
    )


def unpack_messages(packed: bytes) -> tuple[dict[str, Any], ...]:
    """Raises ValueError or RecursionError unless it is a list of objects with role and content."""
    if not packed:
        return ()
    messages = json.loads(packed.decode(errors="surrogatepass"))
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise ValueError("field 'messages' is not a list of objects with role and content")
    return tuple(messages)


def _is_message(message: Any) -> bool:
    if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
        return False
    return isinstance(message.get("content"), str | list)


def unpack_snapshot(session_id: str, snapshot: Sequence[Any]) -> SessionRecord:
    """Record of a `snapshot` of `lua`: {remaining ms, in use, hash as a flat list, tokens}.

    A missing field has its default: an older version did not write it, or it has no value.
    Raises UnreadableRecord.
    """
    with malformed(session_id):
        return _unpack(session_id, snapshot)


@contextlib.contextmanager
def malformed(session_id: str) -> Iterator[None]:
    """Turns the errors of the functions below, and of json, into UnreadableRecord."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        why = f"session {session_id}: its record is malformed: {error}"
        raise UnreadableRecord(why) from None


def _unpack(session_id: str, snapshot: Sequence[Any]) -> SessionRecord:
    remaining_ms, in_use, flat, tokens = snapshot
    fields: dict[bytes, bytes] = dict(zip(flat[::2], flat[1::2], strict=True))

    def number(name: str, most: int = _MAX_NUMBER) -> int:
        return unpack_count(name, fields.get(name.encode(), b"0"), most)

    return SessionRecord(
        session_id=session_id,
        epoch=number("epoch"),
        in_use=bool(in_use),
        token_ids=unpack_tokens(tokens),
        num_turns=number("num_turns", _MAX_UINT32),
        counters=Counters(
            number("num_drafts"),
            number("num_draft_tokens"),
            number("num_accepted_tokens"),
            number("num_emitted_tokens"),
        ),
        target_kv=unpack_kv(fields.get(b"target_kv", b"")),
        draft_kv=unpack_kv(fields.get(b"draft_kv", b"")),
        messages=unpack_messages(fields.get(b"messages", b"")),
        model=unpack_text("model", fields.get(b"model", b"")),
        expires_in_s=max(0, remaining_ms) / 1000,
        turn_json=unpack_text("turn", fields.get(b"turn", b"")),
        turn_epoch=number("turn_epoch"),
        has_lost_turn=b"orphan" in fields
        or (b"lease_epoch" in fields and number("turn_epoch") != number("epoch")),
    )


def unpack_text(name: str, packed: bytes) -> str:
    """Raises ValueError for bytes that are not UTF-8."""
    try:
        return packed.decode()
    except UnicodeDecodeError:
        raise ValueError(f"field '{name}' is not UTF-8") from None


def unpack_count(name: str, value: bytes, most: int = _MAX_UINT32) -> int:
    """Raises ValueError for a value outside [0, `most`], which no response could carry."""
    count = int(value)
    if not 0 <= count <= most:
        raise ValueError(f"field '{name}' is {count}, not in [0, {most}]")
    return count


def refuse(status: bytes, rest: Sequence[Any], session_id: str) -> NoReturn:
    """Raises the error for a script's reply with another status than ok."""
    session = f"session {session_id}"
    if status == b"not_found":
        raise SessionNotFound(f"{session} does not exist or has expired")
    if status == b"in_use":
        raise SessionInUse(f"{session} is in use by another request")
    if status == b"other_model":
        with malformed(session_id):
            other, this = (unpack_text("model", model) for model in rest)
        raise InvalidRequest("session_id", f"made with model {other}; this one is {this}")
    if status == b"fenced":
        raise LeaseLost(f"{session} was taken over by a later request")
    if status == b"later":
        raise Unavailable(f"{session} is leased to a later request that has not begun a turn yet")
    if status == b"gone":
        raise LeaseLost(f"{session} has expired or was lost by Redis")
    if status == b"newer":
        raise UnreadableRecord(
            f"{session}: its record has version {rest[0].decode()}; this orchestrator reads up to "
            f"{lua.VERSION}: send the request to a newer orchestrator"
        )
    if status == b"malformed":
        name = rest[0].decode()
        raise UnreadableRecord(
            f"{session}: its record is malformed: field '{name}' is not an integer in "
            f"[0, {_MAX_NUMBER}]"
        )
    if status == b"incomplete":
        raise UnreadableRecord(f"{session}: its record has no field '{rest[0].decode()}'")
    if status == b"mismatch":
        raise InternalError(
            f"{session}: Redis has {rest[0]} tokens, and they differ from the expected ones"
        )
    raise InternalError(f"{session}: unknown status {status!r} of a script")
