"""Tool calls of chats: the format that makes the model call a tool, and its text as OpenAI's calls.

`required` and a named function are formats of the whole answer. `auto` leaves the model the choice:
only what follows `<tool_call>` has a format, for models whose chat template writes calls so
(Qwen, Hermes and others).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.http.bodies import ChatBody
from outrider.errors import InvalidRequest
from outrider.sampling.structured_outputs import StructuredOutputs
from outrider.tokenizer import Tokenizer

_BEGIN, _END = "<tool_call>", "</tool_call>"
_AUTO, _REQUIRED = "auto", "required"
_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}
# A call in an answer up to its arguments, which are reported as the model writes them.
_CALL = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
_CALL_END, _SEPARATOR = re.compile(r"\s*\}\s*"), re.compile(r"\s*[\[,\]]")
_WRITTEN_CALL = re.compile(re.escape(_BEGIN) + r"\s*\{")


@dataclass(frozen=True)
class ToolUse:
    """How an answer may call tools. `choice`: auto, required, or the name of a function.

    `is_parallel`: it may have several calls; otherwise it ends with the first.
    """

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
                "type": "tag",
                "begin": f'{_BEGIN}\n{{"name": {json.dumps(name)}, "arguments": ',
                "content": {"type": "json_schema", "json_schema": _arguments(function)},
                "end": f"}}\n{_END}",
            }
            for name, function in self.functions.items()
        ]
        calls: dict[str, Any] = {"type": "triggered_tags", "triggers": [_BEGIN], "tags": tags}
        if not self.is_parallel:
            calls["stop_after_first"] = True
        return StructuredOutputs(
            structural_tag=json.dumps({"type": "structural_tag", "format": calls})
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
    if use.choice == _AUTO and (tokenizer is None or not _writes_tags(tokenizer, body.tools)):
        raise InvalidRequest(
            "tool_choice",
            f"auto: the model's chat template does not write calls as JSON in {_BEGIN}; "
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
    """Whether the chat template writes calls in JSON in tags, which are text of the answer."""
    if _BEGIN in tokenizer.special_ids:
        return False
    function = {"name": "f", "arguments": "{}"}
    call = {"id": "call", "type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        text = tokenizer.render_chat(messages, tools=tuple(tools))
    except InvalidRequest:
        return False
    return _WRITTEN_CALL.search(text) is not None


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
        self._num_calls = 0
        # The last thing reported is a call: white space before another one is not content.
        self._is_after_call = False
        # Characters of an unfinished call that were searched for its end.
        self._num_searched = 0

    def push(self, text: str, *, is_end: bool) -> Said:
        """Adds text; returns what is new.

        Arguments of a named function are reported as they come, other calls whole; those of
        `required` at the end of the answer. What is cut off is content.
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
        found, at = [], 0
        try:
            json.loads(self._text)
        except ValueError:
            return Said(self._text)
        while (separator := _SEPARATOR.match(self._text, at)) is not None:
            if (call := _read_call(self._text, separator.end())) is None:
                break
            found.append(call)
            at = call.end
        return Said("", self._reported(found), True)

    def _auto(self, *, is_end: bool) -> Said:
        content, found = [], []
        while True:
            head, begin, rest = self._text.partition(_BEGIN)
            is_whole = bool(begin) or is_end
            num_kept = 0 if is_whole else _num_held_back(head)
            text, kept = head[: len(head) - num_kept], head[len(head) - num_kept :]
            if self._is_after_call and not text.strip():
                kept = kept if is_whole else head
            elif text:
                content.append(text)
                self._is_after_call = False
            self._text = kept + begin + rest
            if not begin or (call := self._call(rest)) is None:
                break
            found.append(call)
            self._text, self._is_after_call = rest[call.end :], True
        if is_end:
            content.append(self._text)  # a call that was cut off
        return Said("".join(content), self._reported(found), is_end and self._num_calls > 0)

    def _call(self, text: str) -> _Call | None:
        """The call at the beginning of the text, behind its opening tag; None: it has no end yet.

        Its arguments may contain the closing tag.
        """
        while (at := text.find(_END, self._num_searched)) >= 0:
            self._num_searched = at + len(_END)
            call = _read_call(text[:at], 0)
            if call is not None and call.end == at:
                self._num_searched = 0
                return _Call(call.name, call.arguments, at + len(_END))
        self._num_searched = max(self._num_searched, len(text) - len(_END) + 1)
        return None

    def _reported(self, found: Iterable[_Call]) -> list[Mapping[str, Any]]:
        first = self._num_calls
        calls = [_call(i, call.name, call.arguments) for i, call in enumerate(found, first)]
        self._num_calls += len(calls)
        return calls


@dataclass(frozen=True)
class _Call:
    """A call in a text. `arguments`: as they are written; `end`: where the text goes on."""

    name: str
    arguments: str
    end: int


def _read_call(text: str, at: int) -> _Call | None:
    """The call that begins at this place; None: there is none, or not all of it."""
    begin = _CALL.match(text, at)
    if begin is None:
        return None
    try:
        _, end = json.JSONDecoder().raw_decode(text, begin.end())
    except ValueError:
        return None
    closing = _CALL_END.match(text, end)
    if closing is None:
        return None
    return _Call(json.loads(begin[1]), text[begin.end() : end], closing.end())


def _num_held_back(text: str) -> int:
    """Number of characters at the end that may begin a call."""
    most = min(len(text), len(_BEGIN) - 1)
    return next((num for num in range(most, 0, -1) if text.endswith(_BEGIN[:num])), 0)


def _call(index: int, name: str, arguments: str) -> Mapping[str, Any]:
    function = {"name": name, "arguments": arguments}
    call_id = f"call_{secrets.token_hex(12)}"
    return {"index": index, "id": call_id, "type": "function", "function": function}
