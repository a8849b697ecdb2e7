"""Chat template of a model: renders messages to prompt text, as Hugging Face does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from outrider.errors import ConfigError, InvalidRequest


class ChatTemplate:
    """Compiled chat template. Immutable.

    `special_tokens`: texts that the template may use by name, such as `bos_token`.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ConfigError for a template with syntax errors."""
        self._template = _compile(template)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of the messages, followed by the prompt for the next answer.

        Raises InvalidRequest if the template rejects the messages.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest("chat", f"the chat template rejects it: {error}") from error


class _GenerationTag(Extension):
    """`{% generation %}`, which marks answers for training: renders its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str) -> jinja2.Template:
    """Compiles with Hugging Face's settings and functions, so that the same templates work."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template cannot be compiled: {error}") from error
