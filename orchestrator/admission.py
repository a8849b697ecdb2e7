"""Who may run, who waits and who is sent away: one line for all callers, and it is short.

So many generations run at a time; so many more wait, the most urgent first, then whoever came
first; the rest are refused at once, with a hint when to come back. Whoever runs and lacks room for
keys and values stands before all who wait and are no more urgent: what becomes free is theirs.
Owns the order alone; knows no request, no tier and no clock but for its estimate. Lives on the
event loop.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager

from outrider.errors import CapacityExceeded, OutriderError, Unavailable

# Of the time that generations take, of which the estimate of a wait is made.
_SMOOTHING = 0.1
_LEAST_RETRY_S = 0.1
# Room is freed by other orchestrators' generations too, of which nothing is heard here.
_ROOM_RETRY_S = 0.2


class Place:
    """A generation's place in the order: a lower `priority` is served earlier, 0 is the usual."""

    def __init__(self, admission: Admission, priority: int, number: int) -> None:
        self.priority = priority
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._admission = admission
        self._order = (priority, number)

    def __lt__(self, other: Place) -> bool:
        return self._order < other._order

    def short_of_room(self, *, has_begun: bool) -> AbstractContextManager[None]:
        """For as long as it waits, running, for keys and values to fit somewhere.

        Raises CapacityExceeded where it has shown nothing yet and enough others wait; one that
        has is never sent away.
        """
        return self._admission.short_of_room(self, has_begun=has_begun)

    async def turn_for_room(self, *, at_once: bool) -> None:
        """While short of room: returns when it is the first to try, and trying is worth it.

        Not `at_once`: it has just tried; till something ends, or others may have made room.
        """
        if not at_once:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ROOM_RETRY_S):
                    await self._admission.change()
        while self._admission.first_short is not self:
            await self._admission.change()


class Admission:
    """At most `max_running` run and `max_waiting` wait."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._numbers = itertools.count()
        self._line: list[Place] = []
        self._short: list[Place] = []
        self._num_short_unbegun = 0
        self._mean_s = 0.0
        self._changed = asyncio.Event()
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        """In the line, and those that run and have no room yet."""
        return len(self._line) + self._num_short_unbegun

    @property
    def num_generating(self) -> int:
        """That run, but for those that wait for room before their first token."""
        return self.num_running - self._num_short_unbegun

    @contextlib.asynccontextmanager
    async def admitted(self, priority: int, patience_s: float | None) -> AsyncIterator[Place]:
        """Waits for its turn, then runs for the time of the block.

        Raises CapacityExceeded where the line is full of no less urgent ones, where a more urgent
        one takes its place in it, and where it is sure to outlast `patience_s` (the caller's
        deadline); Unavailable when the server stops.
        """
        place = Place(self, priority, next(self._numbers))
        if self._may_run(place):
            self.num_running += 1
        else:
            await self._wait(place, patience_s)
        began_at = time.monotonic()
        try:
            yield place
        finally:
            self._saw(time.monotonic() - began_at)
            self.num_running -= 1
            self._let_in()

    def close(self) -> None:
        """Nobody who waits is let in any more."""
        while self._line:
            self._dismiss(Unavailable("the orchestrator is stopping"))

    def _dismiss(self, error: OutriderError) -> None:
        """The last in the line."""
        turn = self._line.pop().turn
        if not turn.done():  # else its caller has left this very moment
            turn.set_exception(error)

    async def change(self) -> None:
        """Returns when a generation has ended or found room."""
        self._changed.clear()
        await self._changed.wait()

    def _may_run(self, place: Place) -> bool:
        ahead = [*self._short[:1], *self._line[:1]]
        return self.num_running < self._max_running and not any(other < place for other in ahead)

    async def _wait(self, place: Place, patience_s: float | None) -> None:
        self._check_patience(place, patience_s)
        if self.num_waiting >= self._max_waiting:
            if not self._line or self._line[-1] < place:
                raise self._refusal(f"{self.num_waiting} requests wait, the most allowed")
            self._dismiss(self._refusal("more urgent requests fill the line"))
        bisect.insort(self._line, place)
        try:
            await place.turn
        except asyncio.CancelledError:
            if place in self._line:
                self._line.remove(place)
            if not place.turn.cancelled() and place.turn.exception() is None:  # let in, and gone
                self.num_running -= 1
            self._let_in()
            raise

    def _check_patience(self, place: Place, patience_s: float | None) -> None:
        ahead = bisect.bisect(self._line, place)
        wait_s = self._mean_s * (ahead + 1) / self._max_running
        if patience_s is not None and wait_s > patience_s:
            raise self._refusal(
                f"about {wait_s:.1f} s to wait, more than the {patience_s:.1f} s that are left"
            )

    def _let_in(self) -> None:
        self._changed.set()
        while self._line and self._may_run(self._line[0]):
            turn = self._line.pop(0).turn
            if not turn.done():
                self.num_running += 1
                turn.set_result(None)

    def _refusal(self, why: str) -> CapacityExceeded:
        after_s = self._mean_s * (self.num_waiting + 1) / self._max_running
        return CapacityExceeded(why, max(_LEAST_RETRY_S, after_s))

    def _saw(self, seconds: float) -> None:
        share = _SMOOTHING if self._mean_s else 1.0
        self._mean_s += share * (seconds - self._mean_s)

    @property
    def first_short(self) -> Place | None:
        """Whose turn it is to try for room."""
        return self._short[0] if self._short else None

    @contextlib.contextmanager
    def short_of_room(self, place: Place, *, has_begun: bool) -> Iterator[None]:
        """As Place.short_of_room."""
        if not has_begun and self.num_waiting >= self._max_waiting:
            raise self._refusal(f"no room for keys and values, and {self.num_waiting} wait for it")
        bisect.insort(self._short, place)
        self._num_short_unbegun += not has_begun
        try:
            yield
        finally:
            self._short.remove(place)
            self._num_short_unbegun -= not has_begun
            self._let_in()
