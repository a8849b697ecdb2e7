"""What one caller uses, against what its key allows: streams at a time, tokens a minute.

Tokens are counted as they come, by a bucket that holds a minute's worth: who has used it up is
refused the next call until enough has flowed back, and what runs is never cut. So a call may go
beyond, and the next ones wait for it: over time the rate holds. Owns the counting alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from outrider.errors import CapacityExceeded
from outrider.security.keys import KeyLimits

# A stream that ends now lets the next one in; nobody knows which will.
_STREAM_RETRY_S = 1.0


class Quota:
    """Of one caller. Lives on the event loop."""

    def __init__(
        self, name: str, limits: KeyLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.limits = limits
        self.num_streams = 0
        # Spent since the start, for `orchestrator.admission.shared_quota`.
        self.num_spent = 0
        self._clock = clock
        self._spent = 0.0
        self._at = clock()

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """For the time of one call. Raises CapacityExceeded with a hint when to come back."""
        most, per_minute = self.limits.streams, self.limits.tokens_per_minute
        if most is not None and self.num_streams >= most:
            raise streams_exceeded(self.name, most)
        if per_minute is not None:
            over = self._still_spent(per_minute) + 1 - per_minute  # room for a token, at least
            if over > 0:
                raise tokens_exceeded(self.name, per_minute, over * 60 / per_minute)
        self.num_streams += 1
        try:
            yield
        finally:
            self.num_streams -= 1

    def spend(self, num_tokens: int) -> None:
        """Of the prompt, and of the output as it is shown."""
        if self.limits.tokens_per_minute is not None:
            self._spent = self._still_spent(self.limits.tokens_per_minute) + num_tokens
            self.num_spent += num_tokens

    def _still_spent(self, per_minute: int) -> float:
        """Of the tokens spent, those that have not flowed back yet."""
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
