"""Flags of `outrider generate`, and the GenerateRequest made of them.

The server checks the values; its errors name the request's field.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.access import CONNECTION
from outrider.cli.options import parse_ids
from outrider.cli.text_options import TextOptions, chat_fields, check_no_chat_flags, text_fields
from outrider.errors import ConfigError
from outrider.settings.addresses import require_endpoint

if TYPE_CHECKING:
    from outrider.v1 import orchestrator_pb2

DEFAULT_ENDPOINT = "127.0.0.1:50051"
EndpointOption = Annotated[
    str,
    typer.Option(
        envvar="OUTRIDER_ENDPOINT",
        help="host:port of the orchestrator, or of several, comma-separated: if one fails, the "
        "next one is used, also for the rest of a broken stream.",
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
class GenerateOptions(TextOptions):
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
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that the output must match.")
    ] = None
    json_object: Annotated[
        bool, typer.Option("--json-object", help="The output is a JSON object.")
    ] = False
    regex: Annotated[
        str | None, typer.Option(help="Regular expression that the whole output must match.")
    ] = None
    choice: Annotated[
        list[str] | None, typer.Option(help="The output is one of these texts. Repeatable.")
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option(help="File with a grammar, in llguidance's Lark, that the output must match."),
    ] = None
    structural_tag: Annotated[
        Path | None,
        typer.Option(help="File with structural tags as JSON: parts of free text with a schema."),
    ] = None
    logprobs: Annotated[
        int | None, typer.Option(help="Log-probabilities of the N most likely tokens, with --json.")
    ] = None
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = (
        False
    )
    endpoint: EndpointOption = DEFAULT_ENDPOINT
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


# Flags that are fields of the request under the same name; StrEnums are their values' names.
_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "stop",
    "gamma", "verification", "lookahead", "fan_out", "draft_wait", "draft_source", "priority",
    "durability",
)  # fmt: skip


def build_request(options: GenerateOptions) -> orchestrator_pb2.GenerateRequest:
    """The request that the flags describe. Reads standard input if the prompt is -.

    Raises ConfigError for flags that exclude each other, InvalidRequest for a number outside its
    field's range.
    """
    from outrider.client import request

    if options.session == "":
        raise ConfigError("--session: the name is empty")
    fields: dict[str, Any] = {name: getattr(options, name) for name in _FIELDS}
    fields |= text_fields(options)
    fields |= {"session_id": options.session, "ignore_eos": options.ignore_eos or None}
    for name in ("stop_token_ids", "allowed_token_ids"):
        if (text := getattr(options, name)) is not None:
            fields[name] = parse_ids(text, f"--{name.replace('_', '-')}")
    if structured := _structured(options):
        fields["structured_outputs"] = structured
    if options.logit_bias:
        fields["logit_bias"] = dict(map(_parse_bias, options.logit_bias))
    if options.resume_from is not None:
        _check_resumption(options)
        return request.build_request(resume_from=options.resume_from, fields=fields)
    prompt = _prompt(options)
    if not options.chat:
        check_no_chat_flags(options)
        return request.build_request(prompt, fields=fields)
    messages = [{"role": "user", "content": prompt}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    if options.answer_start is not None:
        messages.append({"role": "assistant", "content": options.answer_start})
    return request.build_request(messages=messages, fields=fields | chat_fields(options))


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


def _prompt(options: GenerateOptions) -> str | list[int]:
    if (options.prompt is None) == (options.token_ids is None):
        raise ConfigError("PROMPT or --token-ids: give one of them")
    if options.system is not None and not options.chat:
        raise ConfigError("--system: only with --chat")
    if options.token_ids is not None:
        if options.chat:
            raise ConfigError("--chat: only with PROMPT")
        return parse_ids(options.token_ids, "--token-ids")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    assert prompt is not None
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError("PROMPT: is not UTF-8 text")
    return prompt


def _structured(options: GenerateOptions) -> dict[str, Any]:
    """The format of the output; empty: free text. Raises ConfigError for a file."""
    formats: dict[str, Any] = {
        "json": _text_of("--json-schema", options.json_schema),
        "json_object": options.json_object or None,
        "regex": options.regex,
        "choice": options.choice,
        "grammar": _text_of("--grammar", options.grammar),
        "structural_tag": _text_of("--structural-tag", options.structural_tag),
    }
    return {name: value for name, value in formats.items() if value is not None}


def _text_of(flag: str, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{flag}: {path}: {reason}") from None


def _parse_bias(entry: str) -> tuple[int, float]:
    token_id, _, bias = entry.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise ConfigError(f"--logit-bias: {entry!r} is not ID=BIAS") from None
