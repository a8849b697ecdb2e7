"""Sessions in Redis: the committed conversation, its lease, and where its keys and values lie.

Owns every key `{prefix}:session:*`; callers see the records below and the errors of
`outrider.errors`, nothing of Redis. The connection is `outrider.redis.connection`.
"""

from orchestrator.sessions.records import (
    Counters,
    KvHandle,
    Lease,
    RoundRecord,
    SessionPage,
    SessionRecord,
    SessionSummary,
    StoreOptions,
    scoped_id,
    unrecorded,
    validate_session_id,
)
from orchestrator.sessions.store import SessionStore

__all__ = [
    "Counters",
    "KvHandle",
    "Lease",
    "RoundRecord",
    "SessionPage",
    "SessionRecord",
    "SessionStore",
    "SessionSummary",
    "StoreOptions",
    "scoped_id",
    "unrecorded",
    "validate_session_id",
]
