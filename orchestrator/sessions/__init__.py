"""Sessions in Redis: the committed conversation, its lease, and the replicas that cache its KV.

Owns every key `{prefix}:session:*`. The store returns the records below and raises the errors of
`outrider.errors`. The connection to Redis is `outrider.redis.connection`.
"""

from orchestrator.sessions.listing import SessionPage, SessionSummary
from orchestrator.sessions.records import (
    Counters,
    KvHandle,
    Lease,
    RoundRecord,
    SessionRecord,
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
