"""Translation of HTTP bodies to plain requests, with the server's defaults for unset fields.

Checks only what plain values cannot represent. All other checks are in
`orchestrator.generation.validation`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.generation.chat import check_num_messages
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.request import Message as PlainMessage
from orchestrator.generation.validation import ValidRequest, check_num_token_ids, validate
from orchestrator.http.bodies import ChatBody, CompletionBody, Message, Sampling
from orchestrator.replicas.models import Limits
from orchestrator.speculation.verification import SourceName
from outrider.errors import InvalidRequest
from outrider.runtime.protobuf import shortest
from outrider.sampling.params import SamplingParams, Verification
from outrider.tokenizer import Tokenizer

# Choices per prompt, as OpenAI; and of all prompts of one request.
MAX_N = 128
MAX_CHOICES = 1_024
_MAX_SEED = (1 << 64) - 1
_SOURCES = {
    None: SourceName.AUTO,
    "auto": SourceName.AUTO,
    "model": SourceName.MODEL,
    "lookup": SourceName.LOOKUP,
    "none": SourceName.NONE,
}
# Not parts of SamplingParams by the same name and type.
_SPECIAL = ("max_tokens", "stop")


@dataclass(frozen=True)
class Plan:
    """What one HTTP request asks for.

    `requests`: one generation per choice, `n` for each prompt in turn. `num_logprobs`: most likely
    tokens to report with each token; None: no log-probabilities.
    """

    requests: Sequence[ValidRequest]
    n: int
    is_stream: bool
    includes_usage: bool
    num_logprobs: int | None
    echo: bool = False


def completion_plan(body: CompletionBody, limits: Limits, tokenizer: Tokenizer | None) -> Plan:
    """Translates and validates. Raises InvalidRequest naming the field that is wrong."""
    n = _num_choices(body.n)
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequest("best_of", f"{body.best_of}; must be n ({n}) or unset")
    if body.echo:
        raise InvalidRequest("echo", "is not supported")
    prompts = tuple(_prompts(body.prompt, limits))
    if n * len(prompts) > MAX_CHOICES:
        raise InvalidRequest(
            "prompt", f"{len(prompts)} prompts with n {n}; at most {MAX_CHOICES} choices"
        )
    first = _request(body, limits, body.max_tokens, body.logprobs, prompts[0])
    requests = (replace(first, **prompt) for prompt in prompts)
    return _plan(body, requests, n, limits, tokenizer, body.logprobs)


def chat_plan(body: ChatBody, limits: Limits, tokenizer: Tokenizer | None) -> Plan:
    """Translates and validates. Raises InvalidRequest naming the field that is wrong."""
    max_tokens = body.max_completion_tokens
    if max_tokens is None:
        max_tokens = body.max_tokens
    elif body.max_tokens not in (None, max_tokens):
        raise InvalidRequest("max_tokens", "differs from max_completion_tokens; send one of them")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs: true")
    check_num_messages(len(body.messages))
    messages = tuple(plain_message(message) for message in body.messages)
    prompt = {"text": None, "token_ids": None, "messages": messages}
    request = _request(body, limits, max_tokens, num_logprobs, prompt)
    return _plan(body, (request,), _num_choices(body.n), limits, tokenizer, num_logprobs)


def plain_message(message: Message) -> PlainMessage:
    """The message in the form of GenerationRequest."""
    return {"content": "", **message.model_dump(exclude_none=True)}


def _num_choices(n: int | None) -> int:
    if n is not None and not 1 <= n <= MAX_N:
        raise InvalidRequest("n", f"{n} is not in [1, {MAX_N}]")
    return n or 1


def _plan(
    body: CompletionBody | ChatBody,
    requests: Iterator[GenerationRequest] | Sequence[GenerationRequest],
    n: int,
    limits: Limits,
    tokenizer: Tokenizer | None,
    num_logprobs: int | None,
) -> Plan:
    valid = [
        choice
        for request in requests
        for choice in _choices(validate(request, limits, tokenizer), n)
    ]
    if len(valid) > 1 and body.session_id is not None:
        raise InvalidRequest("session_id", f"not allowed with {len(valid)} choices")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "needs stream: true")
    return Plan(
        valid,
        n,
        is_stream=bool(body.stream),
        includes_usage=bool(body.stream_options and body.stream_options.include_usage),
        num_logprobs=num_logprobs,
    )


def _choices(request: ValidRequest, n: int) -> Iterator[ValidRequest]:
    """The request n times. Choice i has the seed of the request plus i, as vLLM's."""
    params = request.params
    for index in range(n):
        seed = (params.seed + index) & _MAX_SEED
        yield ValidRequest(replace(request, params=replace(params, seed=seed)))


def _prompts(prompt: Any, limits: Limits) -> Iterator[dict[str, Any]]:
    """The prompts by the names of GenerationRequest."""
    values = prompt if isinstance(prompt, list) and prompt else [prompt]
    if all(type(value) is int for value in values):
        values = [values]
    for value in values:
        if isinstance(value, str):
            yield {"text": value, "token_ids": None, "messages": None}
        elif isinstance(value, list) and value and all(type(one) is int for one in value):
            check_num_token_ids(len(value), limits)
            yield {"text": None, "token_ids": tuple(value), "messages": None}
        else:
            raise InvalidRequest(
                "prompt", "must be a text, a list of texts, token ids or a list of token id lists"
            )


def _request(
    body: CompletionBody | ChatBody,
    limits: Limits,
    max_tokens: int | None,
    num_logprobs: int | None,
    prompt: Mapping[str, Any],
) -> GenerationRequest:
    source = _SOURCES[body.draft_source]
    default_gamma = 0 if source is SourceName.NONE else limits.gamma
    gamma = default_gamma if body.gamma is None else body.gamma
    return GenerationRequest(
        **prompt,
        params=_params(body, limits, max_tokens, num_logprobs),
        max_tokens=max_tokens,
        verification=Verification(body.verification or Verification.REJECTION),
        gamma=gamma,
        max_gamma=limits.max_gamma,
        lookahead=limits.lookahead if body.lookahead is None else body.lookahead,
        fan_out=limits.fan_out if body.fan_out is None else body.fan_out,
        session_id=body.session_id or None,
        create_session=bool(body.create_session),
        is_durable=limits.is_durable if body.durability is None else body.durability == "durable",
        waits_for_draft=(
            limits.waits_for_draft if body.draft_wait is None else body.draft_wait == "always"
        ),
        draft_source=source,
        priority=body.priority or 0,
        is_seeded=body.seed is not None or "seed" in limits.sampling_defaults,
    )


def _params(
    body: Sampling, limits: Limits, max_tokens: int | None, num_logprobs: int | None
) -> SamplingParams:
    given = {
        name: _plain(value)
        for name in Sampling.model_fields
        if name not in _SPECIAL and (value := getattr(body, name)) is not None
    }
    stop = body.stop or ()
    values: dict[str, Any] = {
        "seed": secrets.randbits(63),
        **limits.sampling_defaults,
        **given,
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "logprobs": num_logprobs,
    }
    default = max(limits.default_max_tokens, values.get("min_tokens", 0))
    return SamplingParams(**values, max_tokens=default if max_tokens is None else max_tokens)


def _plain(value: Any) -> Any:
    """The value as the tiers get it: numbers as float32, so that all compute with the same."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return {key: shortest(one) for key, one in value.items()}
    return shortest(value)
