"""Time limits of the product that a test is not about, so long that no busy machine reaches them.

A machine that is shared may stop a process, or one thread of it, for seconds: whoever is slow is
then taken to be away, and goes on without what the test looks for.
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
    """With Redis, with links and their ends, with a draft at the start, and with long passes."""
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
