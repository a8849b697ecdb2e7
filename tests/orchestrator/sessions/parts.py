"""Helpers for tests of sessions in a real Redis: stores, leases, rounds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.sessions import Counters, KvHandle, Lease, RoundRecord, SessionStore, StoreOptions

Ids = Sequence[int] | npt.NDArray[np.uint32]
MODEL = "target-fp/draft-fp"
PER_ROUND = Counters(num_drafts=1, num_draft_tokens=4, num_accepted_tokens=2, num_emitted_tokens=3)
# Timeouts for tests of other things: on a busy machine Redis may take seconds.
PATIENT: dict[str, Any] = {"socket_timeout_s": 60.0, "lease_ttl_s": 600.0}


@asynccontextmanager
async def opened(url: str, **options: float | str) -> AsyncIterator[SessionStore]:
    """A store with these StoreOptions; PATIENT are the defaults."""
    store = SessionStore(url, StoreOptions(**{**PATIENT, **options}))
    await store.start()
    try:
        yield store
    finally:
        await store.close()


async def begin(store: SessionStore, lease: Lease, token_ids: Ids, keep_len: int = 0) -> None:
    await store.begin_turn(lease, token_ids, keep_len=keep_len, messages=[], turn_json="{}")


async def leased(store: SessionStore, session_id: str = "s") -> Lease:
    return await store.acquire(session_id, create=True, model=MODEL)


def round_of(*token_ids: int, kv: KvHandle | None = None) -> RoundRecord:
    return RoundRecord(token_ids, PER_ROUND, target_kv=kv, draft_kv=None)


async def tokens_of(store: SessionStore, session_id: str = "s") -> list[int]:
    return [int(t) for t in (await store.get(session_id)).token_ids]
