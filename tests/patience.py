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
import orchestrator.service
import orchestrator.target_link
import outrider.redis_server
import outrider.security.channel
import tests.stack
from orchestrator.store import StoreOptions
from outrider.rpc import CHANNEL_OPTIONS

_LONG_S = 60.0
_KEEPALIVES = ("grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Raises limits of Redis, links, keepalive, the draft at start and forward passes to 60 s."""
    options = dict(CHANNEL_OPTIONS)
    options.update(dict.fromkeys(_KEEPALIVES, int(1000 * _LONG_S)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outrider.security.channel, "CHANNEL_OPTIONS", tuple(options.items()))
        patch.setattr(orchestrator.draft_link, "MODEL_INFO_TIMEOUT_S", _LONG_S)
        patch.setattr(orchestrator.target_link, "MODEL_INFO_TIMEOUT_S", _LONG_S)
        patch.setattr(orchestrator.service, "DRAFT_START_TIMEOUT_S", _LONG_S)
        store_options = partial(StoreOptions, socket_timeout_s=_LONG_S)
        patch.setattr(orchestrator.service, "StoreOptions", store_options)
        patch.setattr(outrider.redis_server, "START_TIMEOUT_S", _LONG_S)
        patch.setitem(tests.stack.QUICK, "stuck_after_s", _LONG_S)
        yield
