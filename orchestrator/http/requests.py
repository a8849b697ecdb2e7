"""Translation of HTTP bodies to plain requests, with the server's defaults for unset fields.

Checks only what plain values cannot represent. All other checks are in
`orchestrator.generation.validation`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.generation.chat import check_num_messages
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.validation import ValidRequest, check_num_token_ids, validate
from orchestrator.http.bodies import (
    Chat,
    ChatBody,
    CompletionBody,
    Format,
    Generating,
    Sampling,
    StreamOptions,
)
from orchestrator.http.tools import ToolUse, tool_use
from orchestrator.replicas.models import Limits
from orchestrator.speculation.verification import SourceName
from outrider.errors import InvalidRequest
from outrider.runtime.protobuf import shortest
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.structured_outputs import StructuredOutputs
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


@dataclass(frozen=True)
class Plan:
    """What one HTTP request asks for.

    `requests`: one generation per choice, `n` for each prompt in turn. `num_logprobs`: most likely
    tokens to report with each token; None: no log-probabilities. `has_running_usage`: each chunk
    has the usage so far. `echo`: the text of each prompt
    comes before its output. `has_details`: tokens are reported one by one. `tools`: how the answer
    may call tools; None: it may not.
    """

    requests: Sequence[ValidRequest]
    n: int
    is_stream: bool
    includes_usage: bool
    has_running_usage: bool
    num_logprobs: int | None
    echo: bool = False
    has_details: bool = False
    tools: ToolUse | None = None


def completion_plan(body: CompletionBody, limits: Limits, tokenizer: Tokenizer | None) -> Plan:
    """Translates and validates. Raises InvalidRequest naming the field that is wrong."""
    n = _num_choices(body.n)
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequest("best_of", f"{body.best_of}; must be n ({n}) or unset")
    prompts = tuple(_prompts(body.prompt, limits))
    if n * len(prompts) > MAX_CHOICES:
        raise InvalidRequest(
            "prompt", f"{len(prompts)} prompts with n {n}; at most {MAX_CHOICES} choices"
        )
    if body.echo and tokenizer is None:
        raise InvalidRequest("echo", "the model has no tokenizer")
    prompt_logprobs = body.prompt_logprobs
    if body.echo and prompt_logprobs is None:
        prompt_logprobs = body.logprobs  # OpenAI's: of the prompt's tokens, too
    first = _request(
        body,
        limits,
        body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_logprobs,
        add_special_tokens=body.add_special_tokens,
    )
    requests = (replace(first, **prompt) for prompt in prompts)
    return _plan(body, requests, n, limits, tokenizer, body.logprobs, echo=bool(body.echo))


def chat_plan(body: ChatBody, limits: Limits, tokenizer: Tokenizer | None) -> Plan:
    """Translates and validates. Raises InvalidRequest naming the field that is wrong."""
    max_tokens = body.max_completion_tokens
    if max_tokens is None:
        max_tokens = body.max_tokens
    elif body.max_tokens not in (None, max_tokens):
        raise InvalidRequest("max_tokens", "differs from max_completion_tokens; send one of them")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs: true")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    request = _request(body, limits, max_tokens, logprobs=num_logprobs, **chat_fields(body))
    tools = tool_use(body, tokenizer)
    if tools is not None:
        if request.params.structured_outputs is not None:
            raise InvalidRequest("tools", "not with another format of the output")
        params = replace(request.params, structured_outputs=tools.format())
        request = replace(request, params=params)
    plan = _plan(body, (request,), _num_choices(body.n), limits, tokenizer, num_logprobs)
    return replace(plan, tools=tools)


def num_choices(body: CompletionBody | ChatBody) -> int:
    """Number of choices that the body asks for, before it is checked."""
    num_prompts, prompt = 1, getattr(body, "prompt", None)
    if isinstance(prompt, list) and prompt and type(prompt[0]) is not int:
        num_prompts = len(prompt)
    return (body.n or 1) * num_prompts


def chat_fields(body: Chat) -> dict[str, Any]:
    """The chat by the names of GenerationRequest."""
    check_num_messages(len(body.messages))
    return {
        "messages": tuple(
            {"content": "", **message.model_dump(exclude_none=True)} for message in body.messages
        ),
        "tools": tuple(body.tools or ()),
        "chat_template_kwargs": body.chat_template_kwargs or {},
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": bool(body.continue_final_message),
    }


def prompt_request(limits: Limits, **prompt: Any) -> GenerationRequest:
    """A request of which only the prompt matters."""
    return _request(Generating(), limits, None, **prompt)


def _num_choices(n: int | None) -> int:
    if n is not None and not 1 <= n <= MAX_N:
        raise InvalidRequest("n", f"{n} is not in [1, {MAX_N}]")
    return n or 1


def _plan(
    body: CompletionBody | ChatBody,
    requests: Iterable[GenerationRequest],
    n: int,
    limits: Limits,
    tokenizer: Tokenizer | None,
    num_logprobs: int | None,
    *,
    echo: bool = False,
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
    options = body.stream_options or StreamOptions()
    return Plan(
        valid,
        n,
        is_stream=bool(body.stream),
        includes_usage=bool(options.include_usage),
        has_running_usage=bool(options.include_usage and options.continuous_usage_stats),
        num_logprobs=num_logprobs,
        echo=echo,
        has_details=bool(body.token_details),
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
            yield {"text": value, "token_ids": None}
        elif isinstance(value, list) and value and all(type(one) is int for one in value):
            check_num_token_ids(len(value), limits)
            yield {"text": None, "token_ids": tuple(value)}
        else:
            raise InvalidRequest(
                "prompt", "must be a text, a list of texts, token ids or a list of token id lists"
            )


def _request(
    body: Generating,
    limits: Limits,
    max_tokens: int | None,
    *,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    **prompt: Any,
) -> GenerationRequest:
    source = _SOURCES[body.draft_source]
    default_gamma = 0 if source is SourceName.NONE else limits.gamma
    params = _params(body, limits, max_tokens)
    return GenerationRequest(
        **{"text": None, "token_ids": None, "messages": None, **prompt},
        params=replace(params, logprobs=logprobs, prompt_logprobs=prompt_logprobs),
        max_tokens=max_tokens,
        verification=Verification(body.verification or Verification.REJECTION),
        gamma=default_gamma if body.gamma is None else body.gamma,
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
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )


def _params(body: Generating, limits: Limits, max_tokens: int | None) -> SamplingParams:
    given = {
        name: _plain(value)
        for name in Sampling.model_fields
        if (value := getattr(body, name)) is not None
    }
    if isinstance(body.stop, str):
        given["stop"] = (body.stop,)
    values: dict[str, Any] = {"seed": secrets.randbits(63), **limits.sampling_defaults, **given}
    default = max(limits.default_max_tokens, values.get("min_tokens", 0))
    return SamplingParams(
        **values,
        max_tokens=default if max_tokens is None else max_tokens,
        structured_outputs=_format(body),
    )


def _plain(value: Any) -> Any:
    """The value as the tiers get it: numbers as float32, so that all compute with the same."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return {key: shortest(one) for key, one in value.items()}
    return shortest(value)


