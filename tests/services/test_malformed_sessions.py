"""Sessions with malformed fields in Redis, as clients see them."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from orchestrator.sessions.lua import NUMBERS as CHECKED_BY_SCRIPTS
from outrider.v1 import orchestrator_pb2
from tests.orchestrator.sessions.malformed import NUMBERS, TEXTS, keeper
from tests.services.parts import Pair, whole
from tests.stack import Stack, request

Code = grpc.StatusCode
JUNK = ['""', '"abc"', '"-1"', r'"\xff\xfe"', r'"[{\"role\":5}]"', f'"{"9" * 30} 3 target:0"']


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return Code.OK


async def generated(stack: Stack, **fields: Any) -> None:
    """Continues or resumes the chat."""
    asked = orchestrator_pb2.GenerateRequest(session_id="s", **fields)
    if "resume_from" not in fields:
        sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": 4}
        asked.sampling.CopyFrom(request("x", sampling).sampling)
        asked.chat.messages.add(role="user", content="fox")
    async for _ in stack.client.Generate(asked, timeout=200):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("names", [NUMBERS, TEXTS], ids=["numbers", "texts"])
async def test_a_session_with_a_malformed_field(
    names: list[str], chat_pair: Pair, redis_url: str
) -> None:
    """Each method serves it or refuses it by name. ListSessions counts it. It can be deleted."""
    async with whole(chat_pair, redis_url, tokenizer=str(chat_pair.target)) as stack:
        await generated(stack, create_session=True)
        restore = keeper(redis_url)
        for name, value in itertools.product(names, JUNK):
            await _is_served_or_refused(stack, lambda n=name, v=value: restore(n, v), name)


async def _is_served_or_refused(stack: Stack, restore: Callable[[], bytes], name: str) -> None:
    def get() -> Awaitable[Any]:
        asked = orchestrator_pb2.GetSessionRequest(session_id="s")
        return stack.client.GetSession(asked, timeout=200)

    allowed = {Code.FAILED_PRECONDITION}
    if name in TEXTS:  # another model, an empty chat, no last turn
        allowed |= {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND}
    calls = (get, lambda: generated(stack), lambda: generated(stack, resume_from=0))
    for call in calls:
        value = restore()
        assert await code_of(call()) in allowed, value
    value = restore()
    page = await stack.client.ListSessions(orchestrator_pb2.ListSessionsRequest(), timeout=200)
    assert len(page.sessions) + page.num_unreadable == 1
    assert page.num_unreadable == 1 or name in TEXTS, value
    deleting = orchestrator_pb2.DeleteSessionRequest(session_id="s")
    await stack.client.DeleteSession(deleting, timeout=200)


def test_every_number_field_is_tested() -> None:
    assert set(NUMBERS) == set(CHECKED_BY_SCRIPTS)
