"""Flags of `outrider generate` for the text of prompt and output, and the fields made of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli.access import AccessOptions
from outrider.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextOptions(AccessOptions):
    """Base class of the options; None leaves the server's default."""

    answer_start: Annotated[
        str | None, typer.Option(help="Start of the chat's answer, which is continued.")
    ] = None
    tools: Annotated[
        Path | None,
        typer.Option(help="File with a chat's tools: a JSON list in OpenAI's form."),
    ] = None
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='Variables of the chat template, such as {"enable_thinking": false}.',
        ),
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        typer.Option(help="Encode the prompt with the tokenizer's special tokens, such as BOS."),
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Keep the prompt's last N tokens; -1: as many as there is room for."),
    ] = None
    bad_words: Annotated[
        list[str] | None, typer.Option(help="Word that the output must not contain. Repeatable.")
    ] = None
    skip_special_tokens: Annotated[
        bool | None, typer.Option(help="Leave special tokens out of the text. Default: yes.")
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(help="Log-probabilities of the prompt, N likely tokens each, with --json."),
    ] = None
    include_stop_str_in_output: Annotated[
        bool, typer.Option("--include-stop-str-in-output", help="Print what ends the output, too.")
    ] = False


# Flags that are fields of the request under the same name.
TEXT_FIELDS = (
    "bad_words", "skip_special_tokens", "add_special_tokens", "truncate_prompt_tokens",
    "prompt_logprobs",
)  # fmt: skip


def text_fields(options: TextOptions) -> dict[str, Any]:
    """Fields of any request; None: the server's default."""
    includes = options.include_stop_str_in_output or None
    fields = {name: getattr(options, name) for name in TEXT_FIELDS}
    return fields | {"include_stop_str_in_output": includes}


def chat_fields(options: TextOptions) -> dict[str, Any]:
    """Fields of a chat. Raises ConfigError for files and JSON."""
    fields: dict[str, Any] = {}
    if options.answer_start is not None:
        fields["continue_final_message"] = True
    if options.tools is not None:
        try:
            fields["tools"] = _parsed("--tools", options.tools.read_text("utf-8"), list)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--tools: {options.tools} cannot be read: {error}") from None
    if options.chat_template_kwargs is not None:
        kwargs = _parsed("--chat-template-kwargs", options.chat_template_kwargs, dict)
        fields["chat_template_kwargs"] = kwargs
    return fields


def check_no_chat_flags(options: TextOptions) -> None:
    """Raises ConfigError for flags that only a chat has."""
    for name in ("answer_start", "tools", "chat_template_kwargs"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: only with --chat")


def _parsed(flag: str, text: str, kind: type[Any]) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{flag}: is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise ConfigError(f"{flag}: must be a JSON {'list' if kind is list else 'object'}")
    return value
