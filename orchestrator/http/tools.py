"""Tool calls of chats: the format that makes the model call a tool.

`required` and a named function are formats of the whole answer. `auto` leaves the model the choice,
as its chat template writes calls: what follows `<tool_call>` has a format (Qwen, Hermes), or an
answer that begins with `{` (Llama 3). `orchestrator.http.tool_calls` reads the answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.http.bodies import ChatBody
from outrider.errors import InvalidRequest
from outrider.sampling.structured_outputs import StructuredOutputs
from outrider.tokenizer import Tokenizer

BEGIN, END = "<tool_call>", "</tool_call>"
_AUTO, REQUIRED = "auto", "required"
_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}
_WRITTEN_TAG = re.compile(re.escape(BEGIN) + r"\s*\{")
_WRITTEN_JSON = re.compile(r'\{\s*"name"\s*:\s*"f"\s*,\s*"parameters"\s*:')
# An answer that is no call in JSON.
_NO_CALL = r"([^{](?s:.*))?"


@dataclass(frozen=True)
class ToolUse:
    """How an answer may call tools. `choice`: auto, required, or the name of a function.

    `is_parallel`: it may have several calls; otherwise it ends with the first. `is_json`: with
    auto, a call is the whole answer, without tags.
    """

    choice: str
    is_named: bool
    functions: Mapping[str, Mapping[str, Any]]
    is_parallel: bool = True
    is_json: bool = False

    def format(self) -> StructuredOutputs:
        """Format of the answer."""
        if self.is_named:
            return StructuredOutputs(json=json.dumps(_arguments(self.functions[self.choice])))
        if self.choice == REQUIRED:
            return StructuredOutputs(json=json.dumps(self._calls_schema()))
        form = self._call_or_text() if self.is_json else self._tags_in_text()
        whole = {"type": "structural_tag", "format": form}
        return StructuredOutputs(structural_tag=json.dumps(whole))

    def _tags_in_text(self) -> dict[str, Any]:
        tags = self._tags(f'{BEGIN}\n{{"name": %s, "arguments": ', f"}}\n{END}")
        calls: dict[str, Any] = {"type": "triggered_tags", "triggers": [BEGIN], "tags": tags}
        return calls if self.is_parallel else {**calls, "stop_after_first": True}

    def _call_or_text(self) -> dict[str, Any]:
        calls = self._tags('{"name": %s, "parameters": ', "}")
        return {"type": "or", "elements": [*calls, {"type": "regex", "pattern": _NO_CALL}]}

    def _tags(self, begin: str, end: str) -> list[dict[str, Any]]:
        """A tag for each function; `begin` has a place for its name."""
        return [
            {
                "type": "tag",
                "begin": begin % json.dumps(name),
                "content": {"type": "json_schema", "json_schema": _arguments(function)},
                "end": end,
            }
            for name, function in self.functions.items()
        ]

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
    if use.choice != _AUTO:
        return use
    text = "" if tokenizer is None else _written_call(tokenizer, body.tools)
    if _WRITTEN_TAG.search(text):
        return use
    if BEGIN not in text and _WRITTEN_JSON.search(text):
        return replace(use, is_json=True)
    raise InvalidRequest(
        "tool_choice",
        f"auto: the model's chat template does not write calls as JSON, alone or in {BEGIN}; "
        "none, required or a function",
    )


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


def _written_call(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> str:
    """A call as the chat template writes it, with text around it; empty if it cannot."""
    if BEGIN in tokenizer.special_ids:  # it is not text of an answer
        return ""
    function = {"name": "f", "arguments": "{}"}
    call = {"id": "call", "type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        return tokenizer.render_chat(messages, tools=tuple(tools))
    except InvalidRequest:
        return ""
