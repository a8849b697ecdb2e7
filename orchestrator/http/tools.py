"""Tool calls of chats: the format that makes the model call a tool, and its text as OpenAI's calls.

`required` and a named function are formats of the whole answer. `auto` leaves the model the choice:
only what follows `<tool_call>` has a format, for models whose chat template writes calls so
(Qwen, Hermes and others).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.http.bodies import ChatBody
from outrider.errors import InvalidRequest
from outrider.sampling.structured_outputs import StructuredOutputs
from outrider.tokenizer import Tokenizer

_BEGIN, _END = "<tool_call>", "</tool_call>"
_AUTO, _REQUIRED = "auto", "required"
_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class ToolUse:
    """How an answer may call tools. `choice`: auto, required, or the name of a function."""

    choice: str
    is_named: bool
    functions: Mapping[str, Mapping[str, Any]]
    is_parallel: bool = True

    def format(self) -> StructuredOutputs:
        """Format of the answer."""
        if self.is_named:
            return StructuredOutputs(json=json.dumps(_arguments(self.functions[self.choice])))
        if self.choice == _REQUIRED:
            return StructuredOutputs(json=json.dumps(self._calls_schema()))
        tags = [
            {
                "begin": f'{_BEGIN}\n{{"name": {json.dumps(name)}, "arguments": ',
                "schema": _arguments(function),
                "end": f"}}\n{_END}",
            }
            for name, function in self.functions.items()
        ]
        return StructuredOutputs(
            structural_tag=json.dumps({"structures": tags, "triggers": [_BEGIN]})
        )

    def _calls_schema(self) -> dict[str, Any]:
        """JSON schema of a list of calls, as vLLM's."""
        definitions: dict[str, Any] = {}
        calls = []
        for name, function in self.functions.items():
            schema = dict(_arguments(function))
            definitions |= schema.pop("$defs", {})  # references are to the root
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": name}, "parameters": schema},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
            )
        size = {} if self.is_parallel else {"maxItems": 1}
        whole = {"type": "array", "minItems": 1, **size, "items": {"anyOf": calls}}
        return {**whole, "$defs": definitions} if definitions else whole


def tool_use(body: ChatBody, tokenizer: Tokenizer | None) -> ToolUse | None:
    """How the answer may call tools; None: it may not. Raises InvalidRequest."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", _AUTO):
            raise InvalidRequest("tool_choice", "needs tools")
        return None
    if choice == "none":
        return None
    functions = _functions(body.tools)
    is_parallel = body.parallel_tool_calls is not False
    if isinstance(choice, dict):
        return ToolUse(_named(choice, functions), True, functions, is_parallel)
    use = ToolUse(choice or _AUTO, False, functions, is_parallel)
    if use.choice == _AUTO:
        if not is_parallel:
            raise InvalidRequest("parallel_tool_calls", "false only with tool_choice required")
        if tokenizer is None or not _writes_tags(tokenizer, body.tools):
            raise InvalidRequest(
                "tool_choice",
                f"auto: the model's chat template does not write calls in {_BEGIN}; "
                "none, required or a function",
            )
    return use


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    functions: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            why = 'must have the form {"type": "function", "function": {"name": ...}}'
            raise InvalidRequest("tools", why)
        if not (isinstance(function.get("name"), str) and function["name"]):
            raise InvalidRequest("tools", "a function needs a name")
        if not isinstance(function.get("parameters") or {}, dict):
            raise InvalidRequest("tools", "parameters must be a JSON schema")
        functions[function["name"]] = function
    return functions


def _named(choice: Mapping[str, Any], functions: Mapping[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise InvalidRequest(
            "tool_choice", 'must be {"type": "function", "function": {"name": ...}} or a word'
        )
    if name not in functions:
        raise InvalidRequest("tool_choice", f"{name!r} is not one of the tools")
    return name


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return function.get("parameters") or _ANY_ARGUMENTS


def _writes_tags(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the chat template writes calls in tags."""
    function = {"name": "f", "arguments": "{}"}
    call = {"id": "call", "type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        return _BEGIN in tokenizer.render_chat(messages, tools=tuple(tools))
    except InvalidRequest:
        return False


@dataclass(frozen=True)
class Said:
    """New content and calls of an answer; `is_call`: it ends as an answer that calls tools."""

    content: str
    calls: Sequence[Mapping[str, Any]] = ()
    is_call: bool = False


class ToolCalls:
    """Tool calls in the text of one choice."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        # Text that is not reported yet.
        self._text = ""
        self._has_begun = False

    def push(self, text: str, *, is_end: bool) -> Said:
        """Adds text; returns what is new.

        Calls other than of a named function are reported at the end of the answer, whole. A list
        of calls that was cut off is content.
        """
        if self._use.is_named:
            return Said("", [self._argument_part(text)] if text else [])
        self._text += text
        if self._use.choice == _REQUIRED:
            return self._required() if is_end else Said("")
        return self._auto(is_end=is_end)

    def _argument_part(self, text: str) -> Mapping[str, Any]:
        if self._has_begun:
            return {"index": 0, "function": {"arguments": text}}
        self._has_begun = True
        return _call(0, self._use.choice, text)

    def _required(self) -> Said:
        try:
            calls = json.loads(self._text)
        except ValueError:
            return Said(self._text)
        return Said("", _calls((call["name"], call["parameters"]) for call in calls), True)

    def _auto(self, *, is_end: bool) -> Said:
        head, tag, rest = self._text.partition(_BEGIN)
        if not is_end:
            if tag:
                self._text = tag + rest
                return Said(head)
            num_kept = _num_held_back(head)
            self._text = head[len(head) - num_kept :]
            return Said(head[: len(head) - num_kept])
        found, content = [], [head]
        while tag:
            inner, end, rest = rest.partition(_END)
            try:
                call = json.loads(inner) if end else None
            except ValueError:
                call = None
            if call is None:  # cut off
                content.append(tag + inner + end)
            else:
                found.append((call["name"], call["arguments"]))
            between, tag, rest = rest.partition(_BEGIN)
            content.append(between if between.strip() else "")
        return Said("".join(content), _calls(found), bool(found))


def _num_held_back(text: str) -> int:
    """Number of characters at the end that may begin a call."""
    most = min(len(text), len(_BEGIN) - 1)
    return next((num for num in range(most, 0, -1) if text.endswith(_BEGIN[:num])), 0)


def _calls(found: Any) -> list[Mapping[str, Any]]:
    return [
        _call(index, name, json.dumps(arguments, ensure_ascii=False))
        for index, (name, arguments) in enumerate(found)
    ]


def _call(index: int, name: str, arguments: str) -> Mapping[str, Any]:
    function = {"name": name, "arguments": arguments}
    call_id = f"call_{secrets.token_hex(12)}"
    return {"index": index, "id": call_id, "type": "function", "function": function}
