"""Fields of a generation request, and the message made of them.

The server checks the values; its errors name the field. Chat messages may have OpenAI's form.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from outrider.client.messages import fill_message
from outrider.errors import InvalidRequest
from outrider.v1 import orchestrator_pb2

Verification = Literal["rejection", "coupled", "block"]
DraftWait = Literal["adaptive", "always"]
DraftSource = Literal["auto", "model", "lookup", "none"]
Durability = Literal["durable", "fast"]
Message = Mapping[str, Any]


class StructuredOutputs(TypedDict, total=False):
    """Format of the output: exactly one of them. JSON may be given as objects or as text."""

    json: str | Mapping[str, Any]
    json_object: bool
    regex: str
    choice: Sequence[str]
    grammar: str
    structural_tag: str | Mapping[str, Any]


class RequestFields(TypedDict, total=False):
    """Fields of a request, described in docs/reference/requests.md. None: the server's default.

    With a `session_id` the session is created unless it exists; `create_session` False: it must
    exist.
    """

    session_id: str | None
    create_session: bool | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    logprobs: int | None
    gamma: int | None
    verification: Verification | None
    lookahead: int | None
    fan_out: int | None
    draft_wait: DraftWait | None
    draft_source: DraftSource | None
    durability: Durability | None
    priority: int | None
    structured_outputs: StructuredOutputs | None
    skip_special_tokens: bool | None
    include_stop_str_in_output: bool | None
    bad_words: Sequence[str] | None
    bad_words_token_ids: Sequence[Sequence[int]] | None
    prompt_logprobs: int | None
    add_special_tokens: bool | None
    truncate_prompt_tokens: int | None


class ChatFields(RequestFields, total=False):
    """Fields of a chat request: those of every request, and the template's."""

    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None


# What `build_request` sets from its own arguments.
_OF_CHAT = tuple(ChatFields.__annotations__.keys() - RequestFields.__annotations__.keys())
_OWN = ("text", "token_ids", "chat", "sampling", "resume_from", "heartbeat_ms")


def build_request(
    prompt: str | Sequence[int] | None = None,
    *,
    messages: Sequence[Message] | None = None,
    resume_from: int | None = None,
    fields: Mapping[str, Any],
) -> orchestrator_pb2.GenerateRequest:
    """The request of a text or token ids, of chat messages, or one that resumes a session.

    Raises InvalidRequest for an unknown field, or a value of a wrong type.
    """
    request = orchestrator_pb2.GenerateRequest()
    if isinstance(prompt, str):
        fill_message(request, "text", prompt, "text")
    elif prompt is not None:
        request.token_ids.SetInParent()
        fill_message(request.token_ids, "ids", prompt, "token_ids")
    if messages is not None:
        of_chat = {name: fields[name] for name in _OF_CHAT if name in fields}
        fields = {name: value for name, value in fields.items() if name not in of_chat}
        chat = {"messages": list(map(_plain_message, messages)), **of_chat}
        fill_message(request, "chat", chat, "chat")
    if resume_from is not None:
        fill_message(request, "resume_from", resume_from, "resume_from")
    for name, value in fields.items():
        _set_field(request, name, value)
    if request.session_id and resume_from is None and fields.get("create_session") is None:
        request.create_session = True
    return request


def _plain_message(message: Message) -> dict[str, Any]:
    """The message in the contract's form: OpenAI's parts and function calls are unpacked."""
    plain = dict(message)
    if isinstance(plain.get("content"), Sequence) and not isinstance(plain["content"], str):
        parts = plain.pop("content")
        plain["parts"] = [{k: v for k, v in part.items() if k != "type"} for part in parts]
    if plain.get("tool_calls"):
        plain["tool_calls"] = [
            {"id": call.get("id"), **call["function"]} if "function" in call else call
            for call in plain["tool_calls"]
        ]
    return plain


def _set_field(request: orchestrator_pb2.GenerateRequest, name: str, value: Any) -> None:
    sampling = request.sampling.DESCRIPTOR.fields_by_name
    if name == "bad_words_token_ids" and value is not None:
        value = [{"ids": ids} for ids in value]
    if name in sampling:
        if value is not None:
            fill_message(request.sampling, name, value, f"sampling.{name}")
    elif name not in request.DESCRIPTOR.fields_by_name or name in _OWN:
        known = [*request.DESCRIPTOR.fields_by_name, *sampling]
        close = difflib.get_close_matches(name, [one for one in known if one not in _OWN], 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InvalidRequest(name, f"is not a field of a request{hint}")
    elif value is not None:
        fill_message(request, name, value, name)
