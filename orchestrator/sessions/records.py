"""Values that the session store takes and returns: records, leases, options. No I/O."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from outrider.errors import InvalidRequest

TokenIds = npt.NDArray[np.uint32]

# No braces: a Redis cluster hashes the part of a key between braces.
_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)


def validate_session_id(session_id: str) -> str:
    """Returns the id. Raises InvalidRequest for the field `session_id`."""
    if _SESSION_ID.fullmatch(session_id) is None:
        raise InvalidRequest("session_id", "must be 1 to 128 characters of A-Z a-z 0-9 . _ : -")
    return session_id


def scoped_id(session_id: str, client: str) -> str:
    """Name of a client's session among the sessions of all clients, in Redis and at the tiers.

    Session ids of different clients never collide: a client's and a session's name have no slash.
    So another client's session does not exist for this one.
    """
    return f"{client}/{session_id}" if client else session_id


def session_key(session_id: str, client: str, prefix: str) -> str:
    """Redis key of the session's hash; the key of its tokens has `:tokens` appended."""
    return f"{prefix}:session:{{{scoped_id(session_id, client)}}}"


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Options of a SessionStore."""

    session_ttl_s: float = 3600.0
    """A session expires this long after its last write."""
    lease_ttl_s: float = 10.0
    """A lease expires this long after its last renewal; every record renews it."""
    socket_timeout_s: float = 1.0
    """Limit for connecting, and for sending one pipeline and reading its replies."""
    prefix: str = "outrider"


@dataclass(frozen=True, slots=True)
class KvHandle:
    """A replica that caches the KV of the session's first `cached_len` tokens.

    `epoch`: of the lease under which the replica computed it.
    """

    replica: str
    epoch: int
    cached_len: int


@dataclass(frozen=True, slots=True)
class Counters:
    """Speculation totals of a session, or of one round."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_emitted_tokens: int = 0

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            self.num_drafts + other.num_drafts,
            self.num_draft_tokens + other.num_draft_tokens,
            self.num_accepted_tokens + other.num_accepted_tokens,
            self.num_emitted_tokens + other.num_emitted_tokens,
        )


@dataclass(frozen=True, slots=True, eq=False)
class SessionRecord:
    """A session as it was in Redis at one moment."""

    session_id: str
    epoch: int
    """Epoch of the last lease; 0 if the session did not exist."""
    in_use: bool
    token_ids: TokenIds
    """All committed tokens of the conversation. Read-only."""
    num_turns: int
    counters: Counters
    target_kv: KvHandle | None
    draft_kv: KvHandle | None
    messages: tuple[dict[str, Any], ...]
    model: str
    expires_in_s: float
    turn_json: str = ""
    """The `turn_json` of the last begin_turn."""
    turn_epoch: int = 0
    """Epoch of the lease that began the last turn, or took it over."""
    has_lost_turn: bool = False
    """A later holder has not begun its turn in Redis, but may have sent tokens of it."""


@dataclass(slots=True)
class Cursor:
    """Position up to which Redis has confirmed a lease's writes. Used by the store only."""

    committed_len: int = 0
    counters: Counters = field(default_factory=Counters)
    unconfirmed: bytes = b""
    """Packed tokens of a record without a reply. The next record must begin with them."""
    is_turn_unconfirmed: bool = False
    """A begin_turn was sent and has no reply yet."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """The right to write to a session, until a later lease with a higher epoch."""

    session_id: str
    epoch: int
    record: SessionRecord
    """The session as it was before this lease."""
    created: bool
    is_recorded: bool = True
    """False: Redis was unreachable when the generation began; nothing is written for it."""
    client: str = ""
    """Client that owns the session; empty without API keys."""
    cursor: Cursor = field(default_factory=Cursor, repr=False)

    @property
    def scoped_id(self) -> str:
        return scoped_id(self.session_id, self.client)


def unrecorded(session_id: str, model: str, client: str = "") -> Lease:
    """Lease of a generation that runs without Redis; nothing of it is written."""
    record = SessionRecord(
        session_id=session_id,
        epoch=0,
        in_use=False,
        token_ids=np.zeros(0, np.uint32),
        num_turns=0,
        counters=Counters(),
        target_kv=None,
        draft_kv=None,
        messages=(),
        model=model,
        expires_in_s=0.0,
    )
    # Like Redis' epochs. No other lease has this session id.
    epoch = time.time_ns() // 1000
    return Lease(session_id, epoch, record, created=True, is_recorded=False, client=client)


@dataclass(frozen=True, slots=True, eq=False)
class RoundRecord:
    """What one round adds to a session.

    The KV handles are those after the round; None: no replica of that tier caches its KV.
    """

    token_ids: TokenIds | Sequence[int]
    counters: Counters
    target_kv: KvHandle | None
    draft_kv: KvHandle | None

    def then(self, later: RoundRecord) -> RoundRecord:
        """This round and a later one as one record, for rounds that are not in Redis yet."""
        return RoundRecord(
            np.concatenate(
                [np.asarray(self.token_ids, np.uint32), np.asarray(later.token_ids, np.uint32)]
            ),
            self.counters + later.counters,
            later.target_kv,
            later.draft_kv,
        )
