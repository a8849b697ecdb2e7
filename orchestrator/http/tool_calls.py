"""Tool calls in the text of an answer, as OpenAI's calls."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.http.tools import BEGIN, END, REQUIRED, ToolUse

# A call up to its arguments, which are reported as the model writes them.
_CALL_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
_CALL_END, _SEPARATOR = re.compile(r"\s*\}\s*"), re.compile(r"\s*[\[,\]]")


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
        if self._use.choice == REQUIRED:
            return self._required() if is_end else Said("")
        return self._json(is_end=is_end) if self._use.is_json else self._auto(is_end=is_end)

    def _argument_part(self, text: str) -> Mapping[str, Any]:
        if self._has_begun:
            return {"index": 0, "function": {"arguments": text}}
        self._has_begun = True
        return _openai_call(0, self._use.choice, text)

    def _required(self) -> Said:
        found, at = [], 0
        try:
            calls = json.loads(self._text)
        except ValueError:
            return Said(self._text)
        while (separator := _SEPARATOR.match(self._text, at)) is not None:
            if (call := _read_call(self._text, separator.end())) is None:
                break
            found.append(call)
            at = call.end
        if not isinstance(calls, list) or not found or len(found) != len(calls):
            return Said(self._text)  # written in another way: nothing of it is dropped
        return Said("", self._reported(found), True)

    def _json(self, *, is_end: bool) -> Said:
        """The whole answer is one call if it begins with `{`."""
        if self._text.startswith("{") and not self._has_begun:
            if not is_end:
                return Said("")
            call = _read_call(self._text, 0)
            if call is not None and call.end == len(self._text):
                return Said("", self._reported([call]), True)
        text, self._text = self._text, ""
        self._has_begun |= bool(text)
        return Said(text)

    def _auto(self, *, is_end: bool) -> Said:
        content, found = [], []
        while True:
            head, begin, rest = self._text.partition(BEGIN)
            is_whole = bool(begin) or is_end
            num_kept = 0 if is_whole else _num_held_back(head)
            text, kept = head[: len(head) - num_kept], head[len(head) - num_kept :]
            if self._is_after_call and not text.strip():
                kept = kept if is_whole else head
            elif text:
                content.append(text)
                self._is_after_call = False
            self._text = kept + begin + rest
            if not begin or (call := self._next_call(rest)) is None:
                break
            found.append(call)
            self._text, self._is_after_call = rest[call.end :], True
        if is_end:
            content.append(self._text)  # a call that was cut off
        return Said("".join(content), self._reported(found), is_end and self._num_calls > 0)

    def _next_call(self, text: str) -> _WrittenCall | None:
        """The call at the beginning of the text, behind its opening tag; None: it has no end yet.

        Its arguments may contain the closing tag.
        """
        while (at := text.find(END, self._num_searched)) >= 0:
            self._num_searched = at + len(END)
            call = _read_call(text[:at], 0)
            if call is not None and call.end == at:
                self._num_searched = 0
                return _WrittenCall(call.name, call.arguments, at + len(END))
        self._num_searched = max(self._num_searched, len(text) - len(END) + 1)
        return None

    def _reported(self, found: Iterable[_WrittenCall]) -> list[Mapping[str, Any]]:
        first = self._num_calls
        calls = [_openai_call(i, call.name, call.arguments) for i, call in enumerate(found, first)]
        self._num_calls += len(calls)
        return calls


@dataclass(frozen=True)
class _WrittenCall:
    """A call in a text. `arguments`: as they are written; `end`: where the text goes on."""

    name: str
    arguments: str
    end: int


def _read_call(text: str, at: int) -> _WrittenCall | None:
    """The call that begins at this place; None: there is none, or not all of it."""
    begin = _CALL_HEAD.match(text, at)
    if begin is None:
        return None
    try:
        _, end = json.JSONDecoder().raw_decode(text, begin.end())
    except ValueError:
        return None
    closing = _CALL_END.match(text, end)
    if closing is None:
        return None
    return _WrittenCall(json.loads(begin[1]), text[begin.end() : end], closing.end())


def _num_held_back(text: str) -> int:
    """Number of characters at the end that may begin a call."""
    most = min(len(text), len(BEGIN) - 1)
    return next((num for num in range(most, 0, -1) if text.endswith(BEGIN[:num])), 0)


def _openai_call(index: int, name: str, arguments: str) -> Mapping[str, Any]:
    function = {"name": name, "arguments": arguments}
    call_id = f"call_{secrets.token_hex(12)}"
    return {"index": index, "id": call_id, "type": "function", "function": function}
