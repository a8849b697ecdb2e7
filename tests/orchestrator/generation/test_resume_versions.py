"""Session records written by orchestrators of other versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.generation.conversation import Turn
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.resume import interrupted_turn, resume_turn, turn_json
from orchestrator.sessions import SessionStore
from orchestrator.speculation.verification import SourceName
from outrider.errors import UnreadableRecord
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.structured_outputs import StructuredOutputs
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
    draft_source=SourceName.LOOKUP,
    is_seeded=True,
)
# Value of each field in a turn that was recorded before the field existed.
NEUTRAL = {
    "version": 1,
    "verification": Verification.REJECTION,
    "gamma": None,
    "max_gamma": 16,
    "lookahead": 1,
    "fan_out": 1,
    "session_id": None,
    "is_durable": True,
    "draft_source": SourceName.AUTO,
}
NEEDED = ("prompt_len", "params", "params.temperature", "params.seed", "params.max_tokens")


def written() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(turn_json(REQUEST, Turn(PROMPT, 0, MESSAGES)))
    return stored


def all_fields() -> list[str]:
    stored = written()
    return [*stored, *(f"params.{name}" for name in stored["params"])]


async def session_with(store: SessionStore, turn: str, output_ids: Sequence[int] = (8, 9)) -> None:
    lease = await store.acquire("s", create=True, model=MODEL)
    await store.begin_turn(lease, PROMPT, keep_len=0, messages=MESSAGES, turn_json=turn)
    await store.record(lease, round_of(*output_ids))
    await store.release(lease, target_kv=None, draft_kv=None)


async def test_stored_turn_is_read_unchanged(store: SessionStore) -> None:
    await session_with(store, json.dumps(written()))
    for read in (resume_turn(await store.get("s"), 1), interrupted_turn(await store.get("s"))):
        assert read is not None
        assert read.request == REQUEST
        assert read.output_ids == (8, 9)
        assert (read.turn.token_ids, read.turn.messages) == (PROMPT, MESSAGES)


@pytest.mark.parametrize("name", all_fields())
async def test_turn_without_a_field_gets_its_neutral_value(name: str, store: SessionStore) -> None:
    """An older orchestrator wrote it. A field without a neutral value is an error."""
    stored = written()
    del (stored["params"] if "." in name else stored)[name.removeprefix("params.")]
    await session_with(store, json.dumps(stored))
    record = await store.get("s")
    if name in NEEDED:
        with pytest.raises(UnreadableRecord) as caught:
            resume_turn(record, 1)
        assert str(caught.value) == f"session s: the stored request has no field '{name}'"
        return
    read = resume_turn(record, 1)
    if name in NEUTRAL and name != "version":
        assert getattr(read.request, name) == NEUTRAL[name]
    elif "." in name:
        field = name.removeprefix("params.")
        assert getattr(read.request.params, field) == getattr(SamplingParams(), field)
    assert read.turn.messages == MESSAGES
    assert read.turn.answer("x") == {"role": "assistant", "content": "x"}


CONTINUED = {"role": "assistant", "content": "one, "}
NEW_FIELDS: list[dict[str, Any]] = [
    {"bad_words_token_ids": ((1, 2), (3,))},
    {"skip_special_tokens": False},
    {"include_stop_str_in_output": True},
]


@pytest.mark.parametrize("fields", NEW_FIELDS)
async def test_fields_that_older_orchestrators_ignore_need_a_newer_one(
    fields: dict[str, Any], store: SessionStore
) -> None:
    request = replace(REQUEST, params=replace(PARAMS, **fields))
    stored = turn_json(request, Turn(PROMPT, 0, MESSAGES))
    assert json.loads(stored)["version"] == 2
    await session_with(store, stored)
    assert resume_turn(await store.get("s"), 1).request == request


async def test_a_continued_message_is_recorded_with_the_turn(store: SessionStore) -> None:
    """Its answer is missing while the session has only the messages before it."""
    stored = turn_json(REQUEST, Turn(PROMPT, 0, MESSAGES, answer_start=CONTINUED))
    assert json.loads(stored)["version"] == 2
    await session_with(store, stored)
    for read in (resume_turn(await store.get("s"), 1), interrupted_turn(await store.get("s"))):
        assert read is not None
        assert read.turn.answer("two")["content"] == "one, two"


async def test_unknown_fields_of_a_newer_version_are_preserved(
    store: SessionStore, redis_url: str
) -> None:
    """In the turn, in its parameters and in the session, even when the session is written."""
    stored = written() | {"colour": "red"}
    stored["params"] |= {"warmth": 3}
    await session_with(store, json.dumps(stored))
    assert redis_command(redis_url, "HSET", KEY, "mood", "good") == b":1"
    assert resume_turn(await store.get("s"), 1).request == REQUEST
    lease = await store.acquire("s", create=False, model=MODEL, takeover=True)
    await store.record(lease, round_of(10))
    await store.release(lease, target_kv=None, draft_kv=None)
    record = await store.get("s")
    assert json.loads(record.turn_json) == stored
    assert record.token_ids.tolist() == [*PROMPT, 8, 9, 10]
    assert redis_command(redis_url, "HGET", KEY, "mood").endswith(b"good")


@pytest.mark.parametrize("version", [3, 17, "2", None, 1.5])
async def test_turn_of_a_newer_version_is_refused(version: object, store: SessionStore) -> None:
    await session_with(store, json.dumps(written() | {"version": version}))
    with pytest.raises(UnreadableRecord, match="session s: the stored request has version"):
        resume_turn(await store.get("s"), 1)


WRONG_TYPES: list[tuple[str, Any]] = [
    ("gamma", "4"),
    ("gamma", 1.5),
    ("max_gamma", None),
    ("lookahead", True),
    ("session_id", 3),
    ("is_durable", 1),
    ("num_messages", "1"),
    ("answer_start", "one"),
    ("answer_start", {"role": 1, "content": ""}),
    ("prompt_len", 2.5),
]
WRONG_PARAM_TYPES: list[tuple[str, Any]] = [
    ("bad_words_token_ids", [1, 2]),
    ("bad_words_token_ids", [["1"]]),
    ("temperature", "hot"),
    ("temperature", None),
    ("seed", 1.5),
    ("max_tokens", "40"),
    ("logprobs", "5"),
    ("ignore_eos", 0),
    ("stop", "a"),
    ("stop", [3]),
    ("stop_token_ids", 3),
    ("allowed_token_ids", ["3"]),
    ("logit_bias", {"a": 1.0}),
    ("logit_bias", {"3": "high"}),
]


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
        *(json.dumps(written() | {name: value}) for name, value in WRONG_TYPES),
        *(
            json.dumps(written() | {"params": written()["params"] | {name: value}})
            for name, value in WRONG_PARAM_TYPES
        ),
    ],
)
async def test_malformed_turn_is_refused(turn: str, store: SessionStore) -> None:
    await session_with(store, turn or "0")
    with pytest.raises(UnreadableRecord, match="session s: the stored request is malformed"):
        resume_turn(await store.get("s"), 1)


async def test_session_of_an_older_version_is_read(store: SessionStore, redis_url: str) -> None:
    """Fields that were added later are missing."""
    await session_with(store, json.dumps(written()))
    for name in ("version", "turn_epoch", "num_drafts", "target_kv", "draft_kv", "created_by"):
        assert redis_command(redis_url, "HDEL", KEY, name) == b":1"
    lease = await store.acquire("s", create=False, model=MODEL)
    assert lease.record.token_ids.tolist() == [*PROMPT, 8, 9]
    assert not lease.created
    await store.begin_turn(lease, [11], keep_len=5, messages=(), turn_json="{}")
    await store.record(lease, round_of(12))
    assert (await store.get("s")).token_ids.tolist() == [*PROMPT, 8, 9, 11, 12]


async def test_session_of_a_newer_version_is_refused(store: SessionStore, redis_url: str) -> None:
    """The record is left unchanged."""
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
async def test_malformed_session_is_refused(
    name: str, value: str, store: SessionStore, redis_url: str
) -> None:
    """It is refused each time, and no lease remains."""
    await session_with(store, json.dumps(written()))
    redis_command(redis_url, "HSET", KEY, name, value)
    for _ in range(2):
        with pytest.raises(UnreadableRecord, match="session s: its record is malformed"):
            await store.acquire("s", create=False, model=MODEL)


async def test_session_without_a_model_is_refused(store: SessionStore, redis_url: str) -> None:
    await session_with(store, json.dumps(written()))
    redis_command(redis_url, "HDEL", KEY, "model")
    with pytest.raises(UnreadableRecord, match="session s: its record has no field 'model'"):
        await store.get("s")


async def test_malformed_kv_handle_is_ignored(store: SessionStore, redis_url: str) -> None:
    """The handle only saves a prefill."""
    await session_with(store, json.dumps(written()))
    redis_command(redis_url, "HSET", KEY, "target_kv", "x")
    assert (await store.get("s")).target_kv is None


async def test_a_turn_with_structured_outputs_needs_a_version_that_knows_them(
    store: SessionStore,
) -> None:
    """An older orchestrator refuses it; this one reads it unchanged."""
    structured = StructuredOutputs(choice=("a", "b"))
    request = replace(REQUEST, params=replace(PARAMS, structured_outputs=structured))
    turn = turn_json(request, Turn(PROMPT, 0, MESSAGES))
    assert (json.loads(turn)["version"], written()["version"]) == (2, 1)
    await session_with(store, turn)
    assert resume_turn(await store.get("s"), 1).request == request
