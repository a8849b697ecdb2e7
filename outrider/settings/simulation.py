"""Specification of a simulated model: cost of its forward passes, acceptance of its drafts.

Parsed from one line: `step_ms=25,row_ms=0.5,survival=0.8/0.75`. `outrider.engine.simulated` runs
it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

from outrider.errors import ConfigError
from outrider.replica import CostReport

_DRAFT_ONLY = ("survival", "ranks")
_MAX_TIME_MS = 60_000
_MAX_SURVIVAL = 64
# With the draft token itself: the candidates per sample (`outrider.engine.interface`).
_MAX_RANKS = 7


@dataclass(frozen=True)
class Simulation:
    """Simulated model.

    `step_ms`: (tokens, milliseconds of a pass) points with rising tokens; one point holds for any
    number of tokens. `row_ms`: milliseconds added by each sequence beyond the first. `vocab_size`
    and `seed` determine the target's output; both tiers must have the same. `survival`: probability
    that draft token k is accepted if those before it were; the last value holds for later tokens.
    `ranks`: where it is rejected, the probability that the target emits the draft's second, third …
    candidate. `fails_after_s`: seconds since the start after which every pass raises, as on a
    broken device. `name`: the model's name, which tells simulated targets apart. `texts`: JSON
    file with lists of token ids; a context that begins like one of them is continued as there. Both
    tiers must have the same file.
    """

    step_ms: tuple[tuple[int, float], ...] = ((1, 10.0),)
    row_ms: float = 0.0
    vocab_size: int = 32_000
    context_len: int = 131_072
    seed: int = 0
    survival: tuple[float, ...] = (0.8,)
    ranks: tuple[float, ...] = (0.5, 0.2, 0.1)
    fails_after_s: float = math.inf
    name: str = "simulated"
    texts: str = ""

    @classmethod
    def parse(cls, text: str, *, is_draft: bool = True) -> Simulation:
        """Parses KEY=VALUE pairs. Raises ConfigError with the key and the allowed values."""
        names = [f.name for f in fields(cls) if is_draft or f.name not in _DRAFT_ONLY]
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, separator, value = part.partition("=")
            if name not in names or not separator:
                raise ConfigError(f"simulate: {part!r}; expected KEY=VALUE of {', '.join(names)}")
            if name in values:
                raise ConfigError(f"simulate: {name}: is given twice")
            parse, allowed = _VALUES[name]
            try:
                values[name] = parse(value)
            except ValueError:
                raise ConfigError(
                    f"simulate: {name}: {value!r} is invalid; must be {allowed}"
                ) from None
        return cls(**values)

    def __str__(self) -> str:
        """The line that `parse` reads as this value; keys with their default are left out.

        `step_ms` is always there.
        """
        values = {name: getattr(self, name) for name in _VALUES}
        changed = (
            name
            for name, value in values.items()
            if name == "step_ms" or value != getattr(Simulation, name)
        )
        return ",".join(f"{name}={_written(values[name])}" for name in changed)

    @property
    def costs(self) -> CostReport:
        """The costs as a replica reports them, in seconds."""
        tokens, times_ms = zip(*self.step_ms, strict=True)
        return CostReport(tokens, tuple(ms / 1000 for ms in times_ms), self.row_ms / 1000)


def _written(value: Any) -> str:
    if not isinstance(value, tuple):
        return value if isinstance(value, str) else repr(value)
    points = (point if isinstance(point, tuple) else (point,) for point in value)
    return "/".join(":".join(map(repr, point)) for point in points)


def _steps(text: str) -> tuple[tuple[int, float], ...]:
    if ":" not in text:
        return ((1, _time_ms(text)),)
    points = []
    for part in text.split("/"):
        tokens, _, ms = part.partition(":")
        points.append((_at_least(1, tokens), _time_ms(ms)))
    if any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError("the numbers of tokens must rise")
    return tuple(points)


def _time_ms(text: str) -> float:
    value = float(text)
    if not 0 <= value <= _MAX_TIME_MS:
        raise ValueError(text)
    return value


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise ValueError(text)
    return text


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise ValueError(text)
    return value


def _vocab_size(text: str) -> int:
    if not 16 <= int(text) <= 1 << 24:
        raise ValueError(text)
    return int(text)


def _probabilities(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split("/"))
    if len(values) > _MAX_SURVIVAL or not all(0 <= value <= 1 for value in values):
        raise ValueError(text)
    return values


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise ValueError(text)
    return value


def _ranks(text: str) -> tuple[float, ...]:
    values = _probabilities(text)
    if len(values) > _MAX_RANKS or sum(values) > 1 + 1e-9:
        raise ValueError(text)
    return values


class _Value(NamedTuple):
    """Parser of a key's value; it raises ValueError for what is not `allowed`."""

    parse: Callable[[str], Any]
    allowed: str


_VALUES: dict[str, _Value] = {
    "step_ms": _Value(
        _steps,
        f"0 to {_MAX_TIME_MS} milliseconds, or TOKENS:MS/TOKENS:MS with rising numbers of tokens",
    ),
    "row_ms": _Value(_time_ms, f"0 to {_MAX_TIME_MS} milliseconds"),
    "vocab_size": _Value(_vocab_size, f"16 to {1 << 24}"),
    "context_len": _Value(lambda text: _at_least(16, text), "16 or more"),
    "seed": _Value(int, "an integer"),
    "texts": _Value(str, "a path without commas"),
    "name": _Value(_name, "1 to 64 of letters, digits and ._-"),
    "survival": _Value(
        _probabilities, f"1 to {_MAX_SURVIVAL} probabilities in [0, 1], as in 0.8/0.75"
    ),
    "fails_after_s": _Value(_seconds, "0 or more seconds"),
    "ranks": _Value(
        _ranks, f"1 to {_MAX_RANKS} probabilities, at most 1 in sum, as in 0.5/0.2/0.1"
    ),
}
