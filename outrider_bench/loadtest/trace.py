"""Requests as they once came: a trace, read into visits. Sends nothing.

`outrider_bench.loadtest.formats` reads the file; here its fields become requests, or are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from outrider.errors import ConfigError
from outrider_bench.loadtest.formats import MAX_TEXT, Format, rows
from outrider_bench.loadtest.plan import BLOCK_TOKENS, Job, Visit

_MOST_PRIORITY = 2**31 - 1


class _Entry(NamedTuple):
    at_s: float
    job: Job
    session_id: str


class Trace(NamedTuple):
    """`num_left_out`: requests without output, which had failed."""

    visits: list[Visit]
    num_left_out: int


def read_trace(
    path: Path, *, name: str | None = None, speed: float = 1.0, num_requests: int | None = None
) -> Trace:
    """In the order of their first requests; times from the first one on, divided by `speed`.

    `name`: of the format; None: found by its fields. `num_requests`: the first so many only. In our
    own format times are seconds (`speed` 1000 makes them milliseconds), and the lines of one
    `session_id` are the turns of a session. Raises ConfigError that names file, line and field.
    """
    if not speed > 0:
        raise ConfigError(f"--trace-speed: {speed:g}: above 0")
    entries: list[_Entry] = []
    num_left_out = 0
    has_times = True
    for where, fields, kind in rows(path, name):
        if num_requests is not None and len(entries) >= num_requests:
            break
        has_times = kind.has_times
        given = _Given(fields, kind, where)
        if kind.skips_failures and not given.number("output_length"):
            num_left_out += 1
        else:
            entries.append(_entry(given, len(entries)))
    if not entries:
        raise ConfigError(f"--trace: {path}: no requests in it")
    if num_requests is not None and len(entries) < num_requests:
        raise ConfigError(f"--requests: {path} has only {len(entries)}")
    if not has_times:
        return Trace([Visit((entry.job,)) for entry in entries], num_left_out)
    entries.sort(key=lambda entry: entry.at_s)
    first = entries[0].at_s
    timed = [entry._replace(at_s=(entry.at_s - first) / speed) for entry in entries]
    return Trace(_visits(timed), num_left_out)


def _visits(entries: list[_Entry]) -> list[Visit]:
    groups: dict[str, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.session_id or f"\0{entry.job.index}", []).append(entry)
    return [
        Visit(
            jobs=tuple(replace(entry.job, not_before_s=entry.at_s) for entry in group),
            at_s=group[0].at_s,
            is_session=bool(group[0].session_id),
        )
        for group in groups.values()
    ]


class _Given:
    """A request's fields by our names; errors have the file's."""

    def __init__(self, fields: Mapping[str, Any], kind: Format, where: str) -> None:
        self._kind = kind
        self._where = where
        given = {name: value for name, value in fields.items() if value not in (None, "")}
        known = [*kind.names.values(), *kind.others]
        for name in given:
            if name is None:
                raise self.refused("more fields than the first line names")
            if name not in known:
                raise self.refused(f"{name!r}; expected {', '.join(known)}")
        self._given = {
            ours: given[theirs] for ours, theirs in kind.names.items() if theirs in given
        }

    def refused(self, why: str) -> ConfigError:
        return ConfigError(f"--trace: {self._where}: {why}")

    def wrong(self, name: str, why: str) -> ConfigError:
        return self.refused(f"{self._kind.names[name]}: {why}")

    def may_have(self, name: str) -> bool:
        """Whether the format has this field."""
        return name in self._kind.names

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def get(self, name: str) -> Any:
        """None where it is not given."""
        return self._given.get(name)

    def number(self, name: str) -> float:
        """Of any field but a time. Raises ConfigError."""
        return self._converted(name, float, "no number")

    def seconds(self) -> float:
        """Raises ConfigError."""
        return self._converted("timestamp", self._kind.to_seconds, "no number and no time")

    def _converted(self, name: str, convert: Any, why: str) -> float:
        if name not in self._given:
            raise self.refused(f"{self._kind.names[name]} is missing")
        value = self._given[name]
        try:
            number = float(convert(value))
            if math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        raise self.wrong(name, f"{str(value)[:60]!r} is {why}")

    def length(self, name: str) -> int:
        """A number of tokens. Raises ConfigError."""
        value = self.number(name)
        if value < 1 or value != int(value):
            raise self.wrong(name, f"{value:g} is no number of tokens")
        return int(value)


def _entry(given: _Given, index: int) -> _Entry:
    text = given.get("text")
    if text is not None and not (isinstance(text, str) and _is_sendable(text)):
        raise given.wrong("text", f"{str(text)[:60]!r} is no text")
    if given.may_have("text") and (text is None) == ("input_length" not in given):
        raise given.refused("needs either text or input_length")
    at_s = given.seconds()
    job = Job(
        index=index,
        prompt_len=0 if text is not None else given.length("input_length"),
        max_tokens=given.length("output_length"),
        text=text,
        priority=_priority(given) if "priority" in given else None,
        block_ids=_block_ids(given),
    )
    return _Entry(at_s, job, str(given.get("session_id") or ""))


def _block_ids(given: _Given) -> tuple[int, ...]:
    blocks = given.get("block_ids")
    if blocks is None:
        return ()
    if not isinstance(blocks, list) or not all(type(b) is int and b >= 0 for b in blocks):
        raise given.wrong("block_ids", f"{str(blocks)[:60]} is no list of whole numbers from 0 on")
    needed = math.ceil(given.length("input_length") / BLOCK_TOKENS)
    if len(blocks) < needed:
        raise given.wrong(
            "block_ids", f"{len(blocks)} blocks of {BLOCK_TOKENS} tokens; {needed} needed"
        )
    return tuple(blocks)


def _priority(given: _Given) -> int:
    value = given.number("priority")
    if not abs(value) <= _MOST_PRIORITY or value != int(value):
        raise given.wrong("priority", f"{value:g} is no whole number of 32 bits")
    return int(value)


def _is_sendable(text: str) -> bool:
    """Half of a surrogate pair, which JSON may hold, is no UTF-8."""
    if len(text) > MAX_TEXT:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
