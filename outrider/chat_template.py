"""Chat template of a model: renders messages to prompt text, as transformers' apply_chat_template.

The environment, the variables and the treatment of a continued message are transformers' (5.24).
Like vLLM, it converts what templates do not expect: the JSON arguments of tool calls become
objects, and content parts become text where the template does not iterate over parts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from outrider.errors import ConfigError, InvalidRequest

# What evaluating a template raises for messages that it does not expect.
_REJECTIONS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
_PROBE = "probe of content parts"
# Marks the end of the message to continue. The space shows whether the template strips it.
_END_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """Compiled chat template. Immutable.

    `special_tokens`: texts that the template may use by name, such as `bos_token`. `tool_use`: the
    template for requests with tools, where a model has one of its own.
    """

    def __init__(
        self, template: str, special_tokens: Mapping[str, str], tool_use: str | None = None
    ) -> None:
        """Raises ConfigError for a template with syntax errors."""
        self._template = _compile(template)
        self._with_tools = _compile(tool_use) if tool_use else self._template
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Text of the messages; with `add_generation_prompt` followed by the start of an answer.

        `messages` and `tools` are in OpenAI's form. `kwargs`: further variables of the template.
        `continue_final_message`: the text ends with the last message's content. Raises
        InvalidRequest if the template rejects the messages.
        """
        template = self._with_tools if tools else self._template
        adapted = [self._adapted(message, template) for message in messages]
        if continue_final_message:
            _add_end_tag(adapted[-1])
        variables = {
            "documents": None,
            **self._special_tokens,
            **(kwargs or {}),
            "messages": adapted,
            "tools": list(tools) or None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = template.render(variables)
        except _REJECTIONS as error:
            raise InvalidRequest("chat", f"the chat template rejects it: {error}") from error
        return _cut_at_end_tag(text, messages[-1]) if continue_final_message else text

    def _adapted(self, message: Mapping[str, Any], template: jinja2.Template) -> dict[str, Any]:
        """The message as templates expect it. A copy, down to the texts of its parts."""
        adapted = dict(message)
        content, forms = message["content"], self._content_forms[template is self._with_tools]
        if isinstance(content, str):
            adapted["content"] = content if forms.takes_text else [_part(content)]
        else:
            texts = [part["text"] for part in content]
            adapted["content"] = [*map(_part, texts)] if forms.takes_parts else "\n".join(texts)
        if "tool_calls" in message:
            adapted["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
        reasoning = next((message[name] for name in _REASONING_FIELDS if name in message), None)
        if reasoning is not None:
            adapted = {"thinking": reasoning, **adapted, "reasoning_content": reasoning}
        return adapted

    @functools.cached_property
    def _content_forms(self) -> tuple[_ContentForms, _ContentForms]:
        """Of the template without tools and of the one with tools."""
        own = self._forms_of(self._template)
        return own, own if self._with_tools is self._template else self._forms_of(self._with_tools)

    def _forms_of(self, template: jinja2.Template) -> _ContentForms:
        of_text, of_parts = (
            self._probed(template, content) for content in (_PROBE, [_part(_PROBE)])
        )
        takes_text = _PROBE in of_text
        takes_parts = of_parts == of_text if takes_text else _PROBE in of_parts
        return _ContentForms(takes_text or not takes_parts, takes_parts)

    def _probed(self, template: jinja2.Template, content: Any) -> str:
        """A user's message rendered; empty if the template rejects it."""
        messages = [{"role": "user", "content": content}]
        try:
            return template.render({**self._special_tokens, "messages": messages})
        except _REJECTIONS:
            return ""


class _ContentForms(NamedTuple):
    """Forms of a message's content that a template renders: a text, a list of parts."""

    takes_text: bool
    takes_parts: bool


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    """The tool call with its arguments, JSON text, as an object. Raises InvalidRequest."""
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError) as error:
            why = f"the arguments of {function['name']} are not JSON: {error}"
            raise InvalidRequest("chat.messages.tool_calls", why) from None
    return {**call, "function": function}


def _add_end_tag(message: dict[str, Any]) -> None:
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _END_TAG
    else:
        content[-1]["text"] += _END_TAG


def _cut_at_end_tag(text: str, last: Mapping[str, Any]) -> str:
    """The text up to the end of the last message's content. Raises InvalidRequest."""
    content = last["content"]
    end = content if isinstance(content, str) else content[-1]["text"]
    at = text.rfind(_END_TAG.strip())
    if at < 0 or end.strip() not in text:
        raise InvalidRequest(
            "chat.continue_final_message",
            "the chat template leaves out the end of the last message, or rewrites it",
        )
    kept = text[:at]
    return kept if text.startswith(_END_TAG, at) else kept.rstrip()


class _GenerationTag(Extension):
    """`{% generation %}`, which marks answers for training: renders its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_rendered")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _rendered(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` in templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _compile(template: str) -> jinja2.Template:
    """Compiles with transformers' settings and functions, so that the same templates work."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["dict"] = _Dict()
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template cannot be compiled: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's escapes of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
