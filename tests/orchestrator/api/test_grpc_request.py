"""Translation of protobuf requests: server defaults for unset fields, and what is refused here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.api.grpc_request import (
    is_long,
    parse_page_token,
    parse_request,
    request_from_proto,
)
from orchestrator.replicas.models import Limits
from orchestrator.speculation.verification import SourceName
from outrider.errors import InvalidRequest
from outrider.runtime.protobuf import LONG_LIST
from outrider.sampling.params import MAX_ENTRIES, Verification
from outrider.v1 import orchestrator_pb2 as pb
from outrider.v1 import sampling_pb2
from tests.stack import request as message_of

LIMITS = Limits(
    vocab_size=300,
    max_context_len=512,
    eos_token_ids=(),
    gamma=3,
    max_gamma=16,
    lookahead=2,
    fan_out=16,
    default_max_tokens=64,
    sampling_defaults={"temperature": 0.6, "top_k": 20},
    is_durable=False,
    waits_for_draft=True,
)


def test_unset_fields_get_the_servers_defaults() -> None:
    request = request_from_proto(message_of([1, 2]), LIMITS)
    assert (request.gamma, request.lookahead, request.fan_out) == (3, 2, 16)
    assert (request.is_durable, request.waits_for_draft) == (False, True)
    assert (request.params.temperature, request.params.top_k) == (0.6, 20)
    assert (request.max_tokens, request.params.max_tokens) == (None, 64)
    assert request.verification is Verification.REJECTION
    assert (request.session_id, request.resume_from, request.priority) == (None, None, 0)
    assert 0 <= request.params.seed < 1 << 63


def test_draft_source_none_means_no_draft_tokens() -> None:
    """Also where the server's default is a fixed γ; γ of the request itself is not changed."""
    request = request_from_proto(message_of([1], draft_source=pb.DRAFT_SOURCE_NONE), LIMITS)
    assert (request.gamma, request.draft_source) == (0, SourceName.NONE)
    message = message_of([1], draft_source=pb.DRAFT_SOURCE_NONE, gamma=2)
    assert request_from_proto(message, LIMITS).gamma == 2
    assert request_from_proto(message_of([1]), LIMITS).draft_source is SourceName.AUTO


def test_fields_that_are_set_win_even_with_the_value_zero() -> None:
    message = message_of(
        [1, 2],
        {"temperature": 0.0, "top_k": 0, "max_tokens": 5, "seed": 0},
        gamma=0,
        lookahead=0,
        fan_out=1,
        durability=pb.DURABILITY_DURABLE,
        draft_wait=pb.DRAFT_WAIT_ADAPTIVE,
        draft_source=pb.DRAFT_SOURCE_LOOKUP,
        verification=sampling_pb2.VERIFICATION_COUPLED,
        session_id="s",
        create_session=True,
        priority=-1,
    )
    request = request_from_proto(message, LIMITS)
    assert (request.gamma, request.lookahead, request.fan_out) == (0, 0, 1)
    assert (request.is_durable, request.waits_for_draft) == (True, False)
    assert request.draft_source is SourceName.LOOKUP
    assert (request.params.temperature, request.params.top_k, request.params.seed) == (0.0, 0, 0)
    assert (request.max_tokens, request.params.max_tokens) == (5, 5)
    assert request.verification is Verification.COUPLED
    assert (request.session_id, request.create_session, request.priority) == ("s", True, -1)


def test_inputs_are_plain_values() -> None:
    messages = [pb.ChatMessage(role="user", content="é")]
    chat = pb.GenerateRequest(chat=pb.ChatMessages(messages=messages))
    assert request_from_proto(message_of([1, 2]), LIMITS).token_ids == (1, 2)
    assert request_from_proto(message_of("é"), LIMITS).text == "é"
    assert request_from_proto(message_of(""), LIMITS).text == ""
    assert request_from_proto(chat, LIMITS).messages == ({"role": "user", "content": "é"},)
    assert request_from_proto(chat, LIMITS).add_generation_prompt is None
    none = request_from_proto(pb.GenerateRequest(), LIMITS)
    assert (none.text, none.token_ids, none.messages) == (None, None, None)


def test_chat_messages_have_the_form_of_openai() -> None:
    """Parts, tool calls and their results, tools and variables of the template in their order."""
    tool = '{"type": "function", "function": {"name": "now", "b": 1, "a": [2.0, null]}}'
    calls = [pb.ToolCall(id="1", name="now", arguments='{"z": 1}')]
    chat = pb.ChatMessages(
        messages=[
            pb.ChatMessage(role="user", parts=[pb.ContentPart(text="a"), pb.ContentPart(text="")]),
            pb.ChatMessage(role="assistant", reasoning_content="hm", tool_calls=calls),
            pb.ChatMessage(role="tool", content="noon", name="now", tool_call_id="1"),
        ],
        tools=[tool],
        chat_template_kwargs='{"enable_thinking": false}',
        add_generation_prompt=False,
        continue_final_message=True,
    )
    request = request_from_proto(pb.GenerateRequest(chat=chat), LIMITS)
    assert request.messages == (
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "")]},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "now", "arguments": '{"z": 1}'},
                }
            ],
        },
        {"role": "tool", "content": "noon", "name": "now", "tool_call_id": "1"},
    )
    assert json.dumps(request.tools[0]) == tool
    assert request.chat_template_kwargs == {"enable_thinking": False}
    assert (request.add_generation_prompt, request.continue_final_message) == (False, True)


