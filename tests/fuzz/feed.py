"""What to send next: honest conversations, spoilt ones, and frames out of nothing.

Owns the mixture. Sends nothing and knows no service but by its dialect. Seeded.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message

from tests.fuzz.corpus import Dialect
from tests.fuzz.mutation import Mutator

_WEIGHTS = {
    "honest": 20,
    "mutated": 40,
    "out of order": 6,
    "generated": 22,
    "mangled": 8,
    "garbage": 2,
    "absurd": 1,
}


@dataclass(frozen=True)
class Frame:
    """`message` is what the bytes mean; None: nothing."""

    kind: str
    data: bytes
    message: Message | None


class Feed:
    """Endless; conversations are taken apart into frames."""

    def __init__(self, dialect: Dialect, chance: random.Random) -> None:
        self._dialect = dialect
        self._chance = chance
        self._mutator = Mutator(chance)
        self._frames: deque[Frame] = deque()

    def next(self) -> Frame:
        while not self._frames:
            (kind,) = self._chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
            self._frames.extend(self._conversation(kind))
        return self._frames.popleft()

    def _conversation(self, kind: str) -> list[Frame]:
        match kind:
            case "generated":
                return [_framed(kind, self._mutator.generate(self._dialect.request))]
            case "garbage":
                return [self._read(kind, self._mutator.garbage())]
            case "absurd":
                return [_framed(kind, self._dialect.absurd(self._chance))]
        script = [_framed(kind, message) for message in self._dialect.script(self._chance)]
        if kind == "out of order":
            return self._chance.choices(script, k=len(script))
        if kind == "honest":
            return script
        return [self._spoilt(frame) if self._chance.random() < 0.5 else frame for frame in script]

    def _spoilt(self, frame: Frame) -> Frame:
        assert frame.message is not None, "of a script"
        if frame.kind == "mutated":
            return _framed(frame.kind, self._mutator.mutate(frame.message))
        return self._read(frame.kind, self._mutator.mangle(frame.data))

    def _read(self, kind: str, data: bytes) -> Frame:
        try:
            return Frame(kind, data, self._dialect.request.FromString(data))
        except DecodeError:
            return Frame(kind, data, None)


def _framed(kind: str, message: Any) -> Frame:
    return Frame(kind, message.SerializeToString(), message)
