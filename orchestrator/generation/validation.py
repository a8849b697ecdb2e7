"""Validation of a `GenerationRequest` against the current limits, the same for all transports.

A transport translates its messages into a `GenerationRequest` (`orchestrator.api`), then calls
`validate`. Once the prompt is encoded, `resolve_max_tokens` and `check_length` check the length.
Fields in errors have the names of `GenerateRequest` in orchestrator.proto. The ranges of sampling
parameters are in `outrider.sampling.params`; docs/reference/limits.md lists all limits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import NewType

from orchestrator.generation.chat import check_chat, check_no_chat_fields, num_chat_chars
from orchestrator.generation.request import GenerationRequest
from orchestrator.replicas.models import Limits
from orchestrator.sessions import validate_session_id
from orchestrator.speculation.verification import SourceName
from outrider.errors import InvalidRequest
from outrider.sampling.params import SamplingParams
from outrider.tokenizer import Tokenizer

MAX_LOOKAHEAD = 4
MAX_FAN_OUT = 64
# About a million tokens.
MAX_TEXT_CHARS = 4_000_000
# Tokens of a prompt, times 1 + prompt_logprobs: a few milliseconds of the event loop.
MAX_PROMPT_LOGPROBS = 65_536
# Other fields of a resumed request are those of the recorded turn.
_RESUMPTION_FIELDS = ("session_id", "resume_from", "priority", "heartbeat_ms")
# Types of the fields of the requests to the tiers.
_MAX_INT32 = (1 << 31) - 1
_MAX_UINT32 = (1 << 32) - 1
_MAX_UINT64 = (1 << 64) - 1

# A request that `validate` has accepted.
ValidRequest = NewType("ValidRequest", GenerationRequest)


def validate(
    request: GenerationRequest,
    limits: Limits,
    tokenizer: Tokenizer | None,
    *,
    given: Collection[str] = (),
) -> ValidRequest:
    """Returns the request. Raises InvalidRequest naming the first field that is wrong.

    `given`: names of the fields that the client has set; needed if `resume_from` is one of them.
    `tokenizer` None: the model has none. Takes 40 ms for a million token ids: call it in a thread.
    """
    if request.resume_from is not None:
        _check_resumption(request, given)
    _check_sampling(request.params, limits, tokenizer)
    if request.gamma is not None:
        _check_range("gamma", request.gamma, 0, limits.max_gamma)
    _check_draft_source(request, limits)
    _check_range("lookahead", request.lookahead, 0, MAX_LOOKAHEAD)
    _check_range("fan_out", request.fan_out, 1, MAX_FAN_OUT)
    _check_range("priority", request.priority, -_MAX_INT32 - 1, _MAX_INT32)
    if request.session_id is not None:
        validate_session_id(request.session_id)
    elif request.create_session:
        raise InvalidRequest("create_session", "requires a session_id")
    if request.resume_from is None:
        _check_input(request, limits, tokenizer)
    return ValidRequest(request)


def check_num_token_ids(num: int, limits: Limits) -> None:
    """Raises InvalidRequest. A transport that copies the list calls this before the copy."""
    if not 1 <= num <= limits.max_context_len:
        raise InvalidRequest(
            "token_ids",
            f"{num} tokens; 1 to {limits.max_context_len} are allowed for {limits.bound}",
        )


def _check_range(field: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidRequest(field, f"{value} is not in [{least}, {most}]")


def _check_resumption(request: GenerationRequest, given: Collection[str]) -> None:
    assert request.resume_from is not None, "it is a resumption"
    if request.session_id is None:
        raise InvalidRequest("session_id", "is required with resume_from")
    _check_range("resume_from", request.resume_from, 0, _MAX_UINT32)
    for name in given:
        if name not in _RESUMPTION_FIELDS:
            raise InvalidRequest(
                name, "not allowed with resume_from; the recorded request of the turn is used"
            )


def _check_sampling(params: SamplingParams, limits: Limits, tokenizer: Tokenizer | None) -> None:
    params.validate(limits.vocab_size)
    _check_range("sampling.top_k", params.top_k, -1, _MAX_INT32)
    _check_range("sampling.seed", params.seed, 0, _MAX_UINT64)
    if params.stop and tokenizer is None:
        raise InvalidRequest("sampling.stop", "the model has no tokenizer; use stop_token_ids")
    if params.bad_words and tokenizer is None:
        why = "the model has no tokenizer; use bad_words_token_ids"
        raise InvalidRequest("sampling.bad_words", why)
    if params.structured_outputs is not None and tokenizer is None:
        raise InvalidRequest(params.structured_outputs.field, "the model has no tokenizer")
    check_some_token_is_left(params, limits)


def check_some_token_is_left(params: SamplingParams, limits: Limits) -> None:
    """Raises InvalidRequest if fields that forbid tokens may leave none at some position."""
    allowed = params.allowed_token_ids or range(limits.vocab_size)
    forbidden: set[int] = set()
    if params.min_tokens:
        forbidden.update(params.stop_token_ids)
        forbidden.update(() if params.ignore_eos else limits.eos_token_ids)
    if params.allowed_token_ids and forbidden.issuperset(allowed):
        raise InvalidRequest(
            "sampling.allowed_token_ids", "all of them end the output, which min_tokens forbids"
        )
    # By the token before; for longer sequences this is more than they forbid.
    after: dict[int | None, set[int]] = {None: forbidden}
    for sequence in params.bad_words_token_ids:
        before = sequence[-2] if len(sequence) > 1 else None
        after.setdefault(before, set()).add(sequence[-1])
    for banned in after.values():
        together = banned | forbidden
        if len(together) >= len(allowed) and together.issuperset(allowed):
            why = "with the other fields, they may forbid every token"
            raise InvalidRequest("sampling.bad_words", why)


def _check_draft_source(request: GenerationRequest, limits: Limits) -> None:
    source = request.draft_source
    if source is SourceName.NONE and request.gamma:
        raise InvalidRequest("gamma", f"{request.gamma} with draft_source none; 0 or unset")
    if source is SourceName.MODEL and not limits.has_draft_tier:
        why = "model: there is no draft tier (draft_endpoint); auto, lookup or none"
        raise InvalidRequest("draft_source", why)
    if source is SourceName.LOOKUP and not limits.has_lookup:
        why = "lookup: prompt lookup is off (prompt_lookup); auto, model or none"
        raise InvalidRequest("draft_source", why)


def _check_input(request: GenerationRequest, limits: Limits, tokenizer: Tokenizer | None) -> None:
    inputs = (request.text, request.token_ids, request.messages)
    if sum(one is not None for one in inputs) != 1:
        raise InvalidRequest("input", "one of text, token_ids, chat is required")
    if request.messages is None:
        check_no_chat_fields(request)
    truncates = request.truncate_prompt_tokens is not None
    if request.truncate_prompt_tokens not in (None, -1):
        most = limits.max_context_len
        _check_range("truncate_prompt_tokens", request.truncate_prompt_tokens or 0, 1, most)
    if request.token_ids is not None:
        if request.add_special_tokens:
            raise InvalidRequest("add_special_tokens", "not with token_ids: add them yourself")
        _check_token_ids(request.token_ids, limits)
        return
    if tokenizer is None:
        raise InvalidRequest(request.input_field, "the model has no tokenizer; send token_ids")
    if request.text is not None:
        if not request.text:
            raise InvalidRequest("text", "the prompt is empty")
        _check_num_chars("text", len(request.text), limits, None if truncates else tokenizer)
    if request.messages is not None:
        check_chat(request)
        num_chars = num_chat_chars(request)
        _check_num_chars("chat", num_chars, limits, None if truncates else tokenizer)


def _check_token_ids(ids: tuple[int, ...], limits: Limits) -> None:
    check_num_token_ids(len(ids), limits)
    if min(ids) < 0 or max(ids) >= limits.vocab_size:
        bad = next(i for i in ids if not 0 <= i < limits.vocab_size)
        raise InvalidRequest("token_ids", f"{bad} is not in [0, {limits.vocab_size})")


def _check_num_chars(
    field: str, num_chars: int, limits: Limits, tokenizer: Tokenizer | None
) -> None:
    """Refuses a text that cannot fit into the context, before it is encoded.

    `tokenizer` None: the prompt will be truncated.
    """
    most = MAX_TEXT_CHARS
    if tokenizer is not None:
        most = min(most, limits.max_context_len * tokenizer.max_token_chars)
    if num_chars > most:
        raise InvalidRequest(
            field, f"{num_chars} characters; at most {most} are allowed for {limits.bound}"
        )


def check_prompt_logprobs(params: SamplingParams, prompt_len: int) -> None:
    """Raises InvalidRequest if the log-probabilities of the prompt are too many for a message."""
    if params.prompt_logprobs is None:
        return
    most = MAX_PROMPT_LOGPROBS // (1 + params.prompt_logprobs)
    if prompt_len > most:
        raise InvalidRequest(
            "sampling.prompt_logprobs",
            f"{params.prompt_logprobs} of each token of a prompt of {prompt_len} tokens; at most "
            f"{most} tokens",
        )


def resolve_max_tokens(
    request: GenerationRequest, prompt_len: int, limits: Limits
) -> GenerationRequest:
    """Returns the request with `params.max_tokens` resolved. Raises InvalidRequest.

    The client's max_tokens is refused if it does not fit. The server's default is cut to fit.
    """
    params = request.params
    if request.max_tokens is not None:
        check_length(request, prompt_len, limits)
        return request
    room = max(0, limits.max_context_len - prompt_len)
    if params.min_tokens > room:
        raise InvalidRequest(
            "sampling.min_tokens",
            f"{params.min_tokens} after a prompt of {prompt_len} tokens exceeds {limits.bound}; "
            f"at most {room}",
        )
    max_tokens = min(room, max(limits.default_max_tokens, params.min_tokens))
    request = replace(request, params=replace(params, max_tokens=max(1, max_tokens)))
    check_length(request, prompt_len, limits)
    return request


def check_length(request: GenerationRequest, prompt_len: int, limits: Limits) -> None:
    """Raises InvalidRequest if prompt and `params.max_tokens` fit no connected target."""
    room, max_tokens = limits.max_context_len - prompt_len, request.params.max_tokens
    if room < 1:
        raise InvalidRequest(
            request.input_field, f"{prompt_len} tokens leave no room in {limits.bound}"
        )
    if max_tokens > room:
        raise InvalidRequest(
            "sampling.max_tokens",
            f"{max_tokens} after a prompt of {prompt_len} tokens exceeds {limits.bound}; "
            f"at most {room}",
        )
