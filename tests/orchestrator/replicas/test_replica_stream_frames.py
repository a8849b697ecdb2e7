"""Pending messages are split into frames below the message size limit."""

from __future__ import annotations

import asyncio

import pytest

import outrider.runtime.grpc_server
import target_service.app
from orchestrator.replicas.replica_stream import MAX_FRAME_BYTES
from orchestrator.replicas.target_client import TargetHandle, TargetLink
from outrider.settings.services import TargetConfig
from tests.orchestrator.replicas.requests import target_request
from tests.orchestrator.replicas.test_replica_stream import any_model
from tests.stack import eventually

PROMPT = [7] * 16_384
NUM_SESSIONS = 40
# Message size limit of the target: a quarter of all prompts, and 16 times one prompt.
MAX_MESSAGE_BYTES = 1 << 20
TARGET = TargetConfig(
    simulate="step_ms=1,vocab_size=256,context_len=32768",
    port=0,
    calibration_s=0.0,
    max_step_tokens=1 << 20,
    stuck_after_s=60.0,
)


@pytest.fixture(autouse=True)
def _small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(outrider.runtime.grpc_server.SERVER_OPTIONS)
    options["grpc.max_receive_message_length"] = MAX_MESSAGE_BYTES
    monkeypatch.setattr(outrider.runtime.grpc_server, "SERVER_OPTIONS", tuple(options.items()))


def opened(link: TargetLink, number: int) -> TargetHandle:
    """A greedy generation whose prompt was sent."""
    request = target_request(f"session-{number}", len(PROMPT))
    handle = link.open(request, kept_epoch=0, preempts=False, age_s=0.0)
    handle.send_verify(0, PROMPT, None)
    return handle


async def test_many_long_prompts_at_once() -> None:
    """Frames used to be split by the number of items only.

    The prompts of many generations could then exceed the limit and break the stream of all.
    """
    assert MAX_FRAME_BYTES + 4 * len(PROMPT) < MAX_MESSAGE_BYTES
    async with target_service.app.serving(TARGET) as server:
        link = TargetLink(f"127.0.0.1:{server.port}", any_model, lambda: None)
        running = asyncio.create_task(link.run())
        try:
            await eventually(lambda: _is_connected(link))
            handles = [opened(link, number) for number in range(NUM_SESSIONS)]
            replies = await asyncio.gather(*(handle.reply(None, 100.0) for handle in handles))
            assert all(len(reply.sample_ids) == 1 for reply in replies)
            for handle in handles:
                handle.close(keep=False)
        finally:
            running.cancel()
            await asyncio.wait([running])


async def _is_connected(link: TargetLink) -> bool:
    return link.is_connected
