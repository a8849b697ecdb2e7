"""Distributions of prompt and output lengths in tokens, parsed from a flag. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from outrider.errors import ConfigError

_FORMS = "128, uniform:64:256, lognormal:MEDIAN:SIGMA or lognormal:MEDIAN:SIGMA:MOST"


class Shape(Enum):
    """Kind of a length distribution."""

    FIXED = "fixed"
    UNIFORM = "uniform"
    LOGNORMAL = "lognormal"


@dataclass(frozen=True)
class Lengths:
    """Distribution of lengths. `least` and `most` bound every shape; `median` and `sigma`:
    lognormal.
    """

    shape: Shape
    least: int
    most: int
    median: float = 0.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str, flag: str) -> Lengths:
        """Parses `128`, `uniform:64:256`, `lognormal:128:0.8[:2048]`. Raises ConfigError."""
        kind, *parts = text.split(":")
        try:
            if not parts:
                return cls._checked(Shape.FIXED, int(kind), int(kind))
            if kind == Shape.UNIFORM.value and len(parts) == 2:
                return cls._checked(Shape.UNIFORM, int(parts[0]), int(parts[1]))
            if kind == Shape.LOGNORMAL.value and len(parts) in (2, 3):
                median, sigma = float(parts[0]), float(parts[1])
                # Without a bound one sample in a million could exceed any context.
                most = int(parts[2]) if len(parts) == 3 else round(16 * median)
                return cls._checked(Shape.LOGNORMAL, 1, most, median, sigma)
        except (ValueError, OverflowError):
            pass
        raise ConfigError(f"{flag}: {text!r} is not a length; allowed: {_FORMS}")

    @classmethod
    def _checked(
        cls, shape: Shape, least: int, most: int, median: float = 0.0, sigma: float = 0.0
    ) -> Lengths:
        is_lognormal = shape is Shape.LOGNORMAL
        if not 1 <= least <= most or (is_lognormal and not (1 <= median <= most and sigma >= 0)):
            raise ValueError(f"{least} to {most}")
        return cls(shape, least, most, median, sigma)

    def draw(self, num: int, generator: np.random.Generator) -> list[int]:
        """Samples `num` lengths."""
        if self.shape is Shape.FIXED:
            return [self.least] * num
        if self.shape is Shape.UNIFORM:
            return [int(n) for n in generator.integers(self.least, self.most + 1, num)]
        drawn = np.rint(generator.lognormal(np.log(self.median), self.sigma, num))
        return [int(n) for n in np.clip(drawn, self.least, self.most)]
