"""Protobuf requests to plain values, checked whole before anything is done.

Every field is honoured or refused by name.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from orchestrator.generation.request import GenerationRequest, Message
from orchestrator.replicas.models import Limits
from orchestrator.sessions import validate_session_id
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

MAX_LOOKAHEAD = 4
MAX_FAN_OUT = 64
# docs/limits.md has all limits. A million tokens are about so many characters.
MAX_TEXT_CHARS = 4_000_000
MAX_CHAT_MESSAGES = 4_096
MAX_ROLE_CHARS = 64
# A template writes the role between its control tokens: it must not bring tokens of its own.
_ROLE = re.compile(rf"[A-Za-z][A-Za-z0-9_-]{{0,{MAX_ROLE_CHARS - 1}}}", re.ASCII)


def is_long(request: orchestrator_pb2.GenerateRequest) -> bool:
    """Whether `parse_request` takes milliseconds: call it in a thread."""
    lists = (request.token_ids.ids, request.sampling.allowed_token_ids)
    return sum(map(len, lists)) > LONG_LIST


def parse_request(
    request: orchestrator_pb2.GenerateRequest, limits: Limits, tokenizer: Tokenizer | None
) -> GenerationRequest:
    """Raises InvalidRequest naming the field that is wrong."""
    if request.HasField("resume_from"):
        _check_resumption(request)
    params = _params(request, limits, tokenizer)
    gamma = request.gamma if request.HasField("gamma") else limits.gamma
    if gamma is not None and gamma > limits.max_gamma:
        raise InvalidRequest("gamma", f"{gamma} is not in [0, {limits.max_gamma}]")
    lookahead = request.lookahead if request.HasField("lookahead") else limits.lookahead
    if lookahead > MAX_LOOKAHEAD:
        raise InvalidRequest("lookahead", f"{lookahead} is not in [0, {MAX_LOOKAHEAD}]")
    fan_out = request.fan_out if request.HasField("fan_out") else limits.fan_out
    if not 1 <= fan_out <= MAX_FAN_OUT:
        raise InvalidRequest("fan_out", f"{fan_out} is not in [1, {MAX_FAN_OUT}]")
    if request.heartbeat_ms:
        check_interval(request.heartbeat_ms)
    if request.session_id:
        validate_session_id(request.session_id)
    elif request.create_session:
        raise InvalidRequest("create_session", "needs a session_id")
    text, token_ids, messages = None, None, None
    if not request.HasField("resume_from"):
        text, token_ids, messages = _input(request, limits, tokenizer)
    return GenerationRequest(
        text=text,
        token_ids=token_ids,
        messages=messages,
        params=params,
        max_tokens=params.max_tokens if request.sampling.HasField("max_tokens") else None,
        verification=verification_from_proto(request.verification),
        gamma=gamma,
        max_gamma=limits.max_gamma,
        lookahead=lookahead,
        fan_out=fan_out,
        session_id=request.session_id or None,
        create_session=request.create_session,
        is_durable=_is_durable(request, limits),
        waits_for_draft=_waits_for_draft(request, limits),
        resume_from=request.resume_from if request.HasField("resume_from") else None,
        priority=request.priority,
    )


def _check_resumption(request: orchestrator_pb2.GenerateRequest) -> None:
    """The turn goes on as it was asked for."""
    if not request.session_id:
        raise InvalidRequest("session_id", "is required with resume_from")
    for descriptor, _ in request.ListFields():
        if descriptor.name not in ("session_id", "resume_from", "priority", "heartbeat_ms"):
            raise InvalidRequest(
                descriptor.name, "not together with resume_from: the turn goes on as it was begun"
            )


def _is_durable(request: orchestrator_pb2.GenerateRequest, limits: Limits) -> bool:
    if request.durability not in orchestrator_pb2.Durability.values():
        raise InvalidRequest("durability", f"{request.durability} is not one of its values")
    if request.durability == orchestrator_pb2.DURABILITY_UNSPECIFIED:
        return limits.is_durable
    return request.durability == orchestrator_pb2.DURABILITY_DURABLE


def _waits_for_draft(request: orchestrator_pb2.GenerateRequest, limits: Limits) -> bool:
    if request.draft_wait not in orchestrator_pb2.DraftWait.values():
        raise InvalidRequest("draft_wait", f"{request.draft_wait} is not one of its values")
    if request.draft_wait == orchestrator_pb2.DRAFT_WAIT_UNSPECIFIED:
        return limits.waits_for_draft
    return request.draft_wait == orchestrator_pb2.DRAFT_WAIT_ALWAYS


def _params(
    request: orchestrator_pb2.GenerateRequest, limits: Limits, tokenizer: Tokenizer | None
) -> SamplingParams:
    check_entries(request.sampling)
    sampling = sampling_pb2.SamplingParams()
    sampling.CopyFrom(limits.sampling_defaults)
    sampling.ClearField("max_tokens")  # is in default_max_tokens
    sampling.MergeFrom(request.sampling)
    params = sampling_from_proto(
        sampling,
        default_max_tokens=max(limits.default_max_tokens, request.sampling.min_tokens),
        default_seed=secrets.randbits(63),
    )
    params.validate(limits.vocab_size)
    if params.stop and tokenizer is None:
        raise InvalidRequest("sampling.stop", "the model has no tokenizer; use stop_token_ids")
    stops = set(params.stop_token_ids)
    if not params.ignore_eos:
        stops.update(limits.eos_token_ids)
    if (
        params.min_tokens
        and params.allowed_token_ids
        and all(token_id in stops for token_id in params.allowed_token_ids)
    ):
        raise InvalidRequest(
            "sampling.allowed_token_ids", "all of them end the output, which min_tokens forbids"
        )
    return params


def _input(
    request: orchestrator_pb2.GenerateRequest, limits: Limits, tokenizer: Tokenizer | None
) -> tuple[str | None, tuple[int, ...] | None, tuple[Message, ...] | None]:
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("input", "one of text, token_ids, chat is required")
    if kind == "token_ids":
        num_ids = len(request.token_ids.ids)
        if not 1 <= num_ids <= limits.max_context_len:
            raise InvalidRequest(
                "token_ids", f"{num_ids} tokens; 1 to {limits.max_context_len}, {limits.bound}"
            )
        ids = copied(request.token_ids.ids)
        if max(ids) >= limits.vocab_size:
            bad = next(i for i in ids if i >= limits.vocab_size)
            raise InvalidRequest("token_ids", f"{bad} is not in [0, {limits.vocab_size})")
        return None, ids, None
    if tokenizer is None:
        raise InvalidRequest(kind, "the model has no tokenizer; send token_ids")
    if kind == "text":
        text = request.text  # decoded anew at each access
        if not text:
            raise InvalidRequest("text", "the prompt is empty")
        _check_chars("text", len(text), limits, tokenizer)
        return text, None, None
    messages = _messages(request.chat.messages)
    num_chars = sum(len(message["content"]) for message in messages)
    _check_chars("chat", num_chars, limits, tokenizer)
    return None, None, messages


def _check_chars(field: str, num_chars: int, limits: Limits, tokenizer: Tokenizer) -> None:
    """Refuses what cannot fit in the context before it is encoded."""
    most = min(MAX_TEXT_CHARS, limits.max_context_len * tokenizer.max_token_chars)
    if num_chars > most:
        raise InvalidRequest(
            field, f"{num_chars} characters; at most {most} are allowed for {limits.bound}"
        )


def _messages(given: Sequence[orchestrator_pb2.ChatMessage]) -> tuple[Message, ...]:
    if not given:
        raise InvalidRequest("chat", "the conversation is empty")
    if len(given) > MAX_CHAT_MESSAGES:
        raise InvalidRequest("chat", f"{len(given)} messages; at most {MAX_CHAT_MESSAGES}")
    messages = tuple({"role": m.role, "content": m.content} for m in given)
    for message in messages:
        if _ROLE.fullmatch(message["role"]) is None:
            raise InvalidRequest(
                "chat.messages.role",
                "must be a word of letters, digits, _ and -, such as system, user or assistant; "
                f"at most {MAX_ROLE_CHARS} characters",
            )
    return messages


def parse_page_token(token: str) -> int:
    """The cursor of ListSessions; 0: the first page. Raises InvalidRequest."""
    if not token:
        return 0
    if not (token.isascii() and token.isdigit() and len(token) <= 20 and int(token) < 1 << 64):
        raise InvalidRequest("page_token", "must be the next_page_token of a page")
    return int(token)
