"""Admission queue: bounds running and waiting generations and refuses the rest with a retry hint.

Requests wait in the order of priority, then arrival. A generation that runs and lacks room for keys
and values waits before all that are no more urgent. When the queue is full, a more urgent request
displaces the least urgent one that waits, for its turn or for room. Knows no request and no tier.
Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AbstractContextManager
from enum import Enum

from outrider.errors import CapacityExceeded, OutriderError, Unavailable

# The targets that have room, or may come to have it.
Rooms = Callable[[], Collection[str]]

# Of the time that generations take, of which the estimate of a wait is made.
_SMOOTHING = 0.1
_LEAST_RETRY_S = 0.1
# Room is freed by other orchestrators' generations too, of which nothing is heard here.
_ROOM_RETRY_S = 0.2


class Refusal(Enum):
    """Why admission refused a request; a label of a metric."""

    QUEUE_FULL = "queue_full"
    DISPLACED = "displaced"
    DEADLINE = "deadline"


class Place:
    """A generation's place in the order: a lower `priority` is served earlier, 0 is the usual.

    `asked`: the request's own priority, which orders its caller's requests of equal `priority`.
    """

    def __init__(
        self, admission: Admission, *, caller: str, priority: int, asked: int, number: int
    ) -> None:
        self.caller = caller
        self.priority = priority
        self.asked = asked
        self.number = number
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Set once a more urgent request took its place while it ran and had no room.
        self.displaced: CapacityExceeded | None = None
        # Where it could run while it is short of room.
        self.rooms: Rooms = frozenset
        self._asked_at = time.monotonic()
        self._admission = admission

    @property
    def age_s(self) -> float:
        """Since it came."""
        return time.monotonic() - self._asked_at

    def __lt__(self, other: Place) -> bool:
        return (self.priority, self.number) < (other.priority, other.number)

    def short_of_room(self, rooms: Rooms, *, has_begun: bool) -> AbstractContextManager[None]:
        """For as long as it waits, running, for keys and values to fit into one of `rooms`.

        Raises CapacityExceeded where it has shown nothing yet and as many others wait as may, none
        of them less urgent; one that has is never refused.
        """
        self.rooms = rooms
        return self._admission.short_of_room(self, has_begun=has_begun)

    async def turn_for_room(self, *, at_once: bool) -> frozenset[str]:
        """While short of room: the rooms that it is the first to try, once there is one.

        None at all where it has no rooms any more. Not `at_once`: it has just tried; till
        something ends, or others may have made room. Raises CapacityExceeded once a more urgent
        request has displaced it.
        """
        while True:
            if not at_once:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ROOM_RETRY_S):
                        await self._admission.change()
                self._admission.let_in()  # rooms may have come
            at_once = False
            if self.displaced is not None:
                raise self.displaced
            rooms = frozenset(self.rooms())
            unclaimed = rooms - self._admission.claimed_before(self)
            if unclaimed or not rooms:
                return unclaimed


class Admission:
    """At most `max_running` run and `max_waiting` wait.

    `rooms`: where generations run, the targets. Whoever is short of room claims those that it fits
    into; a later request may run where one is left unclaimed.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self.rooms: Rooms = frozenset
        self._numbers = itertools.count()
        self._line: list[Place] = []
        self._short: list[Place] = []
        # Those of `_short` that have shown nothing yet.
        self._unbegun: list[Place] = []
        self._mean_s = 0.0
        self._changed = asyncio.Event()
        self.num_running = 0
        self.refused = {reason.value: 0 for reason in Refusal}

    @property
    def num_waiting(self) -> int:
        """In the line, and those that run and have no room yet."""
        return len(self._line) + len(self._unbegun)

    @property
    def num_generating(self) -> int:
        """That run, but for those that wait for room before their first token."""
        return self.num_running - len(self._unbegun)

    @contextlib.asynccontextmanager
    async def admitted(
        self,
        priority: int,
        patience_s: float | None,
        *,
        caller: str = "",
        min_priority: int | None = None,
    ) -> AsyncIterator[Place]:
        """Waits for its turn, then runs for the time of the block.

        A priority below `min_priority` counts as that one, but for the order among the caller's
        own requests.

        Raises CapacityExceeded where as many wait as may, all no less urgent, where a more urgent
        one displaces it, and where it is sure to wait longer than `patience_s` (the caller's
        deadline); Unavailable when the server stops.
        """
        place = Place(
            self,
            caller=caller,
            priority=priority if min_priority is None else max(priority, min_priority),
            asked=priority,
            number=next(self._numbers),
        )
        self._order_own(place)
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

    def _order_own(self, place: Place) -> None:
        """A caller's waiting requests exchange their places, so that its more urgent ones go first.

        No other caller's request has more or fewer of them before it than by arrival alone.
        """
        if place.asked == place.priority:
            return
        own = [
            other
            for other in (*self._unbegun, *self._line)
            if (other.caller, other.priority) == (place.caller, place.priority)
        ]
        own.append(place)
        numbers = sorted(other.number for other in own)
        own.sort(key=lambda other: (other.asked, other.number))
        for other, number in zip(own, numbers, strict=True):
            other.number = number
        self._line.sort()
        self._short.sort()

    def close(self) -> None:
        """Nobody who waits is let in any more."""
        while self._line:
            self._dismiss(self._line[-1], Unavailable("the orchestrator is stopping"))

    def _dismiss(self, place: Place, error: OutriderError) -> None:
        """One in the line."""
        self._line.remove(place)
        if not place.turn.done():  # else its caller has left this very moment
            place.turn.set_exception(error)

    def _make_way(self, place: Place, what_for: str) -> None:
        """Where as many wait as may, displaces the least urgent of them.

        Raises CapacityExceeded where none is less urgent.
        """
        if self.num_waiting < self._max_waiting:
            return
        last = max((*self._line, *self._unbegun), default=place)
        if not place < last:
            raise self._refusal(
                Refusal.QUEUE_FULL, f"{self.num_waiting} requests wait{what_for}, the most allowed"
            )
        error = self._refusal(Refusal.DISPLACED, "more urgent requests fill the queue")
        if last in self._line:
            self._dismiss(last, error)
        else:
            last.displaced = error
            self._leave_short(last)
            self._changed.set()

    def _leave_short(self, place: Place) -> None:
        for places in (self._short, self._unbegun):
            if place in places:
                places.remove(place)

    async def change(self) -> None:
        """Returns when a generation has ended or found room."""
        self._changed.clear()
        await self._changed.wait()

    def _may_run(self, place: Place) -> bool:
        if self.num_running >= self._max_running or (self._line and self._line[0] < place):
            return False
        if not self._short or place < self._short[0]:
            return True
        return bool(frozenset(self.rooms()) - self.claimed_before(place))

    def claimed_before(self, place: Place) -> frozenset[str]:
        """The rooms that generations wait for that come before this one."""
        ahead = itertools.takewhile(lambda short: short < place, self._short)
        return frozenset().union(*(short.rooms() for short in ahead))

    async def _wait(self, place: Place, patience_s: float | None) -> None:
        self._check_patience(place, patience_s)
        self._make_way(place, "")
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
                Refusal.DEADLINE,
                f"about {wait_s:.1f} s to wait, more than the {patience_s:.1f} s that are left",
            )

    def _let_in(self) -> None:
        self._changed.set()
        self.let_in()

    def let_in(self) -> None:
        """Those of the line that may run now."""
        while self._line and self._may_run(self._line[0]):
            turn = self._line.pop(0).turn
            if not turn.done():
                self.num_running += 1
                turn.set_result(None)

    def _refusal(self, reason: Refusal, why: str) -> CapacityExceeded:
        """Counted: it is raised."""
        self.refused[reason.value] += 1
        after_s = self._mean_s * (self.num_waiting + 1) / self._max_running
        return CapacityExceeded(why, max(_LEAST_RETRY_S, after_s))

    def _saw(self, seconds: float) -> None:
        share = _SMOOTHING if self._mean_s else 1.0
        self._mean_s += share * (seconds - self._mean_s)

    @contextlib.contextmanager
    def short_of_room(self, place: Place, *, has_begun: bool) -> Iterator[None]:
        """As Place.short_of_room."""
        place.displaced = None  # of an earlier wait, which ended well all the same
        if not has_begun:
            self._make_way(place, " and there is no room for keys and values")
            self._unbegun.append(place)
        bisect.insort(self._short, place)
        try:
            yield
        finally:
            self._leave_short(place)
            self._let_in()
