"""What the store keeps and hands out, as plain data. Knows nothing of Redis."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from outrider.errors import InvalidRequest

TokenIds = npt.NDArray[np.uint32]

# No braces: `{id}` in a key is what a Redis cluster hashes.
_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)


def validate_session_id(session_id: str) -> str:
    """The id itself. Raises InvalidRequest naming `session_id`."""
    if _SESSION_ID.fullmatch(session_id) is None:
        raise InvalidRequest("session_id", "must be 1 to 128 characters of A-Z a-z 0-9 . _ : -")
    return session_id


def scoped_id(session_id: str, client: str) -> str:
    """A session's name among those of all callers, in Redis and at the tiers.

    Each caller has names of its own: another's session is not refused, it is not there. No name of
    a caller or of a session has a slash.
    """
    return f"{client}/{session_id}" if client else session_id


def session_key(session_id: str, client: str, prefix: str) -> str:
    """The key of its hash; that of its tokens has `:tokens` behind it."""
    return f"{prefix}:session:{{{scoped_id(session_id, client)}}}"


@dataclass(frozen=True, slots=True)
class StoreOptions:
    session_ttl_s: float = 3600.0
    """A session nobody touches for this long is forgotten."""
    lease_ttl_s: float = 10.0
    """A lease not renewed for this long is free; every record renews it."""
    socket_timeout_s: float = 1.0
    """For connecting, and for one pipeline's exchange."""
    prefix: str = "outrider"


@dataclass(frozen=True, slots=True)
class KvHandle:
    """A replica that holds keys and values of the session's first `cached_len` tokens."""

    replica: str
    epoch: int
    cached_len: int


@dataclass(frozen=True, slots=True)
class Counters:
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
    """A session as Redis had it at one moment."""

    session_id: str
    epoch: int
    """Of the last lease given; 0 in the record of a session that did not exist."""
    in_use: bool
    token_ids: TokenIds
    """The whole conversation as committed. Read-only."""
    num_turns: int
    counters: Counters
    target_kv: KvHandle | None
    draft_kv: KvHandle | None
    messages: tuple[dict[str, str], ...]
    model: str
    expires_in_s: float
    turn_json: str = ""
    """As given to the last begin_turn."""
    turn_epoch: int = 0
    """Of the lease that began the last turn, or took it over."""
    has_lost_turn: bool = False
    """A later holder has not begun its turn here, or not yet: it may have shown tokens of it."""


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session in a list, without its tokens."""

    session_id: str
    num_tokens: int
    num_turns: int
    in_use: bool
    expires_in_s: float


@dataclass(frozen=True, slots=True)
class SessionPage:
    """Part of the list of a caller's sessions."""

    sessions: Sequence[SessionSummary]
    num_unreadable: int
    """Keys of sessions in this page that hold something else; they are left out."""
    cursor: int
    """Of the next page; 0: this is the last one."""


@dataclass(slots=True)
class Cursor:
    """How far Redis has confirmed this lease's writes. The store's own; callers leave it alone."""

    committed_len: int = 0
    counters: Counters = field(default_factory=Counters)
    owed: bytes = b""
    """Packed tokens of a record that may or may not have arrived: the next one must begin so."""
    turn_owed: bool = False
    """A begin_turn may or may not have arrived."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """The right to write to a session, until a later owner has a higher epoch."""

    session_id: str
    epoch: int
    record: SessionRecord
    """As it was before this lease."""
    created: bool
    is_recorded: bool = True
    """False: Redis was away when it was asked for; nothing is ever written for it."""
    client: str = ""
    """Whose session it is; empty where callers have no names."""
    cursor: Cursor = field(default_factory=Cursor, repr=False)

    @property
    def scoped_id(self) -> str:
        return scoped_id(self.session_id, self.client)


def unrecorded(session_id: str, model: str, client: str = "") -> Lease:
    """Of a generation that goes on without Redis, and leaves nothing there."""
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
    # As Redis' own epochs; the id is this generation's alone.
    epoch = time.time_ns() // 1000
    return Lease(session_id, epoch, record, created=True, is_recorded=False, client=client)


@dataclass(frozen=True, slots=True, eq=False)
class RoundRecord:
    """What one round adds. Handles are the state after it: None means no keys and values."""

    token_ids: TokenIds | Sequence[int]
    counters: Counters
    target_kv: KvHandle | None
    draft_kv: KvHandle | None

    def then(self, later: RoundRecord) -> RoundRecord:
        """Both as one: for rounds that could not be recorded when they were made."""
        return RoundRecord(
            np.concatenate(
                [np.asarray(self.token_ids, np.uint32), np.asarray(later.token_ids, np.uint32)]
            ),
            self.counters + later.counters,
            later.target_kv,
            later.draft_kv,
        )
