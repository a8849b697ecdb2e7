"""Requests as they once came: a trace in JSONL or CSV, read into visits. Sends nothing.

A line is one request; its fields are named in `_FIELDS`, and no others are taken.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from outrider.errors import ConfigError
from outrider.loadtest.plan import Job, Visit

_FIELDS = ("timestamp", "input_length", "output_length", "text", "session_id", "priority")


# As the orchestrator takes it: characters.
_MAX_TEXT = 4_000_000
_MOST_PRIORITY = 2**31 - 1


class _Entry(NamedTuple):
    at_s: float
    job: Job
    session_id: str


def read_trace(path: Path, *, speed: float = 1.0, num_requests: int | None = None) -> list[Visit]:
    """In the order of their first requests; times from the first one on, divided by `speed`.

    `timestamp` (seconds; 1000 for `speed` makes them milliseconds), `output_length`, and
    `input_length` or `text`; where a `session_id` stands, its lines are the turns of one session.
    `num_requests`: the first so many only. Raises ConfigError that names file and line.
    """
    if not speed > 0:
        raise ConfigError(f"--trace-speed: {speed:g}: above 0")
    entries: list[_Entry] = []
    for number, fields in enumerate(_rows(path)):
        if num_requests is not None and number >= num_requests:
            break
        entries.append(_entry(fields, number, f"{path}: request {number + 1}"))
    if not entries:
        raise ConfigError(f"--trace: {path}: no requests in it")
    if num_requests is not None and len(entries) < num_requests:
        raise ConfigError(f"--requests: {path} has only {len(entries)}")
    entries.sort(key=lambda entry: entry.at_s)
    first = entries[0].at_s
    return _visits([entry._replace(at_s=(entry.at_s - first) / speed) for entry in entries])


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


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        # With the mark that spreadsheets put before the first name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                csv.field_size_limit(_MAX_TEXT)
                yield from csv.DictReader(file)
                return
            for line in file:
                if line.strip():
                    yield _object(line, path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--trace: {path}: {error}") from error


def _object(line: str, path: Path) -> Mapping[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"--trace: {path}: {line[:60].strip()!r} is no JSON object")
    return fields


def _entry(fields: Mapping[str, Any], index: int, where: str) -> _Entry:
    given = {name: value for name, value in fields.items() if value not in (None, "")}
    for name in given:
        if name is None:
            raise ConfigError(f"--trace: {where}: more fields than the first line names")
        if name not in _FIELDS:
            raise ConfigError(f"--trace: {where}: {name!r}; expected {', '.join(_FIELDS)}")
    text = given.get("text")
    if text is not None and not (isinstance(text, str) and _is_sendable(text)):
        raise ConfigError(f"--trace: {where}: text: {str(text)[:60]!r} is no text")
    if (text is None) == ("input_length" not in given):
        raise ConfigError(f"--trace: {where}: needs either text or input_length")
    at_s = _number(given, "timestamp", where)
    job = Job(
        index=index,
        prompt_len=0 if text is not None else _length(given, "input_length", where),
        max_tokens=_length(given, "output_length", where),
        text=text,
        priority=_priority(given, where) if "priority" in given else None,
    )
    return _Entry(at_s, job, str(given.get("session_id", "")))


def _length(given: Mapping[str, Any], name: str, where: str) -> int:
    value = _number(given, name, where)
    if value < 1 or value != int(value):
        raise ConfigError(f"--trace: {where}: {name}: {value:g} is no number of tokens")
    return int(value)


def _priority(given: Mapping[str, Any], where: str) -> int:
    value = _number(given, "priority", where)
    if not abs(value) <= _MOST_PRIORITY or value != int(value):
        raise ConfigError(f"--trace: {where}: priority: {value:g} is no whole number of 32 bits")
    return int(value)


def _is_sendable(text: str) -> bool:
    """Half of a surrogate pair, which JSON may hold, is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(given: Mapping[str, Any], name: str, where: str) -> float:
    try:
        value = float(given[name])
        if math.isfinite(value):
            return value
    except KeyError:
        raise ConfigError(f"--trace: {where}: {name} is missing") from None
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"--trace: {where}: {name}: {str(given[name])[:60]!r} is no number")
