"""A client that does not read for a while: its stream is ended by the server, and resumed."""

from __future__ import annotations

import pytest

import orchestrator.app
from outrider.client import AsyncClient, channel
from outrider.settings.services import OrchestratorConfig
from tests.client.conftest import Place
from tests.stack import eventually

PROMPT = "the quick"
NUM_TOKENS = 500
# Small windows: few tokens fill the client's buffers.
WINDOW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))


@pytest.mark.slow
async def test_the_rest_is_resumed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*channel.CLIENT_CHANNEL_OPTIONS, *WINDOW)
    monkeypatch.setattr(channel, "CLIENT_CHANNEL_OPTIONS", options)
    config = OrchestratorConfig(
        target_endpoint=place.target, redis_url=place.redis_url, tokenizer=str(place.model), port=0,
        write_timeout_s=0.3, stop_grace_s=0.0,
    )  # fmt: skip
    messages: list[str] = []
    async with (
        orchestrator.app.serving(config) as server,
        AsyncClient(f"127.0.0.1:{server.port}", report=messages.append) as client,
        AsyncClient(place.endpoints) as other,
    ):

        async def is_left() -> bool:
            return not (await other.get_session("unread")).in_use

        fields = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        stream = client.generate(PROMPT, session_id="unread", **fields)  # type: ignore[arg-type]
        await anext(stream)
        await eventually(is_left)
        result = await stream.result()
        whole = await other.generate(PROMPT, **fields).result()  # type: ignore[arg-type]
        await other.delete_session("unread")
    assert (result.token_ids, result.text) == (whole.token_ids, whole.text)
    broke, resumed = messages
    assert "the client has not read its stream" in broke
    assert resumed.startswith("resumed at ")
