"""Quota of one API key at this orchestrator: concurrent streams, and tokens per minute.

Tokens are charged as they are processed, to a bucket that holds one minute's worth. A client that
has used up its bucket is refused its next request until enough has flowed back; running requests
are never cut off. So a request may exceed the rate, and the next ones wait for it. The count over
all orchestrators is in `orchestrator.admission.shared_quota`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from outrider.errors import CapacityExceeded
from outrider.security.keys import KeyLimits

# Retry hint when all streams are in use. When one of them will end is unknown.
_STREAM_RETRY_S = 1.0


class Quota:
    """Usage of one API key. Used on the event loop only. `name`: of the key; `clock`: seconds."""

    def __init__(
        self, name: str, limits: KeyLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.limits = limits
        self.num_streams = 0
        # Tokens charged since the start, for `orchestrator.admission.shared_quota`.
        self.num_spent = 0
        self._clock = clock
        # Tokens in use of the bucket, at `_at`.
        self._spent = 0.0
        self._at = clock()

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Counts a stream for the block. Raises CapacityExceeded with a retry hint."""
        most, per_minute = self.limits.streams, self.limits.tokens_per_minute
        if most is not None and self.num_streams >= most:
            raise streams_exceeded(self.name, most)
        if per_minute is not None:
            over = self._still_spent(per_minute) + 1 - per_minute  # at least one token must fit
            if over > 0:
                raise tokens_exceeded(self.name, per_minute, over * 60 / per_minute)
        self.num_streams += 1
        try:
            yield
        finally:
            self.num_streams -= 1

    def spend(self, num_tokens: int) -> None:
        """Charges tokens of a prompt, or of an output when they are sent."""
        if self.limits.tokens_per_minute is not None:
            self._spent = self._still_spent(self.limits.tokens_per_minute) + num_tokens
            self.num_spent += num_tokens

    def _still_spent(self, per_minute: int) -> float:
        """Charged tokens that have not flowed back yet."""
        now = self._clock()
        self._spent = max(0.0, self._spent - (now - self._at) * per_minute / 60)
        self._at = now
        return self._spent


def streams_exceeded(name: str, most: int) -> CapacityExceeded:
    return CapacityExceeded(
        f"key {name}: {most} streams are open, the most allowed", _STREAM_RETRY_S
    )


def tokens_exceeded(name: str, per_minute: int, retry_after_s: float) -> CapacityExceeded:
    return CapacityExceeded(f"key {name}: more than {per_minute} tokens a minute", retry_after_s)
