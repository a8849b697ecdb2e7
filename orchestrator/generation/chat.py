"""Chat of a request: validation of its messages, tools and template variables, and its size.

Names of fields in errors are those of `ChatMessages` in orchestrator.proto.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from orchestrator.generation.request import GenerationRequest, Message
from outrider.errors import InvalidRequest

MAX_CHAT_MESSAGES = 4_096
# Content parts and tool calls of all messages.
MAX_CHAT_PARTS = 16_384
MAX_TOOLS = 1_024
MAX_ROLE_CHARS = 64
# A template writes the role between its control tokens: it must not bring tokens of its own.
_ROLE = re.compile(rf"[A-Za-z][A-Za-z0-9_-]{{0,{MAX_ROLE_CHARS - 1}}}", re.ASCII)
_OPTIONAL_TEXTS = ("name", "tool_call_id", "reasoning_content")
# Variables of the template that other fields set.
_RESERVED = {
    "messages": "chat.messages",
    "tools": "chat.tools",
    "add_generation_prompt": "chat.add_generation_prompt",
    "continue_final_message": "chat.continue_final_message",
    "chat_template": "the server's chat_template",
    "tokenize": "nothing: prompts are always encoded",
}


def check_num_messages(num: int) -> None:
    """Raises InvalidRequest. A transport that copies the list calls this before the copy."""
    if num == 0:
        raise InvalidRequest("chat", "the conversation is empty")
    if num > MAX_CHAT_MESSAGES:
        raise InvalidRequest("chat", f"{num} messages; at most {MAX_CHAT_MESSAGES}")


def check_num_chat_parts(num: int) -> None:
    """Raises InvalidRequest. A transport that copies parts and tool calls calls this before."""
    if num > MAX_CHAT_PARTS:
        raise InvalidRequest(
            "chat.messages", f"{num} content parts and tool calls; at most {MAX_CHAT_PARTS}"
        )


def check_no_chat_fields(request: GenerationRequest) -> None:
    """Raises InvalidRequest if a request without messages has a field of chats."""
    for name, is_set in (
        ("tools", bool(request.tools)),
        ("chat_template_kwargs", bool(request.chat_template_kwargs)),
        ("add_generation_prompt", request.add_generation_prompt is not None),
        ("continue_final_message", request.continue_final_message),
    ):
        if is_set:
            raise InvalidRequest(f"chat.{name}", "only with chat messages")


def check_chat(request: GenerationRequest) -> None:
    """Raises InvalidRequest if a field of a chat is wrong."""
    messages = request.messages or ()
    check_num_messages(len(messages))
    for message in messages:
        _check_message(message)
    check_num_chat_parts(sum(map(_num_parts, messages)))
    for name, field in _RESERVED.items():
        if name in request.chat_template_kwargs:
            raise InvalidRequest("chat.chat_template_kwargs", f"{name} is set by {field}")
    _check_tools(request.tools)
    if request.continue_final_message:
        _check_continued(request, messages[-1])


def num_chat_chars(request: GenerationRequest) -> int:
    """Number of characters of the request's messages, tools and template variables."""
    num = sum(map(num_message_chars, request.messages or ()))
    for value in (*request.tools, request.chat_template_kwargs):
        num += len(json.dumps(value, ensure_ascii=False)) if value else 0
    return num


def text_size(value: Any, enough: int) -> int:
    """Characters of the texts in plain values, and one for each other value; stops at `enough`."""
    size, stack = 0, [value]
    while stack and size < enough:
        entry = stack.pop()
        size += len(entry) if isinstance(entry, str) else 1
        if isinstance(entry, Mapping):
            stack += [*entry.keys(), *entry.values()]
        elif isinstance(entry, list | tuple):
            stack += entry
    return size


def num_message_chars(message: Message) -> int:
    """Number of characters of the message that a template may render."""
    content, calls = message["content"], message.get("tool_calls", ())
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    texts += [message.get(name, "") for name in _OPTIONAL_TEXTS]
    return sum(map(len, texts)) + sum(len(call["function"]["arguments"]) for call in calls)


def content_text(message: Message) -> str:
    """The message's content as one text, its parts joined by newlines as for templates."""
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _num_parts(message: Message) -> int:
    content = message["content"]
    num = 0 if isinstance(content, str) else len(content)
    return num + len(message.get("tool_calls", ()))


def _check_message(message: Message) -> None:
    if not (isinstance(message.get("role"), str) and _ROLE.fullmatch(message["role"])):
        raise InvalidRequest(
            "chat.messages.role",
            "must be a word of letters, digits, _ and -, such as system, user or assistant; "
            f"at most {MAX_ROLE_CHARS} characters",
        )
    content = message.get("content")
    if not (isinstance(content, str) or (isinstance(content, list) and content)):
        raise InvalidRequest("chat.messages.content", "must be a text or a list of text parts")
    for part in () if isinstance(content, str) else content:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not (is_text and isinstance(part.get("text"), str)):
            raise InvalidRequest("chat.messages.parts", "only parts of type text are allowed")
    for name in _OPTIONAL_TEXTS:
        if not isinstance(message.get(name, ""), str):
            raise InvalidRequest(f"chat.messages.{name}", "must be a text")
    for call in message.get("tool_calls", ()):
        _check_tool_call(call)


def _check_tool_call(call: Any) -> None:
    field = "chat.messages.tool_calls"
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        raise InvalidRequest(field, "must have a function with name and arguments, as JSON text")
    _check_name(field, function.get("name"))
    try:
        is_object = isinstance(json.loads(function["arguments"] or "{}"), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise InvalidRequest(field, f"the arguments of {function['name']} are not a JSON object")


def _check_tools(tools: tuple[Mapping[str, Any], ...]) -> None:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest("chat.tools", f"{len(tools)} tools; at most {MAX_TOOLS}")
    for tool in tools:
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            why = 'must have the form {"type": "function", "function": {"name": ...}}'
            raise InvalidRequest("chat.tools", why)
        _check_name("chat.tools", function.get("name"))


def _check_name(field: str, name: Any) -> None:
    if not (isinstance(name, str) and name):
        raise InvalidRequest(field, "a function needs a name")


def _check_continued(request: GenerationRequest, last: Message) -> None:
    if request.add_generation_prompt:
        raise InvalidRequest(
            "chat.add_generation_prompt", "not with continue_final_message; leave one of them unset"
        )
    if "tool_calls" in last or not content_text(last):
        raise InvalidRequest(
            "chat.continue_final_message", "the last message has no content to continue"
        )
