"""Flags of `outrider generate`, and the GenerateRequest made of them.

The server checks the values; its errors name the request's field.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.access import CONNECTION, AccessOptions
from outrider.cli.options import parse_ids
from outrider.errors import ConfigError, InvalidRequest
from outrider.settings.addresses import require_endpoint

if TYPE_CHECKING:
    from outrider.v1 import orchestrator_pb2, sampling_pb2

DEFAULT_ENDPOINT = "127.0.0.1:50051"
EndpointOption = Annotated[
    str,
    typer.Option(
        envvar="OUTRIDER_ENDPOINT",
        help="host:port of the orchestrator.",
        rich_help_panel=CONNECTION,
    ),
]
EndpointsOption = Annotated[
    str,
    typer.Option(
        envvar="OUTRIDER_ENDPOINT",
        help="host:port of the orchestrator, or of several, comma-separated: a broken stream is "
        "resumed at the next one.",
        rich_help_panel=CONNECTION,
    ),
]


class Method(StrEnum):
    """Verification methods, named as in `outrider.sampling.params.Verification`."""

    rejection = "rejection"
    coupled = "coupled"
    block = "block"


class DraftWait(StrEnum):
    """Ways to wait for draft tokens, named as in GenerateRequest's DraftWait."""

    adaptive = "adaptive"
    always = "always"


class DraftSource(StrEnum):
    """Where draft tokens come from, named as in GenerateRequest's DraftSource."""

    auto = "auto"
    model = "model"
    lookup = "lookup"
    none = "none"


class Durability(StrEnum):
    """When tokens are written to Redis, named as in GenerateRequest's Durability."""

    durable = "durable"
    fast = "fast"


@dataclass(frozen=True)
class GenerateOptions(AccessOptions):
    """Flags of `outrider generate`; None leaves the server's default."""

    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads it from standard input.")
    ] = None
    token_ids: Annotated[
        str | None, typer.Option(help="Prompt as token ids, instead of PROMPT: 1,2,3.")
    ] = None
    chat: Annotated[
        bool, typer.Option("--chat", help="Send PROMPT as a chat message of the user.")
    ] = False
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None
    session: Annotated[
        str | None, typer.Option(help="Name of a session to continue or to create.")
    ] = None
    max_tokens: Annotated[int | None, typer.Option(help="Maximum tokens to generate.")] = None
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature; 0 is greedy. Default: the model's, or 1."),
    ] = None
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, in (0, 1].")] = None
    top_k: Annotated[
        int | None, typer.Option(help="Sample from the k most likely tokens; 0 or -1: all.")
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop tokens below this share of the top probability, in [0, 1]."),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Random seed. Default: random, and reported.")
    ] = None
    gamma: Annotated[
        int | None,
        typer.Option(help="Draft tokens per round (γ); 0: no drafts. Default: adaptive."),
    ] = None
    verification: Annotated[
        Method | None,
        typer.Option(help="Method that accepts or rejects draft tokens. Default: rejection."),
    ] = None
    lookahead: Annotated[
        int | None, typer.Option(help="Maximum rounds drafted ahead of verification; 0: none.")
    ] = None
    fan_out: Annotated[
        int | None, typer.Option(help="Maximum verify outcomes per round that are drafted ahead.")
    ] = None
    draft_wait: Annotated[
        DraftWait | None, typer.Option(help="Wait for draft tokens while it pays, or always.")
    ] = None
    draft_source: Annotated[
        DraftSource | None,
        typer.Option(help="Draft tier (model), earlier text (lookup), the faster (auto) or none."),
    ] = None
    priority: Annotated[int | None, typer.Option(help="Lower runs first. Default: 0.")] = None
    durability: Annotated[
        Durability | None,
        typer.Option(help="Write tokens to Redis before (durable) or after (fast) they are sent."),
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output. Repeatable.")
    ] = None
    stop_token_ids: Annotated[
        str | None, typer.Option(help="Token ids that end the output: 1,2,3.")
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue after an end-of-sequence token.")
    ] = False
    min_tokens: Annotated[
        int | None, typer.Option(help="Minimum tokens before the output may end.")
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Penalty for tokens that the output has, in [-2, 2].")
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Penalty for each occurrence in the output, in [-2, 2].")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Factor against tokens of prompt and output, in (0, 10].")
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=BIAS",
            help="Added to the logit of a token; BIAS in [-100, 100]. Repeatable.",
        ),
    ] = None
    allowed_token_ids: Annotated[
        str | None, typer.Option(help="Generate these token ids only: 1,2,3.")
    ] = None
    logprobs: Annotated[
        int | None, typer.Option(help="Log-probabilities of the N most likely tokens, with --json.")
    ] = None
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = (
        False
    )
    endpoint: EndpointsOption = DEFAULT_ENDPOINT
    resume_from: Annotated[
        int | None,
        typer.Option(
            help="Resume the interrupted generation of --session after this many of its tokens."
        ),
    ] = None
    resume_for: Annotated[
        float,
        typer.Option(
            help="With several endpoints: seconds to look for one that resumes a broken stream."
        ),
    ] = 30.0
    timeout: Annotated[
        float | None,
        typer.Option(help="Time limit of the whole generation in seconds. Default: none."),
    ] = None


