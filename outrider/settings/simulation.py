"""What a simulated tier is told: what its passes cost and how often draft and target agree.

Plain settings, read from one line: `step_ms=25,row_ms=0.5,survival=0.8/0.75`. Knows no torch and
no service; `outrider.engine.simulated` carries it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

from outrider.errors import ConfigError
from outrider.replica import CostReport

_DRAFT_ONLY = ("survival", "ranks")
_MAX_TIME_MS = 60_000
_MAX_SURVIVAL = 64
# With the draft token itself, as many as a draw tells of (`outrider.engine.interface`).
_MAX_RANKS = 7


@dataclass(frozen=True)
class Simulation:
    """`step_ms`: milliseconds of a pass by its tokens, rising points, or one for any number.

    `row_ms` is added by each sequence beyond the first. `vocab_size` and `seed` make the truth, the
    same on both tiers. `survival`: chance that draft token k is what the target emits, if those
    before it were; the last goes on. `ranks`: where it is not, the chance that the draft's second,
    third … choice is. `fails_after_s`: every pass raises
    from then on, as those of a broken device do; seconds since the start.
    """

    step_ms: tuple[tuple[int, float], ...] = ((1, 10.0),)
    row_ms: float = 0.0
    vocab_size: int = 32_000
    context_len: int = 131_072
    seed: int = 0
    survival: tuple[float, ...] = (0.8,)
    ranks: tuple[float, ...] = (0.5, 0.2, 0.1)
    fails_after_s: float = math.inf

    @classmethod
    def parse(cls, text: str, *, is_draft: bool = True) -> Simulation:
        """Raises ConfigError that names the key, and what is allowed."""
        names = [f.name for f in fields(cls) if is_draft or f.name not in _DRAFT_ONLY]
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, separator, value = part.partition("=")
            if name not in names or not separator:
                raise ConfigError(f"simulate: {part!r}; expected KEY=VALUE of {', '.join(names)}")
            if name in values:
                raise ConfigError(f"simulate: {name}: stands twice")
            parse, allowed = _VALUES[name]
            try:
                values[name] = parse(value)
            except ValueError:
                raise ConfigError(f"simulate: {name}: {value!r} is not {allowed}") from None
        return cls(**values)

    def __str__(self) -> str:
        """What `parse` reads as the same; of the defaults only the step time is said."""
        told = {name: getattr(self, name) for name in _VALUES}
        changed = (
            name for name in told if name == "step_ms" or told[name] != getattr(Simulation, name)
        )
        return ",".join(f"{name}={_written(told[name])}" for name in changed)

    @property
    def costs(self) -> CostReport:
        tokens, times_ms = zip(*self.step_ms, strict=True)
        return CostReport(tokens, tuple(ms / 1000 for ms in times_ms), self.row_ms / 1000)


def _written(value: Any) -> str:
    if not isinstance(value, tuple):
        return repr(value)
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
        raise ValueError("numbers of tokens must rise")
    return tuple(points)


def _time_ms(text: str) -> float:
    value = float(text)
    if not 0 <= value <= _MAX_TIME_MS:
        raise ValueError(text)
    return value


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise ValueError(text)
    return value


def _vocab_size(text: str) -> int:
    if not 16 <= int(text) <= 1 << 24:
        raise ValueError(text)
    return int(text)


def _chances(text: str) -> tuple[float, ...]:
    chances = tuple(float(part) for part in text.split("/"))
    if len(chances) > _MAX_SURVIVAL or not all(0 <= chance <= 1 for chance in chances):
        raise ValueError(text)
    return chances


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise ValueError(text)
    return value


def _ranks(text: str) -> tuple[float, ...]:
    chances = _chances(text)
    if len(chances) > _MAX_RANKS or sum(chances) > 1 + 1e-9:
        raise ValueError(text)
    return chances


class _Value(NamedTuple):
    """`parse` raises ValueError for what is not `allowed`."""

    parse: Callable[[str], Any]
    allowed: str


_VALUES: dict[str, _Value] = {
    "step_ms": _Value(
        _steps,
        f"0 to {_MAX_TIME_MS} milliseconds, nor TOKENS:MS/TOKENS:MS with rising numbers of tokens",
    ),
    "row_ms": _Value(_time_ms, f"0 to {_MAX_TIME_MS} milliseconds"),
    "vocab_size": _Value(_vocab_size, f"16 to {1 << 24}"),
    "context_len": _Value(lambda text: _at_least(16, text), "16 or more"),
    "seed": _Value(int, "an integer"),
    "survival": _Value(_chances, f"1 to {_MAX_SURVIVAL} chances in [0, 1], as in 0.8/0.75"),
    "fails_after_s": _Value(_seconds, "0 or more seconds"),
    "ranks": _Value(_ranks, f"1 to {_MAX_RANKS} chances, at most 1 in sum, as in 0.5/0.2/0.1"),
}
