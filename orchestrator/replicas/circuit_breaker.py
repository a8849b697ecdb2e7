"""Circuit breaker of one replica: after consecutive failures, new generations go elsewhere.

After a time one generation tries it again: a success closes the circuit, a failure keeps it open
for longer. Chooses no replica: the pool asks. Lives on the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

log = structlog.get_logger()

MAX_FAILURES = 3
FIRST_OPEN_S = 1.0
MAX_OPEN_S = 30.0


class CircuitBreaker:
    """Closed; open; or half-open, when one generation may try the replica."""

    def __init__(
        self,
        tier: str,
        endpoint: str,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_change` is called when the circuit opens or closes. `clock`: seconds."""
        self._log = log.bind(tier=tier, endpoint=endpoint)
        self._on_change = on_change
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Closed: the replica is another process now."""
        self._num_failures = 0
        self._open_s = FIRST_OPEN_S
        # When a generation may try it; None while the circuit is closed.
        self._try_at: float | None = None
        self._is_tried = False

    @property
    def is_open(self) -> bool:
        """Open or half-open."""
        return self._try_at is not None

    @property
    def allows(self) -> bool:
        """Whether a generation should go there now."""
        return self._try_at is None or self._clock() >= self._try_at

    def tried(self) -> None:
        """A generation goes there. While the circuit is open, the next waits for its outcome."""
        if self._try_at is not None:
            self._is_tried = True
            self._try_at = self._clock() + self._open_s

    def succeeded(self) -> None:
        """The replica has answered a generation."""
        was_open = self.is_open
        if self._num_failures:
            self.reset()
        if was_open:
            self._log.info("circuit_closed")
            self._on_change()

    def failed(self, why: str) -> None:
        """The replica has failed a generation through no fault of the generation's."""
        self._num_failures += 1
        if self._try_at is None and self._num_failures >= MAX_FAILURES:
            self._try_at = self._clock() + self._open_s
            self._log.warning("circuit_opened", why=why)
            self._on_change()
        elif self._try_at is not None and self._is_tried:
            self._is_tried = False
            self._open_s = min(2 * self._open_s, MAX_OPEN_S)
            self._try_at = self._clock() + self._open_s
