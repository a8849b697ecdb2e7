"""Records to and from the bytes of the layout in `lua`. Pure: no Redis here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.store.records import (
    Counters,
    KvHandle,
    SessionRecord,
    SessionSummary,
    TokenIds,
)
from outrider.errors import UnreadableRecord

BYTES_PER_TOKEN = 4
_MAX_TOKEN_ID = 2**32 - 1


def pack_tokens(token_ids: TokenIds | Sequence[int]) -> bytes:
    """uint32 little-endian. Raises ValueError or OverflowError for what is no token id."""
    if isinstance(token_ids, np.ndarray) and token_ids.dtype != np.uint32 and token_ids.size:
        # numpy would wrap these silently; in a list of Python numbers it raises by itself.
        if token_ids.dtype.kind not in "iu":
            raise ValueError(f"token ids of dtype {token_ids.dtype}")
        if token_ids.min() < 0 or token_ids.max() > _MAX_TOKEN_ID:
            raise OverflowError("token id outside uint32")
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

    def number(name: bytes) -> int:
        return int(fields.get(name, 0))

    return SessionRecord(
        session_id=session_id,
        epoch=number(b"epoch"),
        in_use=bool(in_use),
        token_ids=unpack_tokens(tokens),
        num_turns=number(b"num_turns"),
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


def unpack_summary(session_id: str, reply: Sequence[int]) -> SessionSummary:
    """`reply` of `lua.SUMMARY`."""
    remaining_ms, in_use, num_tokens, num_turns = reply
    expires_in_s = max(0, remaining_ms) / 1000
    return SessionSummary(session_id, num_tokens, num_turns, bool(in_use), expires_in_s)
