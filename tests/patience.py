"""Raises the product's time limits that a test is not about, so that a busy machine keeps them.

A shared machine may stop a process, or one of its threads, for seconds. The product would then
take a slow neighbour to be away, and go on without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import pytest

import orchestrator.app
import orchestrator.replicas.draft_client
import orchestrator.replicas.replica_stream
import orchestrator.replicas.target_client
import orchestrator.startup
import outrider.client.connection
import outrider.model_server.stream
import outrider.redis.embedded
import tests.stack
from orchestrator.sessions import StoreOptions

_LONG_S = 60.0
_MANY_BEATS = int(1000 * _LONG_S) // orchestrator.replicas.replica_stream.HEARTBEAT_MS


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Raises limits of Redis, links, heartbeats, the draft at start and forward passes to 60 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orchestrator.replicas.replica_stream, "MAX_MISSED_HEARTBEATS", _MANY_BEATS)
        patch.setattr(outrider.model_server.stream, "MAX_MISSED_HEARTBEATS", _MANY_BEATS)
        patch.setattr(outrider.client.connection, "_MAX_MISSED", _MANY_BEATS)
        patch.setattr(orchestrator.replicas.draft_client, "MODEL_INFO_TIMEOUT_S", _LONG_S)
        patch.setattr(orchestrator.replicas.target_client, "MODEL_INFO_TIMEOUT_S", _LONG_S)
        patch.setattr(orchestrator.startup, "DRAFT_START_TIMEOUT_S", _LONG_S)
        store_options = partial(StoreOptions, socket_timeout_s=_LONG_S)
        patch.setattr(orchestrator.app, "StoreOptions", store_options)
        patch.setattr(outrider.redis.embedded, "START_TIMEOUT_S", _LONG_S)
        patch.setitem(tests.stack.QUICK, "stuck_after_s", _LONG_S)
        yield
