"""Latency SLO such as `ttft=200ms,tpot=30ms,e2e=2s`, and whether a request met it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.errors import ConfigError
from outrider_bench.loadtest.records import Record

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Slo:
    """Limits in seconds; None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @classmethod
    def parse(cls, text: str, flag: str = "--slo") -> Slo:
        """Raises ConfigError with the flag."""
        limits: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in ("ttft", "tpot", "e2e"):
                raise ConfigError(f"{flag}: {part!r} is unknown; allowed: ttft=, tpot=, e2e=")
            if f"{name}_s" in limits:
                raise ConfigError(f"{flag}: {name}: is given twice")
            limits[f"{name}_s"] = _seconds(value, f"{flag}: {name}")
        return cls(**limits)

    def __bool__(self) -> bool:
        return any(limit is not None for limit in vars(self).values())

    def is_met(self, record: Record) -> bool:
        """Whether the request met all limits.

        Rejected, failed and cut requests did not. With a single token there is no time per token.
        """
        if not record.is_ok:
            return False
        return all(
            (value := getattr(record, name)) is None or value <= limit
            for name, limit in vars(self).items()
            if limit is not None
        )


def _seconds(text: str, what: str) -> float:
    number = text.rstrip("smu")
    try:
        seconds = float(number) * _UNITS_S[text[len(number) :]]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{what}: {text!r} is not a positive time such as 200ms or 2s")
    return seconds
