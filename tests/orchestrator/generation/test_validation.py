"""Validation of generation requests, with plain values as any transport makes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.generation.chat import (
    MAX_CHAT_MESSAGES,
    MAX_CHAT_PARTS,
    MAX_ROLE_CHARS,
    MAX_TOOLS,
)
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.validation import (
    MAX_FAN_OUT,
    MAX_LOOKAHEAD,
    MAX_TEXT_CHARS,
    check_length,
    resolve_max_tokens,
    validate,
)
from orchestrator.replicas.models import Limits
from orchestrator.speculation.verification import SourceName
from outrider.errors import InvalidRequest
from outrider.sampling.params import SamplingParams, Verification
from outrider.tokenizer import Tokenizer

VOCAB_SIZE, CONTEXT_LEN, MAX_GAMMA, EOS = 300, 512, 16, 299
LIMITS = Limits(
    vocab_size=VOCAB_SIZE,
    max_context_len=CONTEXT_LEN,
    eos_token_ids=(EOS,),
    gamma=None,
    max_gamma=MAX_GAMMA,
    lookahead=2,
    fan_out=16,
    default_max_tokens=64,
)
# The longest text that a context of 512 tokens could hold is far longer than MAX_TEXT_CHARS here.
LONG_CONTEXT = replace(LIMITS, max_context_len=MAX_TEXT_CHARS)
REQUEST = GenerationRequest(
    text=None,
    token_ids=(1, 2),
    messages=None,
    params=SamplingParams(max_tokens=8),
    max_tokens=8,
    verification=Verification.REJECTION,
    gamma=None,
    max_gamma=MAX_GAMMA,
    lookahead=2,
    fan_out=16,
    session_id=None,
    create_session=False,
)


def with_input(**fields: Any) -> dict[str, Any]:
    return {"text": None, "token_ids": None, "messages": None, **fields}


def sampled(**fields: Any) -> dict[str, Any]:
    return {"params": SamplingParams(**{"max_tokens": 8, **fields})}


def chat(*roles: str, content: str = "x") -> dict[str, Any]:
    messages = tuple({"role": role, "content": content} for role in roles)
    return with_input(messages=messages)


def message(**fields: Any) -> dict[str, Any]:
    return with_input(messages=({"role": "user", "content": "x", **fields},))


def called(arguments: Any, name: Any = "f") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return message(tool_calls=[{"id": "1", "type": "function", "function": function}])


TOOL = {"type": "function", "function": {"name": "f"}}
# Chat fields, each with a value that is allowed.
CHAT_FIELDS: dict[str, Any] = {
    "tools": (TOOL,),
    "chat_template_kwargs": {"enable_thinking": False},
    "add_generation_prompt": False,
    "continue_final_message": True,
}
BAD_CHATS: list[tuple[str, str, dict[str, Any]]] = [
    *((f"chat.{name}", "only with chat", {name: value}) for name, value in CHAT_FIELDS.items()),
    ("chat.messages.content", "must be a text or a list", message(content=None)),
    ("chat.messages.content", "must be a text or a list", message(content=[])),
    ("chat.messages.parts", "only parts of type text", message(content=[{"type": "image"}])),
    ("chat.messages.parts", "only parts of type text", message(content=[{"type": "text"}])),
    ("chat.messages.name", "must be a text", message(name=3)),
    ("chat.messages.tool_calls", "must have a function", message(tool_calls=[{"id": "1"}])),
    ("chat.messages.tool_calls", "must have a function", called({"a": 1})),
    ("chat.messages.tool_calls", "the arguments of f are not a JSON object", called("[1]")),
    ("chat.messages.tool_calls", "the arguments of f are not a JSON object", called("{")),
    ("chat.messages.tool_calls", "a function needs a name", called("{}", "")),
    (
        "chat.messages",
        f"{MAX_CHAT_PARTS + 1} content parts and tool calls; at most {MAX_CHAT_PARTS}",
        message(content=[{"type": "text", "text": ""}] * (MAX_CHAT_PARTS + 1)),
    ),
    (
        "chat",
        "4001 characters; at most 3072",
        message(content=[{"type": "text", "text": "x" * 4_001}]),
    ),
    ("chat.tools", "must have the form", message() | {"tools": ({"name": "f"},)}),
    ("chat.tools", "a function needs a name", message() | {"tools": (TOOL | {"function": {}},)}),
    ("chat.tools", "1025 tools; at most 1024", message() | {"tools": (TOOL,) * (MAX_TOOLS + 1)}),
    (
        "chat.chat_template_kwargs",
        "messages is set by chat.messages",
        message() | {"chat_template_kwargs": {"messages": []}},
    ),
    (
        "chat.add_generation_prompt",
        "not with continue_final_message",
        message() | {"add_generation_prompt": True, "continue_final_message": True},
    ),
    (
        "chat.continue_final_message",
        "no content to continue",
        message(content="") | {"continue_final_message": True},
    ),
]  # fmt: skip


INVALID: list[tuple[str, str, dict[str, Any]]] = [
    ("input", "one of text, token_ids, chat is required", with_input()),
    ("input", "one of text, token_ids, chat is required", {"text": "x"}),
    ("input", "one of text, token_ids, chat is required", chat("user") | {"text": ""}),
    ("token_ids", "0 tokens; 1 to 512 are allowed for the model's context", {"token_ids": ()}),
    ("token_ids", "513 tokens; 1 to 512", {"token_ids": (1,) * (CONTEXT_LEN + 1)}),
    ("token_ids", "300 is not in [0, 300)", {"token_ids": (1, VOCAB_SIZE, 2)}),
    ("token_ids", "-1 is not in [0, 300)", {"token_ids": (1, -1)}),
    ("text", "the prompt is empty", with_input(text="")),
    ("text", "at most 3072 are allowed", with_input(text="x" * (MAX_TEXT_CHARS + 1))),
    ("chat", "the conversation is empty", chat()),
    ("chat", "4097 messages; at most 4096", chat(*["user"] * (MAX_CHAT_MESSAGES + 1))),
    ("chat", "4000 characters; at most 3072", chat("system", "user", content="x" * 2_000)),
    ("chat.messages.role", "must be a word", chat("user", "")),
    ("chat.messages.role", "must be a word", chat("us er")),
    ("chat.messages.role", "must be a word", chat("1user")),
    ("chat.messages.role", "must be a word", chat("<|user|>")),
    ("chat.messages.role", "must be a word", chat("üser")),
    ("chat.messages.role", "must be a word", chat("user\n")),
    ("chat.messages.role", "at most 64 characters", chat("r" * (MAX_ROLE_CHARS + 1))),
    *BAD_CHATS,
    ("truncate_prompt_tokens", "0 is not in [1, 512]", {"truncate_prompt_tokens": 0}),
    ("truncate_prompt_tokens", "-2 is not in [1, 512]", {"truncate_prompt_tokens": -2}),
    ("truncate_prompt_tokens", "513 is not in [1, 512]", {"truncate_prompt_tokens": 513}),
    ("add_special_tokens", "not with token_ids", {"add_special_tokens": True}),
    (
        "text",
        "at most 4000000 are allowed",
        with_input(text="x" * (MAX_TEXT_CHARS + 1), truncate_prompt_tokens=9),
    ),
    ("gamma", "17 is not in [0, 16]", {"gamma": MAX_GAMMA + 1}),
    ("gamma", "-1 is not in [0, 16]", {"gamma": -1}),
    ("gamma", "2 with draft_source none", {"gamma": 2, "draft_source": SourceName.NONE}),
    ("lookahead", "5 is not in [0, 4]", {"lookahead": MAX_LOOKAHEAD + 1}),
    ("lookahead", "-1 is not in [0, 4]", {"lookahead": -1}),
    ("fan_out", "0 is not in [1, 64]", {"fan_out": 0}),
    ("fan_out", "65 is not in [1, 64]", {"fan_out": MAX_FAN_OUT + 1}),
    ("priority", "2147483648 is not in", {"priority": 1 << 31}),
    ("priority", "-2147483649 is not in", {"priority": -(1 << 31) - 1}),
    ("session_id", "must be 1 to 128 characters", {"session_id": "a b"}),
    ("session_id", "must be 1 to 128 characters", {"session_id": ""}),
    ("session_id", "must be 1 to 128 characters", {"session_id": "x" * 129}),
    ("create_session", "requires a session_id", {"create_session": True}),
    # The ranges of all sampling parameters are in tests/sampling/test_params.py.
    ("sampling.top_p", "0 is not in (0, 1]", sampled(top_p=0.0)),
    ("sampling.top_k", "2147483648 is not in", sampled(top_k=1 << 31)),
    ("sampling.seed", "-1 is not in", sampled(seed=-1)),
    ("sampling.seed", "18446744073709551616 is not in", sampled(seed=1 << 64)),
    ("sampling.stop", "1 to 1024", sampled(stop=("",))),
    ("sampling.stop_token_ids", "token 300 is not in", sampled(stop_token_ids=(VOCAB_SIZE,))),
    ("sampling.bad_words", "a word of 0 characters", sampled(bad_words=("",))),
    ("sampling.bad_words_token_ids", "a sequence of 0", sampled(bad_words_token_ids=((),))),
    ("sampling.bad_words_token_ids", "token 300 is", sampled(bad_words_token_ids=((1, 300),))),
    (
        "sampling.bad_words",
        "may forbid every token",
        sampled(allowed_token_ids=(5, 6), bad_words_token_ids=((5,), (9, 1, 6))),
    ),
    (
        "sampling.bad_words",
        "may forbid every token",
        sampled(allowed_token_ids=(5, EOS), min_tokens=1, bad_words_token_ids=((5,),)),
    ),
    (
        "sampling.bad_words",
        "may forbid every token",
        sampled(bad_words_token_ids=tuple((i,) for i in range(VOCAB_SIZE))),
    ),
    (
        "sampling.allowed_token_ids",
        "all of them end the output",
        sampled(allowed_token_ids=(EOS,), min_tokens=1),
    ),
    (
        "sampling.allowed_token_ids",
        "all of them end the output",
        sampled(allowed_token_ids=(7, EOS), stop_token_ids=(7,), min_tokens=1),
    ),
]


@pytest.mark.parametrize(
    ("field", "why", "fields"), INVALID, ids=[f"{n}-{case[0]}" for n, case in enumerate(INVALID)]
)
def test_invalid_request_is_refused_with_the_field(
    field: str, why: str, fields: dict[str, Any], tokenizer: Tokenizer
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate(replace(REQUEST, **fields), LIMITS, tokenizer)
    assert refused.value.field == field
    assert why in refused.value.why


VALID: list[dict[str, Any]] = [
    {},
    *(message() | {name: value} for name, value in CHAT_FIELDS.items()),
    message(content=[{"type": "text", "text": "x"}], name="n", reasoning_content="r"),
    called('{"a": [1, {"b": null}]}'),
    called(""),
    {"truncate_prompt_tokens": CONTEXT_LEN},
    sampled(bad_words=("x" * 256,), bad_words_token_ids=tuple((i,) for i in range(VOCAB_SIZE - 1))),
    sampled(allowed_token_ids=(5, EOS), bad_words_token_ids=((5,),)),
    sampled(allowed_token_ids=(5, 6), bad_words_token_ids=((5, 5), (6, 6))),
    {"truncate_prompt_tokens": -1},
    {"add_special_tokens": False},
    with_input(text="x" * MAX_TEXT_CHARS, truncate_prompt_tokens=9, add_special_tokens=True),
    message(role="tool", tool_call_id="call 1"),
    {"token_ids": (0, VOCAB_SIZE - 1)},
    {"token_ids": (1,) * CONTEXT_LEN},
    with_input(text="x"),
    with_input(text="x" * 3_072),
    chat("system", "user", "assistant", "r" * MAX_ROLE_CHARS, "Tool_2-b"),
    chat(*["user"] * MAX_CHAT_MESSAGES, content=""),
    {"gamma": 0},
    {"gamma": 0, "draft_source": SourceName.NONE},
    {"gamma": 0, "draft_source": SourceName.MODEL},
    {"draft_source": SourceName.LOOKUP},
    {"gamma": MAX_GAMMA, "lookahead": MAX_LOOKAHEAD, "fan_out": MAX_FAN_OUT},
    {"lookahead": 0, "fan_out": 1},
    {"priority": (1 << 31) - 1},
    {"priority": -(1 << 31)},
    {"session_id": "a.Z_9:-"},
    {"session_id": "x" * 128, "create_session": True},
    sampled(top_k=(1 << 31) - 1, seed=(1 << 64) - 1),
    sampled(top_k=-1, stop=("x",)),
    sampled(allowed_token_ids=(EOS,)),
    sampled(allowed_token_ids=(EOS,), min_tokens=1, ignore_eos=True),
    sampled(allowed_token_ids=(EOS, 3), min_tokens=1),
]


@pytest.mark.parametrize(
    ("source", "missing", "why"),
    [
        (SourceName.MODEL, "has_draft_tier", "there is no draft tier (draft_endpoint)"),
        (SourceName.LOOKUP, "has_lookup", "prompt lookup is off (prompt_lookup)"),
    ],
)
def test_a_draft_source_that_is_not_there_is_refused(
    source: SourceName, missing: str, why: str
) -> None:
    request = replace(REQUEST, draft_source=source)
    assert validate(request, LIMITS, None) == request
    with pytest.raises(InvalidRequest) as refused:
        validate(request, replace(LIMITS, **{missing: False}), None)
    assert refused.value.field == "draft_source"
    assert why in refused.value.why


@pytest.mark.parametrize("fields", VALID, ids=range(len(VALID)))
def test_valid_request_is_returned_unchanged(fields: dict[str, Any], tokenizer: Tokenizer) -> None:
    request = replace(REQUEST, **fields)
    assert validate(request, LIMITS, tokenizer) is request


def test_text_has_a_limit_of_its_own_in_a_long_context(tokenizer: Tokenizer) -> None:
    request = replace(REQUEST, **with_input(text="x" * MAX_TEXT_CHARS))
    assert validate(request, LONG_CONTEXT, tokenizer) is request
    request = replace(REQUEST, **with_input(text="x" * (MAX_TEXT_CHARS + 1)))
    with pytest.raises(InvalidRequest, match=r"^text: 4000001 characters; at most 4000000 "):
        validate(request, LONG_CONTEXT, tokenizer)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("text", with_input(text="x")),
        ("text", with_input(text="")),
        ("chat", chat("user")),
        ("chat", chat()),
        ("sampling.stop", sampled(stop=("x",))),
        ("sampling.bad_words", sampled(bad_words=("x",))),
    ],
)
def test_text_needs_a_tokenizer(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="the model has no tokenizer") as refused:
        validate(replace(REQUEST, **fields), LIMITS, None)
    assert refused.value.field == field
    assert validate(REQUEST, LIMITS, None) is REQUEST


RESUMPTION = replace(REQUEST, token_ids=None, session_id="s", resume_from=3)


@pytest.mark.parametrize("num", [0, 3, (1 << 32) - 1])
def test_resumption_needs_no_input(num: int) -> None:
    request = replace(RESUMPTION, resume_from=num)
    given = ("session_id", "resume_from", "priority", "heartbeat_ms")
    assert validate(request, LIMITS, None, given=given) is request


@pytest.mark.parametrize(
    ("field", "fields", "given"),
    [
        ("session_id", {"session_id": None}, ("resume_from",)),
        ("session_id", {"session_id": "a b"}, ("session_id", "resume_from")),
        ("resume_from", {"resume_from": -1}, ("session_id", "resume_from")),
        ("resume_from", {"resume_from": 1 << 32}, ("session_id", "resume_from")),
        ("text", {}, ("text", "session_id", "resume_from")),
        ("sampling", sampled(top_p=0.0), ("sampling", "session_id", "resume_from")),
        ("create_session", {}, ("session_id", "create_session", "resume_from")),
        ("durability", {}, ("session_id", "resume_from", "durability")),
    ],
)
def test_resumption_allows_no_other_fields(
    field: str, fields: dict[str, Any], given: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate(replace(RESUMPTION, **fields), LIMITS, None, given=given)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "min_tokens", "resolved"),
    [
        (100, 412, 0, 412),  # the client's own, as long as it fits
        (100, None, 0, 64),  # the server's default
        (500, None, 0, 12),  # the default is cut to the rest of the context
        (100, None, 80, 80),  # the default is raised to min_tokens
        (511, None, 0, 1),
    ],
)
def test_max_tokens_is_resolved(
    prompt_len: int, max_tokens: int | None, min_tokens: int, resolved: int
) -> None:
    params = SamplingParams(max_tokens=max_tokens or 64, min_tokens=min_tokens)
    request = replace(REQUEST, params=params, max_tokens=max_tokens)
    assert resolve_max_tokens(request, prompt_len, LIMITS).params.max_tokens == resolved


@pytest.mark.parametrize(
    ("field", "why", "prompt_len", "max_tokens", "min_tokens"),
    [
        ("sampling.max_tokens", "at most 412", 100, 413, 0),
        ("sampling.min_tokens", "at most 12", 500, None, 13),
        ("token_ids", "512 tokens leave no room", 512, None, 0),
        ("token_ids", "512 tokens leave no room", 512, 1, 0),
    ],
)
def test_length_beyond_the_context_is_refused(
    field: str, why: str, prompt_len: int, max_tokens: int | None, min_tokens: int
) -> None:
    params = SamplingParams(max_tokens=max_tokens or 64, min_tokens=min_tokens)
    request = replace(REQUEST, params=params, max_tokens=max_tokens)
    with pytest.raises(InvalidRequest) as refused:
        resolve_max_tokens(request, prompt_len, LIMITS)
    assert refused.value.field == field
    assert why in refused.value.why


def test_length_errors_name_the_kv_cache_if_it_is_the_bound() -> None:
    limits = replace(LIMITS, is_kv_bound=True)
    with pytest.raises(InvalidRequest, match="exceeds the target's KV cache of 512 tokens"):
        check_length(REQUEST, 505, limits)
    check_length(REQUEST, 504, limits)
