"""Sessions in Redis: the committed conversation, its lease, and where its keys and values lie.

Owns every key `{prefix}:session:*` and is the only place that imports `redis`; callers see the
records below and the errors of `outrider.errors`, nothing of Redis. Knows nothing of models,
rounds or transport.
"""

from orchestrator.store.records import (
    Counters,
    KvHandle,
    Lease,
    RoundRecord,
    SessionRecord,
    StoreOptions,
    validate_session_id,
)
from orchestrator.store.store import SessionStore

__all__ = [
    "Counters",
    "KvHandle",
    "Lease",
    "RoundRecord",
    "SessionRecord",
    "SessionStore",
    "StoreOptions",
    "validate_session_id",
]
