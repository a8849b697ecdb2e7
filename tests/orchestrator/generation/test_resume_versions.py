"""Records of sessions that orchestrators of other versions have written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.generation.conversation import Turn
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.resume import resumed, turn_json, unanswered
from orchestrator.sessions import SessionStore
from outrider.errors import UnreadableRecord
from outrider.sampling.params import SamplingParams, Verification
from tests.orchestrator.sessions.parts import MODEL, round_of
from tests.redis_fixture import redis_command

KEY = "outrider:session:{s}"
PROMPT = [5, 6, 7]
MESSAGES = ({"role": "user", "content": "hi"},)
PARAMS = SamplingParams(
    temperature=0.5, seed=9, max_tokens=40, stop=("a",), logit_bias={3: 1.5}, min_p=0.1
)
REQUEST = GenerationRequest(
    text=None,
    token_ids=None,
    messages=None,
    params=PARAMS,
    max_tokens=40,
    verification=Verification.COUPLED,
    gamma=3,
    max_gamma=8,
    lookahead=2,
    fan_out=4,
    session_id="s",
    create_session=False,
    is_durable=False,
)
# What each stands for in a turn that was recorded before there was one.
NEUTRAL = {
    "version": 1,
    "verification": Verification.REJECTION,
    "gamma": None,
    "max_gamma": 16,
    "lookahead": 1,
    "fan_out": 1,
    "session_id": None,
    "is_durable": True,
}
NEEDED = ("prompt_len", "params", "params.temperature", "params.seed", "params.max_tokens")


def written() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(turn_json(REQUEST, Turn(PROMPT, 0, MESSAGES)))
    return told


def all_fields() -> list[str]:
    told = written()
    return [*told, *(f"params.{name}" for name in told["params"])]


async def session_with(store: SessionStore, turn: str, output_ids: Sequence[int] = (8, 9)) -> None:
    lease = await store.acquire("s", create=True, model=MODEL)
    await store.begin_turn(lease, PROMPT, keep_len=0, messages=MESSAGES, turn_json=turn)
    await store.record(lease, round_of(*output_ids))
    await store.release(lease, target_kv=None, draft_kv=None)


async def test_a_turn_comes_back_as_it_was(store: SessionStore) -> None:
    await session_with(store, json.dumps(written()))
    for read in (resumed(await store.get("s"), 1), unanswered(await store.get("s"))):
        assert read is not None
        assert read.request == REQUEST
        assert read.output_ids == (8, 9)
        assert (read.turn.token_ids, read.turn.messages) == (PROMPT, MESSAGES)


@pytest.mark.parametrize("name", all_fields())
async def test_a_turn_without_a_field(name: str, store: SessionStore) -> None:
    """Of an older orchestrator's: as if its value had been the neutral one; never a guess."""
    told = written()
    del (told["params"] if "." in name else told)[name.removeprefix("params.")]
    await session_with(store, json.dumps(told))
    record = await store.get("s")
    if name in NEEDED:
        with pytest.raises(UnreadableRecord) as caught:
            resumed(record, 1)
        assert str(caught.value) == f"session s: the stored request has no field '{name}'"
        return
    read = resumed(record, 1)
    if name in NEUTRAL and name != "version":
        assert getattr(read.request, name) == NEUTRAL[name]
    elif "." in name:
        field = name.removeprefix("params.")
        assert getattr(read.request.params, field) == getattr(SamplingParams(), field)
    assert read.turn.messages == MESSAGES


async def test_unknown_fields_of_a_newer_one_stay(store: SessionStore, redis_url: str) -> None:
    """In the turn, in its parameters and in the session; also when the session is written to."""
    told = written() | {"colour": "red"}
    told["params"] |= {"warmth": 3}
    await session_with(store, json.dumps(told))
    assert redis_command(redis_url, "HSET", KEY, "mood", "good") == b":1"
    assert resumed(await store.get("s"), 1).request == REQUEST
    lease = await store.acquire("s", create=False, model=MODEL, takeover=True)
    await store.record(lease, round_of(10))
    await store.release(lease, target_kv=None, draft_kv=None)
    record = await store.get("s")
    assert json.loads(record.turn_json) == told
    assert record.token_ids.tolist() == [*PROMPT, 8, 9, 10]
    assert redis_command(redis_url, "HGET", KEY, "mood").endswith(b"good")


