"""Traces: recorded requests, read into conversations.

`formats` reads the file. This module turns its fields into requests or rejects them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from outrider.errors import ConfigError
from outrider_bench.loadtest.formats import MAX_TEXT, Format, rows
from outrider_bench.loadtest.plan import BLOCK_TOKENS, Conversation, Job

_MOST_PRIORITY = 2**31 - 1


class _Entry(NamedTuple):
    at_s: float
    job: Job
    session_id: str


class Trace(NamedTuple):
    """`num_left_out`: number of failed requests, which have no output."""

    conversations: list[Conversation]
    num_left_out: int


def read_trace(
    path: Path, *, name: str | None = None, speed: float = 1.0, num_requests: int | None = None
) -> Trace:
    """Reads a trace, in order of the first requests. Times start at 0 and are divided by `speed`.

    `name`: of the format; None: detected. `num_requests`: read only the first ones. In our own
    format times are seconds (with `speed` 1000, milliseconds), and the lines of one `session_id`
    are the turns of a session. Raises ConfigError with file, line and field.
    """
    if not speed > 0:
        raise ConfigError(f"--trace-speed: {speed:g}; must be positive")
    entries: list[_Entry] = []
    num_left_out = 0
    has_times = True
    for where, row, kind in rows(path, name):
        if num_requests is not None and len(entries) >= num_requests:
            break
        has_times = kind.has_times
        fields = _Fields(row, kind, where)
        if kind.skips_failures and not fields.number("output_length"):
            num_left_out += 1
        else:
            entries.append(_entry(fields, len(entries)))
    if not entries:
        raise ConfigError(f"--trace: {path}: has no requests")
    if num_requests is not None and len(entries) < num_requests:
        raise ConfigError(f"--requests: {path} has only {len(entries)}")
    if not has_times:
        return Trace([Conversation((entry.job,)) for entry in entries], num_left_out)
    entries.sort(key=lambda entry: entry.at_s)
    first = entries[0].at_s
    timed = [entry._replace(at_s=(entry.at_s - first) / speed) for entry in entries]
    return Trace(_conversations(timed), num_left_out)


def _conversations(entries: list[_Entry]) -> list[Conversation]:
    groups: dict[str, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.session_id or f"\0{entry.job.index}", []).append(entry)
    return [
        Conversation(
            jobs=tuple(replace(entry.job, not_before_s=entry.at_s) for entry in group),
            at_s=group[0].at_s,
            is_session=bool(group[0].session_id),
        )
        for group in groups.values()
    ]


class _Fields:
    """Fields of one request by our names. Errors use the file's names."""

    def __init__(self, row: Mapping[str, Any], kind: Format, where: str) -> None:
        self._kind = kind
        self._where = where
        fields = {name: value for name, value in row.items() if value not in (None, "")}
        known = [*kind.names.values(), *kind.others]
        for name in fields:
            if name is None:
                raise self.line_error("more fields than the first line names")
            if name not in known:
                raise self.line_error(f"{name!r}; expected {', '.join(known)}")
        self._values = {
            ours: fields[theirs] for ours, theirs in kind.names.items() if theirs in fields
        }

    def line_error(self, why: str) -> ConfigError:
        return ConfigError(f"--trace: {self._where}: {why}")

    def field_error(self, name: str, why: str) -> ConfigError:
        return self.line_error(f"{self._kind.names[name]}: {why}")

    def has_field(self, name: str) -> bool:
        """Whether the format has this field."""
        return name in self._kind.names

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Any:
        """None if missing."""
        return self._values.get(name)

    def number(self, name: str) -> float:
        """Value of a numeric field. Raises ConfigError."""
        return self._converted(name, float, "not a number")

    def seconds(self) -> float:
        """Value of the time field in seconds. Raises ConfigError."""
        return self._converted("timestamp", self._kind.to_seconds, "not a number or time")

    def _converted(self, name: str, convert: Any, why: str) -> float:
        if name not in self._values:
            raise self.line_error(f"{self._kind.names[name]} is missing")
        value = self._values[name]
        try:
            number = float(convert(value))
            if math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        raise self.field_error(name, f"{str(value)[:60]!r} is {why}")

    def length(self, name: str) -> int:
        """Value of a field that is a number of tokens. Raises ConfigError."""
        value = self.number(name)
        if value < 1 or value != int(value):
            raise self.field_error(name, f"{value:g} is not a positive number of tokens")
        return int(value)


def _entry(fields: _Fields, index: int) -> _Entry:
    text = fields.get("text")
    if text is not None and not (isinstance(text, str) and _is_sendable(text)):
        raise fields.field_error("text", f"{str(text)[:60]!r} is not a text")
    if fields.has_field("text") and (text is None) == ("input_length" not in fields):
        raise fields.line_error("needs either text or input_length")
    at_s = fields.seconds()
    job = Job(
        index=index,
        prompt_len=0 if text is not None else fields.length("input_length"),
        max_tokens=fields.length("output_length"),
        text=text,
        priority=_priority(fields) if "priority" in fields else None,
        block_ids=_block_ids(fields),
    )
    return _Entry(at_s, job, str(fields.get("session_id") or ""))


def _block_ids(fields: _Fields) -> tuple[int, ...]:
    blocks = fields.get("block_ids")
    if blocks is None:
        return ()
    if not isinstance(blocks, list) or not all(type(b) is int and b >= 0 for b in blocks):
        raise fields.field_error(
            "block_ids", f"{str(blocks)[:60]} is not a list of integers from 0"
        )
    needed = math.ceil(fields.length("input_length") / BLOCK_TOKENS)
    if len(blocks) < needed:
        raise fields.field_error(
            "block_ids", f"{len(blocks)} blocks of {BLOCK_TOKENS} tokens; {needed} needed"
        )
    return tuple(blocks)


def _priority(fields: _Fields) -> int:
    value = fields.number("priority")
    if not abs(value) <= _MOST_PRIORITY or value != int(value):
        raise fields.field_error("priority", f"{value:g} is not a 32-bit integer")
    return int(value)


def _is_sendable(text: str) -> bool:
    """Whether the text fits and is valid UTF-8; JSON may contain half of a surrogate pair."""
    if len(text) > MAX_TEXT:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
