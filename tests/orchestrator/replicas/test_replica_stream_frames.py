"""What is pending together leaves in frames that the other side takes, however long the prompts."""

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
# Of the target: a quarter of what these prompts take together, and sixteen times one of them.
MOST_BYTES = 1 << 20
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
    options["grpc.max_receive_message_length"] = MOST_BYTES
    monkeypatch.setattr(outrider.runtime.grpc_server, "SERVER_OPTIONS", tuple(options.items()))


def opened(link: TargetLink, number: int) -> TargetHandle:
    """A greedy session whose whole prompt is on its way."""
    request = target_request(f"session-{number}", len(PROMPT))
    handle = link.open(request, kept_epoch=0, preempts=False, age_s=0.0)
    handle.send_verify(0, PROMPT, None)
    return handle


async def test_many_long_prompts_at_once() -> None:
    """The bug: frames were split by the number of their items alone, so that prompts of many
    sessions together could be more than the target takes: its stream broke, for all of them."""
    assert MAX_FRAME_BYTES + 4 * len(PROMPT) < MOST_BYTES
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
