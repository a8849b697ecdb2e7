"""Translation of protobuf requests to plain values, with the server's defaults for unset fields.

Checks only what plain values cannot represent, and list sizes before a list is copied. All other
checks are in `orchestrator.generation.validation`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.generation.chat import check_num_chat_parts, check_num_messages
from orchestrator.generation.request import GenerationRequest, Message
from orchestrator.generation.validation import ValidRequest, check_num_token_ids, validate
from orchestrator.replicas.models import Limits
from orchestrator.speculation.verification import SourceName
from outrider.errors import InvalidRequest
from outrider.runtime.heartbeat import check_interval
from outrider.runtime.protobuf import (
    LONG_LIST,
    copied,
    sampling_from_proto,
    verification_from_proto,
)
from outrider.sampling.params import SamplingParams, check_entries
from outrider.tokenizer import Tokenizer
from outrider.v1 import orchestrator_pb2, sampling_pb2

_SOURCES = {
    orchestrator_pb2.DRAFT_SOURCE_UNSPECIFIED: SourceName.AUTO,
    orchestrator_pb2.DRAFT_SOURCE_AUTO: SourceName.AUTO,
    orchestrator_pb2.DRAFT_SOURCE_MODEL: SourceName.MODEL,
    orchestrator_pb2.DRAFT_SOURCE_LOOKUP: SourceName.LOOKUP,
    orchestrator_pb2.DRAFT_SOURCE_NONE: SourceName.NONE,
}


def is_long(message: orchestrator_pb2.GenerateRequest) -> bool:
    """Whether `parse_request` takes milliseconds: call it in a thread then."""
    lists = (message.token_ids.ids, message.sampling.allowed_token_ids, message.chat.messages)
    json_texts = (message.chat.chat_template_kwargs, *message.chat.tools)
    return sum(map(len, lists)) + sum(map(len, json_texts)) > LONG_LIST


def parse_request(
    message: orchestrator_pb2.GenerateRequest, limits: Limits, tokenizer: Tokenizer | None
) -> ValidRequest:
    """Translates and validates. Raises InvalidRequest naming the field that is wrong."""
    request = request_from_proto(message, limits)
    given = () if request.resume_from is None else tuple(_given_fields(message))
    return validate(request, limits, tokenizer, given=given)


def request_from_proto(
    message: orchestrator_pb2.GenerateRequest, limits: Limits
) -> GenerationRequest:
    """Translates without validation. Unset fields get the server's defaults of `limits`.

    Raises InvalidRequest for enum numbers without a name, lists too long to be copied and
    `heartbeat_ms`, which belongs to the transport.
    """
    is_seeded = message.sampling.HasField("seed") or "seed" in limits.sampling_defaults
    params = _params(message, limits)
    if message.heartbeat_ms:
        check_interval(message.heartbeat_ms)
    draft_source = _draft_source(message)
    gamma = 0 if draft_source is SourceName.NONE else limits.gamma
    return GenerationRequest(
        **_input(message, limits),
        params=params,
        max_tokens=params.max_tokens if message.sampling.HasField("max_tokens") else None,
        verification=verification_from_proto(message.verification),
        gamma=message.gamma if message.HasField("gamma") else gamma,
        max_gamma=limits.max_gamma,
        lookahead=message.lookahead if message.HasField("lookahead") else limits.lookahead,
        fan_out=message.fan_out if message.HasField("fan_out") else limits.fan_out,
        session_id=message.session_id or None,
        create_session=message.create_session,
        is_durable=_is_durable(message, limits),
        waits_for_draft=_waits_for_draft(message, limits),
        draft_source=draft_source,
        resume_from=message.resume_from if message.HasField("resume_from") else None,
        priority=message.priority,
        is_seeded=is_seeded,
        add_special_tokens=_optional(message, "add_special_tokens"),
        truncate_prompt_tokens=_optional(message, "truncate_prompt_tokens"),
    )


def _optional(message: Any, name: str) -> Any:
    """The field's value; None if it is not set."""
    return getattr(message, name) if message.HasField(name) else None


