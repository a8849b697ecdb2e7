"""Admission queue: bounds running and queued generations and rejects the rest with a retry hint.

Requests are admitted by priority, then by arrival. A running generation waits for room if no target
has free KV for it. It goes before every request of equal or lower urgency. When the queue is full,
a more urgent request displaces the least urgent one that is queued or waits for room. Lives on the
event loop. Quotas of API keys are in `orchestrator.admission.quota`.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from enum import Enum

from orchestrator.admission.ticket import AdmissionTicket, FittingTargets, of_same_client, renumber
from outrider.errors import CapacityExceeded, OutriderError, Unavailable

# Weight of the newest generation in the mean duration, from which waits are estimated.
_SMOOTHING = 0.1
_MIN_RETRY_S = 0.1
# Generations of other orchestrators free KV too, and their end is not reported here.
_ROOM_RETRY_S = 0.2


class Rejection(Enum):
    """Reason for a rejection; a label of a metric."""

    QUEUE_FULL = "queue_full"
    DISPLACED = "displaced"
    DEADLINE = "deadline"


class AdmissionQueue:
    """Admits at most `max_running` generations and queues at most `max_waiting`.

    `targets`: all targets. A generation that waits for room claims the targets that it fits into. A
    later request is admitted only while a target is unclaimed.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self.targets: FittingTargets = frozenset
        self._numbers = itertools.count()
        self._queue: list[AdmissionTicket] = []
        # Running generations that wait for room; of these, the ones that have sent no token yet.
        self._short: list[AdmissionTicket] = []
        self._unbegun: list[AdmissionTicket] = []
        self._mean_s = 0.0
        self._capacity_changed = asyncio.Event()
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

    @property
    def is_busy(self) -> bool:
        """Whether requests wait, for admission or for room, or the next one would."""
        return bool(self._queue or self._short) or self.num_running >= self._max_running

    @contextlib.asynccontextmanager
    async def admitted(
        self,
        priority: int,
        time_left_s: float | None,
        *,
        client: str = "",
        min_priority: int | None = None,
    ) -> AsyncIterator[AdmissionTicket]:
        """Waits until the request is admitted, then counts it as running for the block.

        `priority` counts as at least `min_priority`, and orders the requests of the same `client`
        as it is. `time_left_s`: until the client's deadline; None: it has none.

        Raises CapacityExceeded when the queue is full and nothing in it is less urgent, when a more
        urgent request displaces this one, and when the estimated wait exceeds `time_left_s`. Raises
        Unavailable when the server stops.
        """
        ticket = AdmissionTicket(
            self,
            client=client,
            priority=priority if min_priority is None else max(priority, min_priority),
            requested=priority,
            number=next(self._numbers),
        )
        self._overtake_own(ticket)
        if self._may_run(ticket):
            self.num_running += 1
        else:
            await self._wait(ticket, time_left_s)
        began_at = time.monotonic()
        try:
            yield ticket
        finally:
            self._observe_duration(time.monotonic() - began_at)
            self.num_running -= 1
            self._capacity_freed()

    def _overtake_own(self, ticket: AdmissionTicket) -> None:
        """Exchanges numbers among the client's waiting requests: the most urgent goes first.

        Together they keep the same numbers, so no request of another client is overtaken.
        """
        if ticket.requested_priority != ticket.priority:
            own = [*self._waiting_of_same_client(ticket), ticket]
            self._renumber(own, (other.number for other in own))

    def _undo_overtaking(self, ticket: AdmissionTicket) -> None:
        """Returns the number that a leaving request took to the client's other requests."""
        if ticket.number < ticket.arrival_number:
            own = self._waiting_of_same_client(ticket)
            numbers = {ticket.number, *(other.number for other in own)} - {ticket.arrival_number}
            if len(numbers) == len(own):  # otherwise the one with the arrival number has left
                self._renumber(own, numbers)

    def _waiting_of_same_client(self, ticket: AdmissionTicket) -> list[AdmissionTicket]:
        return of_same_client((*self._unbegun, *self._queue), ticket)

    def _renumber(self, tickets: list[AdmissionTicket], numbers: Iterable[int]) -> None:
        renumber(tickets, numbers)
        self._queue.sort()
        self._short.sort()

    def close(self) -> None:
        """Rejects every queued request: the server is stopping."""
        while self._queue:
            self._reject_queued(self._queue[-1], Unavailable("the orchestrator is stopping"))

    def _reject_queued(self, ticket: AdmissionTicket, error: OutriderError) -> None:
        self._queue.remove(ticket)
        if not ticket.admitted.done():  # otherwise its client has just cancelled
            ticket.admitted.set_exception(error)

    def _reserve_slot(self, ticket: AdmissionTicket, purpose: str) -> None:
        """When the queue is full, displaces its least urgent request.

        Raises CapacityExceeded when none is less urgent than `ticket`.
        """
        if self.num_waiting < self._max_waiting:
            return
        last = max((*self._queue, *self._unbegun), default=ticket)
        if not ticket < last:
            raise self._rejection(
                Rejection.QUEUE_FULL,
                f"{self.num_waiting} requests wait{purpose}, the most allowed",
            )
        error = self._rejection(Rejection.DISPLACED, "more urgent requests fill the queue")
        if last in self._queue:
            self._reject_queued(last, error)
        else:
            last.displaced = error
            self._leave_short(last)
            self._capacity_changed.set()

    def _leave_short(self, ticket: AdmissionTicket) -> None:
        for tickets in (self._short, self._unbegun):
            if ticket in tickets:
                tickets.remove(ticket)

    def _may_run(self, ticket: AdmissionTicket) -> bool:
        if self.num_running >= self._max_running or (self._queue and self._queue[0] < ticket):
            return False
        if not self._short or ticket < self._short[0]:
            return True
        return bool(frozenset(self.targets()) - self._claimed_before(ticket))

    def _claimed_before(self, ticket: AdmissionTicket) -> frozenset[str]:
        """Targets claimed by generations that wait for room and go before `ticket`."""
        ahead = itertools.takewhile(lambda short: short < ticket, self._short)
        return frozenset().union(*(short.fitting_targets() for short in ahead))

    async def _wait(self, ticket: AdmissionTicket, time_left_s: float | None) -> None:
        try:
            self._check_deadline(ticket, time_left_s)
            self._reserve_slot(ticket, "")
        except CapacityExceeded:
            self._undo_overtaking(ticket)
            raise
        bisect.insort(self._queue, ticket)
        try:
            await ticket.admitted
        except asyncio.CancelledError:
            if ticket in self._queue:
                self._queue.remove(ticket)
            self._undo_overtaking(ticket)
            # Admitted, and cancelled before it ran.
            if not ticket.admitted.cancelled() and ticket.admitted.exception() is None:
                self.num_running -= 1
            self._capacity_freed()
            raise

    def _check_deadline(self, ticket: AdmissionTicket, time_left_s: float | None) -> None:
        num_ahead = bisect.bisect(self._queue, ticket)
        wait_s = self._mean_s * (num_ahead + 1) / self._max_running
        if time_left_s is not None and wait_s > time_left_s:
            raise self._rejection(
                Rejection.DEADLINE,
                f"the estimated wait is {wait_s:.1f} s; {time_left_s:.1f} s are left until the "
                "deadline",
            )

    def _capacity_freed(self) -> None:
        """Wakes the generations that wait for room, then admits from the queue."""
        self._capacity_changed.set()
        self._admit_queued()

    def _admit_queued(self) -> None:
        """Admits requests from the head of the queue as long as they may run."""
        while self._queue and self._may_run(self._queue[0]):
            admitted = self._queue.pop(0).admitted
            if not admitted.done():
                self.num_running += 1
                admitted.set_result(None)

    def _rejection(self, reason: Rejection, why: str) -> CapacityExceeded:
        """Counts a rejection and returns its error, with the retry hint."""
        self.rejected[reason.value] += 1
        after_s = self._mean_s * (self.num_waiting + 1) / self._max_running
        return CapacityExceeded(why, max(_MIN_RETRY_S, after_s))

    def _observe_duration(self, seconds: float) -> None:
        share = _SMOOTHING if self._mean_s else 1.0
        self._mean_s += share * (seconds - self._mean_s)

    @contextlib.contextmanager
    def short_of_room(
        self, ticket: AdmissionTicket, targets: FittingTargets, *, has_begun: bool
    ) -> Iterator[None]:
        """Marks a running generation as waiting for KV at one of `targets`, for the block.

        `has_begun`: it has sent tokens to its client, so it is never rejected or displaced. Raises
        CapacityExceeded when it has not begun, the queue is full and nothing in it is less urgent.
        """
        ticket.fitting_targets = targets
        ticket.displaced = None  # set during an earlier wait, which found room all the same
        if not has_begun:
            self._reserve_slot(ticket, " and there is no room for keys and values")
            self._unbegun.append(ticket)
        bisect.insort(self._short, ticket)
        try:
            yield
        finally:
            self._leave_short(ticket)
            self._capacity_freed()

    async def turn_for_room(self, ticket: AdmissionTicket, *, at_once: bool) -> frozenset[str]:
        """Waits until `ticket` is first in the order for targets that it fits, and returns these.

        Returns the empty set when it fits no target any more. `at_once` False: it has just failed
        there, so wait first until a generation ends or `_ROOM_RETRY_S` have passed. Raises
        CapacityExceeded when a more urgent request has displaced it.
        """
        while True:
            if not at_once:
                self._capacity_changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ROOM_RETRY_S):
                        await self._capacity_changed.wait()
                self._admit_queued()  # a target may have joined
            at_once = False
            if ticket.displaced is not None:
                raise ticket.displaced
            fitting = frozenset(ticket.fitting_targets())
            unclaimed = fitting - self._claimed_before(ticket)
            if unclaimed or not fitting:
                return unclaimed