def _format(body: Generating) -> StructuredOutputs | None:
    """The format of the output that the request asks for. Raises InvalidRequest if two differ."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None if body.structured_outputs is None else _structured(body.structured_outputs)
    if body.structured_outputs is not None:
        raise InvalidRequest("response_format", "not with structured_outputs; send one of them")
    has_tags = wanted.format or wanted.structures or wanted.triggers
    if has_tags and wanted.type != "structural_tag":
        raise InvalidRequest("response_format.type", "must be structural_tag to have tags")
    if wanted.type == "structural_tag":
        given = wanted.model_dump(exclude_none=True)
        return StructuredOutputs(structural_tag=json.dumps(given, ensure_ascii=False))
    if wanted.type == "json_object":
        return StructuredOutputs(json_object=True)
    if wanted.json_schema is None:
        raise InvalidRequest("response_format.json_schema", "is required with type json_schema")
    return StructuredOutputs(json=json.dumps(wanted.json_schema.schema_, ensure_ascii=False))


def _structured(given: Format) -> StructuredOutputs:
    schema = given.json_
    return StructuredOutputs(
        json=json.dumps(schema, ensure_ascii=False) if isinstance(schema, dict) else schema,
        json_object=bool(given.json_object),
        regex=given.regex,
        choice=tuple(given.choice or ()),
        grammar=given.grammar,
        structural_tag=given.structural_tag,
    )