def _given_fields(message: orchestrator_pb2.GenerateRequest) -> Iterator[str]:
    """Names of the fields that are set. `ListFields` would decode all texts for this."""
    for field in message.DESCRIPTOR.fields:
        if field.has_presence:
            is_given = message.HasField(field.name)
        else:
            is_given = bool(getattr(message, field.name))
        if is_given:
            yield field.name


def _is_durable(message: orchestrator_pb2.GenerateRequest, limits: Limits) -> bool:
    if message.durability not in orchestrator_pb2.Durability.values():
        raise InvalidRequest("durability", f"{message.durability} is not one of its values")
    if message.durability == orchestrator_pb2.DURABILITY_UNSPECIFIED:
        return limits.is_durable
    return message.durability == orchestrator_pb2.DURABILITY_DURABLE


def _waits_for_draft(message: orchestrator_pb2.GenerateRequest, limits: Limits) -> bool:
    if message.draft_wait not in orchestrator_pb2.DraftWait.values():
        raise InvalidRequest("draft_wait", f"{message.draft_wait} is not one of its values")
    if message.draft_wait == orchestrator_pb2.DRAFT_WAIT_UNSPECIFIED:
        return limits.waits_for_draft
    return message.draft_wait == orchestrator_pb2.DRAFT_WAIT_ALWAYS


def _draft_source(message: orchestrator_pb2.GenerateRequest) -> SourceName:
    if message.draft_source not in _SOURCES:
        raise InvalidRequest("draft_source", f"{message.draft_source} is not one of its values")
    return _SOURCES[message.draft_source]


def _params(message: orchestrator_pb2.GenerateRequest, limits: Limits) -> SamplingParams:
    check_entries(message.sampling)
    defaults: Any = limits.sampling_defaults
    sampling = sampling_pb2.SamplingParams(**defaults)
    sampling.MergeFrom(message.sampling)
    return sampling_from_proto(
        sampling,
        default_max_tokens=max(limits.default_max_tokens, message.sampling.min_tokens),
        default_seed=secrets.randbits(63),
    )


def _input(message: orchestrator_pb2.GenerateRequest, limits: Limits) -> dict[str, Any]:
    """The prompt by the names of GenerationRequest; none in a resumption."""
    values: dict[str, Any] = {"text": None, "token_ids": None, "messages": None}
    kind = None if message.HasField("resume_from") else message.WhichOneof("input")
    if kind == "text":
        values["text"] = message.text
    elif kind == "token_ids":
        check_num_token_ids(len(message.token_ids.ids), limits)
        values["token_ids"] = copied(message.token_ids.ids)
    elif kind == "chat":
        values |= _chat(message.chat)
    return values


def _chat(chat: orchestrator_pb2.ChatMessages) -> dict[str, Any]:
    check_num_messages(len(chat.messages))
    check_num_chat_parts(sum(len(m.parts) + len(m.tool_calls) for m in chat.messages))
    kwargs = chat.chat_template_kwargs
    return {
        "messages": tuple(map(_message, chat.messages)),
        "tools": tuple(_json_object("chat.tools", tool) for tool in chat.tools),
        "chat_template_kwargs": _json_object("chat.chat_template_kwargs", kwargs) if kwargs else {},
        "add_generation_prompt": _optional(chat, "add_generation_prompt"),
        "continue_final_message": chat.continue_final_message,
    }


def _message(message: orchestrator_pb2.ChatMessage) -> Message:
    """The message in OpenAI's form. Raises InvalidRequest for other parts than text."""
    if message.parts and message.content:
        raise InvalidRequest("chat.messages.parts", "not with content")
    for part in message.parts:
        if part.WhichOneof("part") != "text":
            raise InvalidRequest("chat.messages.parts", "only parts of type text are allowed")
    parts = [{"type": "text", "text": part.text} for part in message.parts]
    values: Message = {"role": message.role, "content": parts or message.content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if value := getattr(message, name):
            values[name] = value
    if message.tool_calls:
        values["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return values


def _json_object(field: str, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(field, "must be a JSON object")
    return value


def parse_page_token(token: str) -> int:
    """Cursor of ListSessions; 0: the first page. Raises InvalidRequest."""
    if not token:
        return 0
    if not (token.isascii() and token.isdigit() and len(token) <= 20 and int(token) < 1 << 64):
        raise InvalidRequest("page_token", "must be the next_page_token of a page")
    return int(token)
