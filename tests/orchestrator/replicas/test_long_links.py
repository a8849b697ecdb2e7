"""The round trip to a draft replica decides whether it sends unlikely proposals."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from orchestrator.replicas import draft_client as draft_link
from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.speculation.draft_source import DraftRequest
from outrider.cli.relay import Relay
from outrider.sampling.params import SamplingParams, Verification
from outrider.v1 import draft_pb2, model_pb2
from tests.orchestrator.replicas.test_replica_stream import any_model
from tests.services.fake_draft import FakeDraft, faking


@pytest.mark.parametrize(("delay_s", "is_long"), [(0.02, True), (0.0, False)])
async def test_a_draft_with_a_long_round_trip_sends_unlikely_proposals(
    delay_s: float, is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round trip is measured at each connection. It is 40 ms, or less than 10 s."""
    if not is_long:
        monkeypatch.setattr(draft_link, "_LONG_ROUND_TRIP_S", 10.0)
    requests: asyncio.Queue[Any] = asyncio.Queue(1)
    links: list[DraftLink] = []

    def note(item: draft_pb2.DraftOpen | draft_pb2.DraftCommit) -> list[draft_pb2.Proposal]:
        requests.put_nowait(item)
        return []

    def make_link(endpoint: str, on_change: Any) -> DraftLink:
        links.append(DraftLink(endpoint, any_model, on_change))
        return links[-1]

    async with (
        asyncio.timeout(100),
        faking(FakeDraft(model_pb2.ModelInfo(), note)) as address,
        Relay("127.0.0.1", 0, "127.0.0.1", int(address.rpartition(":")[2]), delay_s) as relay,
    ):
        pool = ReplicaPool("draft", make_link, [relay.address])
        async with pool.running():
            await pool.settled()
            request = DraftRequest(
                session_id="session",
                epoch=1,
                token_ids=[1],
                prompt_len=1,
                max_len=8,
                params=SamplingParams(max_tokens=1, seed=0),
                verification=Verification.REJECTION,
                fan_out=1,
                vocab_size=8,
            )
            links[0].open(request, gamma=3, lookahead=1)
            opened = await requests.get()
            assert opened.tells_unlikely == is_long