_USER = pb.ChatMessage(role="user")
BAD_CHATS: list[tuple[str, pb.ChatMessages]] = [
    ("chat.tools", pb.ChatMessages(messages=[_USER], tools=["[]"])),
    ("chat.tools", pb.ChatMessages(messages=[_USER], tools=["{"])),
    ("chat.tools", pb.ChatMessages(messages=[_USER], tools=["[" * 100_000])),
    ("chat.chat_template_kwargs", pb.ChatMessages(messages=[_USER], chat_template_kwargs="1")),
    (
        "chat.messages",
        pb.ChatMessages(messages=[pb.ChatMessage(parts=[pb.ContentPart()] * 16_385)]),
    ),
    ("chat.messages.parts", pb.ChatMessages(messages=[pb.ChatMessage(parts=[pb.ContentPart()])])),
    (
        "chat.messages.parts",
        pb.ChatMessages(messages=[pb.ChatMessage(content="x", parts=[pb.ContentPart(text="y")])]),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("field", "chat"), BAD_CHATS)
def test_chats_that_are_no_plain_values_are_refused(field: str, chat: pb.ChatMessages) -> None:
    with pytest.raises(InvalidRequest) as refused:
        request_from_proto(pb.GenerateRequest(chat=chat), LIMITS)
    assert refused.value.field == field


@pytest.mark.parametrize("field", ["durability", "draft_wait", "draft_source", "verification"])
def test_unknown_enum_numbers_are_refused(field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        request_from_proto(message_of([1], **{field: 9}), LIMITS)
    assert refused.value.field == field


@pytest.mark.parametrize("interval_ms", [99, 60_001])
def test_heartbeat_interval_is_checked(interval_ms: int) -> None:
    with pytest.raises(InvalidRequest) as refused:
        request_from_proto(message_of([1], heartbeat_ms=interval_ms), LIMITS)
    assert refused.value.field == "heartbeat_ms"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("token_ids", message_of([])),
        ("token_ids", message_of([1] * 513)),
        ("chat", pb.GenerateRequest(chat=pb.ChatMessages())),
        ("chat", pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage()] * 4_097))),
        ("sampling.stop", message_of([1], {"stop": ["x"] * (MAX_ENTRIES["stop"] + 1)})),
    ],
)
def test_lists_are_refused_before_they_are_copied(field: str, message: pb.GenerateRequest) -> None:
    with pytest.raises(InvalidRequest) as refused:
        request_from_proto(message, LIMITS)
    assert refused.value.field == field


# One value for each field of GenerateRequest that a resumption does not allow.
OTHER_FIELDS: dict[str, Any] = {
    "text": "x",
    "token_ids": pb.TokenIds(),
    "chat": pb.ChatMessages(),
    "sampling": sampling_pb2.SamplingParams(),
    "gamma": 0,
    "verification": sampling_pb2.VERIFICATION_BLOCK,
    "create_session": True,
    "add_special_tokens": False,
    "truncate_prompt_tokens": 1,
    "lookahead": 0,
    "fan_out": 1,
    "durability": pb.DURABILITY_FAST,
    "draft_wait": pb.DRAFT_WAIT_ALWAYS,
    "draft_source": pb.DRAFT_SOURCE_NONE,
}
ALLOWED_FIELDS = {"session_id": "s", "resume_from": 3, "priority": 1, "heartbeat_ms": 100}


def test_each_field_is_either_allowed_in_a_resumption_or_refused() -> None:
    assert {*OTHER_FIELDS, *ALLOWED_FIELDS} == set(pb.GenerateRequest.DESCRIPTOR.fields_by_name)
    request = parse_request(pb.GenerateRequest(**ALLOWED_FIELDS), LIMITS, None)
    assert (request.session_id, request.resume_from, request.priority) == ("s", 3, 1)


@pytest.mark.parametrize("field", OTHER_FIELDS)
def test_resumption_refuses_a_field_even_with_its_zero_value(field: str) -> None:
    message = pb.GenerateRequest(**ALLOWED_FIELDS, **{field: OTHER_FIELDS[field]})
    with pytest.raises(InvalidRequest, match="not allowed with resume_from") as refused:
        parse_request(message, LIMITS, None)
    assert refused.value.field == field


def test_requests_with_long_lists_of_tokens_are_long() -> None:
    message = pb.GenerateRequest(text="x" * LONG_LIST)
    assert not is_long(message)
    assert not message.HasField("token_ids"), "reading must not choose the input"
    message.sampling.allowed_token_ids.extend(range(LONG_LIST + 1))
    assert is_long(message)
    assert is_long(pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(LONG_LIST + 1))))


@pytest.mark.parametrize(("token", "cursor"), [("", 0), ("7", 7), (str((1 << 64) - 1), 2**64 - 1)])
def test_page_tokens(token: str, cursor: int) -> None:
    assert parse_page_token(token) == cursor


@pytest.mark.parametrize("token", ["x", "-1", "1.0", " 1", "٣", str(1 << 64), "0" * 21])
def test_malformed_page_tokens_are_refused(token: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^page_token: "):
        parse_page_token(token)
