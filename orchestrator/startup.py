"""Waits of the orchestrator's start: for Redis, a target and a draft."""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog

from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.target_client import TargetLink
from orchestrator.sessions import SessionStore
from outrider.errors import ConfigError, Unavailable

log = structlog.get_logger()

# Longest wait for a draft at the start. After it, serve without one; a draft may join later.
DRAFT_START_TIMEOUT_S = 5.0
# Interval of the warning that no target is connected.
TARGET_WARNING_S = 10.0
# Interval of attempts to reach Redis at the start.
REDIS_RETRY_S = 1.0


async def reach_redis(store: SessionStore, wait_s: float) -> None:
    """Connects to Redis within `wait_s`. Raises ConfigError for `redis_url`."""
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            return await store.start()
        except Unavailable as error:
            if time.monotonic() >= give_up_at:
                raise ConfigError(f"redis_url: {error}") from error
            log.warning("waiting_for_redis", why=str(error))
            await asyncio.sleep(REDIS_RETRY_S)


async def settle_target(targets: ReplicaPool[TargetLink]) -> None:
    """Waits for a target without a limit. Raises ConfigError if all replicas are refused."""
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TARGET_WARNING_S):
                return await targets.settled()
        conditions = {link.endpoint: link.condition for link in targets.links.values()}
        log.warning("waiting_for_target", replicas=conditions or "none known")


async def settle_draft(drafts: ReplicaPool[DraftLink] | None) -> None:
    """Waits for a draft for some seconds."""
    if drafts is None:
        return
    try:
        async with asyncio.timeout(DRAFT_START_TIMEOUT_S):
            await drafts.settled()
    except (TimeoutError, ConfigError) as error:
        log.warning("serving_without_draft", why=str(error) or "no draft replica answers")