_SCALARS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs",
)  # fmt: skip


def build_request(options: GenerateOptions) -> orchestrator_pb2.GenerateRequest:
    """The request that the flags describe. Reads standard input if the prompt is -.

    Raises ConfigError for flags that exclude each other, InvalidRequest for a number outside its
    field's range.
    """
    from outrider.runtime.protobuf import verification_to_proto
    from outrider.sampling.params import Verification
    from outrider.v1 import orchestrator_pb2, sampling_pb2

    if options.session == "":
        raise ConfigError("--session: the name is empty")
    request = orchestrator_pb2.GenerateRequest(session_id=options.session or "")
    if options.resume_from is None:
        request.create_session = bool(options.session)
        _set_input(request, options)
    else:
        _check_resumption(options)
        _set(request, "resume_from", options.resume_from)
    for name in ("gamma", "lookahead", "fan_out", "priority"):
        _set(request, name, getattr(options, name))
    if options.verification is not None:
        request.verification = verification_to_proto(Verification(options.verification.value))
    for name, values in (
        ("durability", orchestrator_pb2.Durability),
        ("draft_wait", orchestrator_pb2.DraftWait),
        ("draft_source", orchestrator_pb2.DraftSource),
    ):
        if (choice := getattr(options, name)) is not None:
            setattr(request, name, values.Value(f"{name}_{choice.name}".upper()))
    sampling = sampling_pb2.SamplingParams()
    _set_sampling(sampling, options)
    if sampling.ListFields():
        request.sampling.CopyFrom(sampling)
    return request


def endpoints_of(endpoint: str) -> list[str]:
    """The comma-separated endpoints of --endpoint. Raises ConfigError."""
    endpoints = [part.strip() for part in endpoint.split(",")]
    if not all(endpoints):
        raise ConfigError(f"--endpoint: {endpoint!r} is not a list such as a:50051,b:50051")
    for part in endpoints:
        require_endpoint(part, "--endpoint")
    return endpoints


def _check_resumption(options: GenerateOptions) -> None:
    """Refuses a prompt with --resume-from; the server refuses all other fields."""
    if not options.session:
        raise ConfigError("--resume-from: needs --session, the session to resume")
    for flag, value in (("PROMPT", options.prompt), ("--token-ids", options.token_ids)):
        if value is not None:
            raise ConfigError(f"--resume-from: not with {flag}: the session has the prompt")
    if options.chat or options.system is not None:
        raise ConfigError("--resume-from: not with --chat or --system: the session has the prompt")


def _set(message: Any, field: str, value: Any, path: str = "") -> None:
    if value is None:
        return
    try:
        setattr(message, field, value)
    except ValueError as error:
        raise InvalidRequest(path or field, f"{value}: {error}") from None


def _extend(message: Any, field: str, values: list[int], path: str) -> None:
    try:
        getattr(message, field).extend(values)
    except ValueError as error:
        raise InvalidRequest(path, str(error)) from None


def _set_input(request: orchestrator_pb2.GenerateRequest, options: GenerateOptions) -> None:
    if (options.prompt is None) == (options.token_ids is None):
        raise ConfigError("PROMPT or --token-ids: give one of them")
    if options.system is not None and not options.chat:
        raise ConfigError("--system: only with --chat")
    if options.token_ids is not None:
        if options.chat:
            raise ConfigError("--chat: only with PROMPT")
        request.token_ids.SetInParent()
        ids = parse_ids(options.token_ids, "--token-ids")
        _extend(request.token_ids, "ids", ids, "token_ids")
        return
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    assert prompt is not None
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError("PROMPT: is not UTF-8 text")
    if not options.chat:
        request.text = prompt
        return
    if options.system is not None:
        request.chat.messages.add(role="system", content=options.system)
    request.chat.messages.add(role="user", content=prompt)


def _set_sampling(sampling: sampling_pb2.SamplingParams, options: GenerateOptions) -> None:
    for name in _SCALARS:
        _set(sampling, name, getattr(options, name), f"sampling.{name}")
    if options.ignore_eos:
        sampling.ignore_eos = True
    sampling.stop.extend(options.stop or [])
    for name in ("stop_token_ids", "allowed_token_ids"):
        text = getattr(options, name)
        if text is not None:
            ids = parse_ids(text, f"--{name.replace('_', '-')}")
            _extend(sampling, name, ids, f"sampling.{name}")
    for entry in options.logit_bias or []:
        token_id, bias = _parse_bias(entry)
        try:
            sampling.logit_bias[token_id] = bias
        except ValueError as error:
            raise InvalidRequest("sampling.logit_bias", str(error)) from None


def _parse_bias(entry: str) -> tuple[int, float]:
    token_id, _, bias = entry.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise ConfigError(f"--logit-bias: {entry!r} is not ID=BIAS") from None
