"""Circuit breaker of one replica: after consecutive failures, new generations avoid it.

After a delay one generation tries the replica. A success closes the circuit, a failure doubles the
delay. The pool chooses the replicas. Runs on the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

log = structlog.get_logger()

# Consecutive failures that open the circuit.
MAX_FAILURES = 3
# Delay before a generation may try the replica; doubled up to the maximum.
FIRST_OPEN_S = 1.0
MAX_OPEN_S = 30.0


class CircuitBreaker:
    """Closed, open, or half-open: one generation may try the replica."""

    def __init__(
        self,
        tier: str,
        endpoint: str,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_change` is called when the circuit opens or closes. `clock` returns seconds."""
        self._log = log.bind(tier=tier, endpoint=endpoint)
        self._on_change = on_change
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Close the circuit: the replica is a new process."""
        self._num_failures = 0
        self._open_s = FIRST_OPEN_S
        # When a generation may try the replica; None while the circuit is closed.
        self._try_at: float | None = None
        self._is_tried = False

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open or half-open."""
        return self._try_at is not None

    @property
    def allows(self) -> bool:
        """Whether a new generation may use the replica now."""
        return self._try_at is None or self._clock() >= self._try_at

    def tried(self) -> None:
        """A generation was opened there. If the circuit is open, others wait for its outcome."""
        if self._try_at is not None:
            self._is_tried = True
            self._try_at = self._clock() + self._open_s

    def succeeded(self) -> None:
        """The replica sent a valid result or proposal."""
        was_open = self.is_open
        if self._num_failures:
            self.reset()
        if was_open:
            self._log.info("circuit_closed")
            self._on_change()

    def failed(self, why: str) -> None:
        """The replica failed a generation, by an error of its own."""
        self._num_failures += 1
        if self._try_at is None and self._num_failures >= MAX_FAILURES:
            self._try_at = self._clock() + self._open_s
            self._log.warning("circuit_opened", why=why)
            self._on_change()
        elif self._try_at is not None and self._is_tried:
            self._is_tried = False
            self._open_s = min(2 * self._open_s, MAX_OPEN_S)
            self._try_at = self._clock() + self._open_s
