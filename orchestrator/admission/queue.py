"""Admission queue: bounds running and queued generations and rejects the rest with a retry hint.

Requests are admitted in the order of priority, then arrival. A running generation whose KV fits no
target for now waits for room; it goes before every request of equal or lower urgency. When the
queue is full, a more urgent request displaces the least urgent one that is queued or waits for
room. Lives on the event loop. Quotas of API keys are in `orchestrator.admission.quota`.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from enum import Enum

from orchestrator.admission.ticket import AdmissionTicket, Rooms, of_same_client, renumber
from outrider.errors import CapacityExceeded, OutriderError, Unavailable

# Weight of the newest generation in the mean duration, from which waits are estimated.
_SMOOTHING = 0.1
_LEAST_RETRY_S = 0.1


class Rejection(Enum):
    """Why admission rejected a request; a label of a metric."""

    QUEUE_FULL = "queue_full"
    DISPLACED = "displaced"
    DEADLINE = "deadline"


class AdmissionQueue:
    """Admits at most `max_running` generations and queues at most `max_waiting`.

    `rooms`: all targets. A generation that waits for room claims the targets that it fits into. A
    later request is admitted while a target is unclaimed.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self.rooms: Rooms = frozenset
        self._numbers = itertools.count()
        self._queue: list[AdmissionTicket] = []
        # Running generations that wait for room; of these, the ones that have sent no token yet.
        self._short: list[AdmissionTicket] = []
        self._unbegun: list[AdmissionTicket] = []
        self._mean_s = 0.0
        self._changed = asyncio.Event()
        self.num_running = 0
        self.rejected = {reason.value: 0 for reason in Rejection}

    @property
    def num_waiting(self) -> int:
        """Queued requests, and running ones that wait for room before their first token."""
        return len(self._queue) + len(self._unbegun)

    @property
    def num_generating(self) -> int:
        """Running generations without those that wait for room before their first token."""
        return self.num_running - len(self._unbegun)

    @contextlib.asynccontextmanager
    async def admitted(
        self,
        priority: int,
        patience_s: float | None,
        *,
        client: str = "",
        min_priority: int | None = None,
    ) -> AsyncIterator[AdmissionTicket]:
        """Waits until the request is admitted, then counts it as running for the block.

        A priority below `min_priority` counts as `min_priority`. Among requests of the same
        `client` it still decides the order. `patience_s`: time left until the client's deadline.

        Raises CapacityExceeded when the queue is full and nothing in it is less urgent, when a more
        urgent request displaces this one, and when the estimated wait exceeds `patience_s`. Raises
        Unavailable when the server stops.
        """
        place = AdmissionTicket(
            self,
            client=client,
            priority=priority if min_priority is None else max(priority, min_priority),
            asked=priority,
            number=next(self._numbers),
        )
        self._overtake_own(place)
        if self._may_run(place):
            self.num_running += 1
        else:
            await self._wait(place, patience_s)
        began_at = time.monotonic()
        try:
            yield place
        finally:
            self._observe_duration(time.monotonic() - began_at)
            self.num_running -= 1
            self._capacity_freed()

    def _overtake_own(self, place: AdmissionTicket) -> None:
        """Exchanges numbers among the waiting requests of one caller: the most urgent goes first.

        The caller's requests together keep the same numbers, so nobody else is overtaken.
        """
        if place.asked != place.priority:
            own = [*self._waiting_of_same_client(place), place]
            self._renumber(own, (other.number for other in own))

    def _undo_overtaking(self, place: AdmissionTicket) -> None:
        """Gives the number that a leaving request took back to its caller's other requests."""
        if place.number < place.arrived:
            own = self._waiting_of_same_client(place)
            numbers = {place.number, *(other.number for other in own)} - {place.arrived}
            if len(numbers) == len(own):  # otherwise the one that had `arrived` has left
                self._renumber(own, numbers)

    def _waiting_of_same_client(self, place: AdmissionTicket) -> list[AdmissionTicket]:
        return of_same_client((*self._unbegun, *self._queue), place)

    def _renumber(self, places: list[AdmissionTicket], numbers: Iterable[int]) -> None:
        renumber(places, numbers)
        self._queue.sort()
        self._short.sort()

    def close(self) -> None:
        """Rejects every queued request: the server is stopping."""
        while self._queue:
            self._reject_queued(self._queue[-1], Unavailable("the orchestrator is stopping"))

    def _reject_queued(self, place: AdmissionTicket, error: OutriderError) -> None:
        self._queue.remove(place)
        if not place.turn.done():  # otherwise its client has cancelled at this very moment
            place.turn.set_exception(error)

    def _reserve_slot(self, place: AdmissionTicket, what_for: str) -> None:
        """When the queue is full, displaces its least urgent request.

        Raises CapacityExceeded when none is less urgent than `place`.
        """
        if self.num_waiting < self._max_waiting:
            return
        last = max((*self._queue, *self._unbegun), default=place)
        if not place < last:
            raise self._rejection(
                Rejection.QUEUE_FULL,
                f"{self.num_waiting} requests wait{what_for}, the most allowed",
            )
        error = self._rejection(Rejection.DISPLACED, "more urgent requests fill the queue")
        if last in self._queue:
            self._reject_queued(last, error)
        else:
            last.displaced = error
            self._leave_short(last)
            self._changed.set()

    def _leave_short(self, place: AdmissionTicket) -> None:
        for places in (self._short, self._unbegun):
            if place in places:
                places.remove(place)

    async def change(self) -> None:
        """Returns when a generation has ended or found room."""
        self._changed.clear()
        await self._changed.wait()

    def _may_run(self, place: AdmissionTicket) -> bool:
        if self.num_running >= self._max_running or (self._queue and self._queue[0] < place):
            return False
        if not self._short or place < self._short[0]:
            return True
        return bool(frozenset(self.rooms()) - self.claimed_before(place))

    def claimed_before(self, place: AdmissionTicket) -> frozenset[str]:
        """Targets claimed by generations that wait for room and go before `place`."""
        ahead = itertools.takewhile(lambda short: short < place, self._short)
        return frozenset().union(*(short.rooms() for short in ahead))

    async def _wait(self, place: AdmissionTicket, patience_s: float | None) -> None:
        try:
            self._check_patience(place, patience_s)
            self._reserve_slot(place, "")
        except CapacityExceeded:
            self._undo_overtaking(place)
            raise
        bisect.insort(self._queue, place)
        try:
            await place.turn
        except asyncio.CancelledError:
            if place in self._queue:
                self._queue.remove(place)
            self._undo_overtaking(place)
            # Admitted, and cancelled before it ran.
            if not place.turn.cancelled() and place.turn.exception() is None:
                self.num_running -= 1
            self._capacity_freed()
            raise

    def _check_patience(self, place: AdmissionTicket, patience_s: float | None) -> None:
        num_ahead = bisect.bisect(self._queue, place)
        wait_s = self._mean_s * (num_ahead + 1) / self._max_running
        if patience_s is not None and wait_s > patience_s:
            raise self._rejection(
                Rejection.DEADLINE,
                f"about {wait_s:.1f} s to wait, more than the {patience_s:.1f} s that are left",
            )

    def _capacity_freed(self) -> None:
        """Wakes the generations that wait for room, then admits from the queue."""
        self._changed.set()
        self.admit_queued()

    def admit_queued(self) -> None:
        """Admits requests from the head of the queue as long as they may run."""
        while self._queue and self._may_run(self._queue[0]):
            turn = self._queue.pop(0).turn
            if not turn.done():
                self.num_running += 1
                turn.set_result(None)

    def _rejection(self, reason: Rejection, why: str) -> CapacityExceeded:
        """Counts a rejection and returns its error, with the retry hint."""
        self.rejected[reason.value] += 1
        after_s = self._mean_s * (self.num_waiting + 1) / self._max_running
        return CapacityExceeded(why, max(_LEAST_RETRY_S, after_s))

    def _observe_duration(self, seconds: float) -> None:
        share = _SMOOTHING if self._mean_s else 1.0
        self._mean_s += share * (seconds - self._mean_s)

    @contextlib.contextmanager
    def short_of_room(self, place: AdmissionTicket, *, has_begun: bool) -> Iterator[None]:
        """Does what `AdmissionTicket.short_of_room` documents."""
        place.displaced = None  # left from an earlier wait that found room all the same
        if not has_begun:
            self._reserve_slot(place, " and there is no room for keys and values")
            self._unbegun.append(place)
        bisect.insort(self._short, place)
        try:
            yield
        finally:
            self._leave_short(place)
            self._capacity_freed()
