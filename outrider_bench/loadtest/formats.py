"""Published formats of request traces: names of fields and units of time.

Pure except for reading files. `trace` turns the fields into requests.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError

# Longest text that the orchestrator accepts, in characters.
MAX_TEXT = 4_000_000
# Characters per token of English text, if only the text of an answer is known.
_CHARS_PER_TOKEN = 4
FIELDS = ("timestamp", "input_length", "output_length", "text", "session_id", "priority")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """`names`: the file's name of each of our fields. `others`: ignored fields.

    `has_times` False: the load needs a rate. `skips_failures`: a request without output had failed.
    `to_seconds` raises ValueError.
    """

    names: Mapping[str, str]
    others: frozenset[str] = frozenset()
    has_times: bool = True
    skips_failures: bool = False
    to_seconds: Callable[[Any], float] = float

    def fits(self, fields: Row) -> bool:
        """Whether the fields are those of this format."""
        required = {self.names[name] for name in ("timestamp", "output_length")}
        return required <= fields.keys()


def _milliseconds(value: Any) -> float:
    return float(value) / 1000


def _datetime(value: Any) -> float:
    """Seconds of `2023-11-16 18:15:46.6805900`.

    Seven fractional digits, which `datetime.fromisoformat` may reject.
    """
    whole, point, rest = str(value).strip().partition(".")
    num_digits = len(rest) - len(rest.lstrip("0123456789"))
    fraction, zone = rest[:num_digits], rest[num_digits:]
    if point and not fraction:
        raise ValueError(value)
    moment = datetime.fromisoformat(whole + zone)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)


OUTRIDER = "outrider"
# By name of --trace-format.
FORMATS: dict[str, Format] = {
    OUTRIDER: Format(dict(zip(FIELDS, FIELDS, strict=True))),
    # github.com/kvcache-ai/Mooncake: JSONL, milliseconds, shared blocks of 512 tokens.
    "mooncake": Format(
        {
            "timestamp": "timestamp",
            "input_length": "input_length",
            "output_length": "output_length",
            "block_ids": "hash_ids",
        },
        to_seconds=_milliseconds,
    ),
    # github.com/Azure/AzurePublicDataset: CSV of 2023 and 2024.
    "azure": Format(
        {
            "timestamp": "TIMESTAMP",
            "input_length": "ContextTokens",
            "output_length": "GeneratedTokens",
        },
        skips_failures=True,
        to_seconds=_datetime,
    ),
    # github.com/HPMLL/BurstGPT: CSV, seconds. Prompts of its sessions include the earlier turns.
    "burstgpt": Format(
        {
            "timestamp": "Timestamp",
            "input_length": "Request tokens",
            "output_length": "Response tokens",
        },
        others=frozenset(("Model", "Total tokens", "Log Type", "Session ID", "Elapsed time")),
        skips_failures=True,
    ),
    # First question and answer of each conversation, as in other load tests; JSON, no times.
    "sharegpt": Format(
        {"timestamp": "timestamp", "text": "text", "output_length": "output_length"},
        has_times=False,
    ),
}


def rows(path: Path, name: str | None) -> Iterator[tuple[str, Row, Format]]:
    """Yields for each request its place, its fields and the format (named, or detected from them).

    Raises ConfigError.
    """
    if name is not None and name not in FORMATS:
        raise ConfigError(f"--trace-format: {name!r} is unknown; allowed: {', '.join(FORMATS)}")
    found: Format | None = None
    try:
        # utf-8-sig: spreadsheets write a byte order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            if name == "sharegpt" or (name is None and start == "[" and path.suffix == ".json"):
                yield from _conversations(file.read(), path)
                return
            read = _table(file, path) if path.suffix == ".csv" else _lines(file, path)
            for where, fields in read:
                found = found or (FORMATS[name] if name else _format_of(fields))
                yield where, fields, found
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--trace: {path}: {error}") from error


def _format_of(fields: Row) -> Format:
    """Format of the fields; ours if no other fits: its errors name what is missing."""
    if "hash_ids" in fields:
        return FORMATS["mooncake"]
    for name in ("azure", "burstgpt"):
        if FORMATS[name].fits(fields):
            return FORMATS[name]
    return FORMATS[OUTRIDER]


def _table(file: Any, path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(MAX_TEXT)
    reader = csv.DictReader(file, skipinitialspace=True)
    for fields in reader:
        yield f"{path}: line {reader.line_num}", fields


def _lines(file: Any, path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"{path}: line {number}", _object(line, f"{path}: line {number}")


def _object(line: str, where: str) -> Row:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"--trace: {where}: {line[:60].strip()!r} is not a JSON object")
    return fields


def _conversations(text: str, path: Path) -> Iterator[tuple[str, Row, Format]]:
    """Yields those that begin with a question and its answer; others have no request."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--trace: {path}: is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ConfigError(f"--trace: {path}: is not a JSON list of conversations")
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: conversation {number}"
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ConfigError(f"--trace: {where}: conversations is not a list of turns")
        if len(turns) < 2 or turns[0].get("from") not in ("human", "user"):
            continue
        for index, turn in enumerate(turns[:2]):
            if not isinstance(turn.get("value"), str):
                raise ConfigError(f"--trace: {where}: conversations[{index}].value is not a text")
        question, answer = (turn["value"] for turn in turns[:2])
        if question.strip() and answer:
            length = max(1, round(len(answer) / _CHARS_PER_TOKEN))
            fields = {"timestamp": 0, "text": question, "output_length": length}
            yield where, fields, FORMATS["sharegpt"]
