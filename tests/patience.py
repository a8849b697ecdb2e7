"""Raises the product's time limits that a test is not about, so that a busy machine keeps them.

A shared machine may stop a process, or one of its threads, for seconds. The product would then
take a slow neighbour to be away, and go on without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import pytest

import orchestrator.draft_link
import orchestrator.link
import orchestrator.service
import orchestrator.target_link
import outrider.heartbeat
import outrider.redis_server
import outrider.serving.peers
import tests.stack
from orchestrator.store import StoreOptions

_LONG_S = 60.0
_MANY_BEATS = int(1000 * _LONG_S) // orchestrator.link.HEARTBEAT_MS


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Raises limits of Redis, links, heartbeats, the draft at start and forward passes to 60 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orchestrator.link, "MAX_QUIET_BEATS", _MANY_BEATS)
        patch.setattr(outrider.serving.peers, "MAX_QUIET_BEATS", _MANY_BEATS)
        patch.setattr(outrider.heartbeat, "_CALLER_MAX_QUIET", _MANY_BEATS)
        patch.setattr(orchestrator.draft_link, "MODEL_INFO_TIMEOUT_S", _LONG_S)
        patch.setattr(orchestrator.target_link, "MODEL_INFO_TIMEOUT_S", _LONG_S)
        patch.setattr(orchestrator.service, "DRAFT_START_TIMEOUT_S", _LONG_S)
        store_options = partial(StoreOptions, socket_timeout_s=_LONG_S)
        patch.setattr(orchestrator.service, "StoreOptions", store_options)
        patch.setattr(outrider.redis_server, "START_TIMEOUT_S", _LONG_S)
        patch.setitem(tests.stack.QUICK, "stuck_after_s", _LONG_S)
        yield