@pytest.mark.parametrize("version", [2, 17, "2", None, 1.5])
async def test_a_turn_of_a_newer_version_is_refused_by_name(
    version: object, store: SessionStore
) -> None:
    await session_with(store, json.dumps(written() | {"version": version}))
    with pytest.raises(UnreadableRecord, match="session s: the stored request has version"):
        resumed(await store.get("s"), 1)


@pytest.mark.parametrize(
    "turn",
    [
        "",
        "null",
        "[1]",
        "{",
        "[" * 100_000,
        json.dumps(written() | {"params": 3}),
        json.dumps(written() | {"prompt_len": "x"}),
        json.dumps(written() | {"prompt_len": 99}),
        json.dumps(written() | {"verification": "by faith"}),
        json.dumps(written() | {"params": written()["params"] | {"logit_bias": 3}}),
    ],
)
async def test_a_turn_that_is_no_turn(turn: str, store: SessionStore) -> None:
    await session_with(store, turn or "0")
    with pytest.raises(UnreadableRecord, match="session s: the stored request is malformed"):
        resumed(await store.get("s"), 1)


async def test_a_session_of_an_older_version_is_read(store: SessionStore, redis_url: str) -> None:
    """Before there were versions, and whatever else came since."""
    await session_with(store, json.dumps(written()))
    for name in ("version", "turn_epoch", "num_drafts", "target_kv", "draft_kv", "created_by"):
        assert redis_command(redis_url, "HDEL", KEY, name) == b":1"
    lease = await store.acquire("s", create=False, model=MODEL)
    assert lease.record.token_ids.tolist() == [*PROMPT, 8, 9]
    assert not lease.created
    await store.begin_turn(lease, [11], keep_len=5, messages=(), turn_json="{}")
    await store.record(lease, round_of(12))
    assert (await store.get("s")).token_ids.tolist() == [*PROMPT, 8, 9, 11, 12]


async def test_a_session_of_a_newer_version_is_refused_by_name(
    store: SessionStore, redis_url: str
) -> None:
    """And left as it is, for those who can read it."""
    await session_with(store, json.dumps(written()))
    assert redis_command(redis_url, "HSET", KEY, "version", "2") == b":0"
    before = redis_command(redis_url, "HGETALL", KEY)
    for act in (
        store.acquire("s", create=True, model=MODEL),
        store.acquire("s", create=False, model=MODEL, takeover=True),
        store.get("s"),
        store.delete("s"),
    ):
        with pytest.raises(UnreadableRecord, match=r"session s: its record has version 2; .* 1"):
            await act
    assert redis_command(redis_url, "HGETALL", KEY) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("messages", "[[["), ("messages", "\xff"), ("num_turns", "many")],
)
async def test_a_session_that_cannot_be_read(
    name: str, value: str, store: SessionStore, redis_url: str
) -> None:
    """It is refused each time, and nobody is left with its lease."""
    await session_with(store, json.dumps(written()))
    redis_command(redis_url, "HSET", KEY, name, value)
    for _ in range(2):
        with pytest.raises(UnreadableRecord, match="session s: its record is malformed"):
            await store.acquire("s", create=False, model=MODEL)


async def test_a_session_without_its_model(store: SessionStore, redis_url: str) -> None:
    await session_with(store, json.dumps(written()))
    redis_command(redis_url, "HDEL", KEY, "model")
    with pytest.raises(UnreadableRecord, match="session s: its record has no field 'model'"):
        await store.get("s")


async def test_a_handle_that_cannot_be_read_is_none(store: SessionStore, redis_url: str) -> None:
    """It only saves a prefill."""
    await session_with(store, json.dumps(written()))
    redis_command(redis_url, "HSET", KEY, "target_kv", "x")
    assert (await store.get("s")).target_kv is None
