"""Ticket of one generation in the admission queue: its position in the order of admission."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from outrider.errors import CapacityExceeded

if TYPE_CHECKING:
    from orchestrator.admission.queue import AdmissionQueue

# Endpoints of the targets whose KV cache is large enough for a generation.
FittingTargets = Callable[[], Collection[str]]


class AdmissionTicket:
    """Position of one generation in the order of admission. The queue changes it.

    `priority`: lower runs first, 0 is the default. `requested_priority`: the priority of the
    request itself; it orders the requests of one API key that have equal `priority`. `number`: the
    order of arrival; requests of one key may exchange theirs. `arrival_number`: never changes.
    """

    def __init__(
        self, queue: AdmissionQueue, *, client: str, priority: int, requested: int, number: int
    ) -> None:
        self.client = client
        self.priority = priority
        self.requested_priority = requested
        self.number = self.arrival_number = number
        # Set when the queued request is admitted or rejected.
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Why a generation was displaced while it waited for room.
        self.displaced: CapacityExceeded | None = None
        # Targets whose KV cache is large enough, while the generation waits for free KV pages.
        self.fitting_targets: FittingTargets = frozenset
        self._arrived_at = time.monotonic()
        self._queue = queue

    @property
    def age_s(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self._arrived_at

    def __lt__(self, other: AdmissionTicket) -> bool:
        return (self.priority, self.number) < (other.priority, other.number)

    def short_of_room(
        self, targets: FittingTargets, *, has_begun: bool
    ) -> AbstractContextManager[None]:
        """See `AdmissionQueue.short_of_room`."""
        return self._queue.short_of_room(self, targets, has_begun=has_begun)

    async def turn_for_room(self, *, at_once: bool) -> frozenset[str]:
        """See `AdmissionQueue.turn_for_room`."""
        return await self._queue.turn_for_room(self, at_once=at_once)


def of_same_client(
    tickets: Iterable[AdmissionTicket], ticket: AdmissionTicket
) -> list[AdmissionTicket]:
    """The other tickets of the client with the same priority; `requested_priority` orders them."""
    return [
        other
        for other in tickets
        if other is not ticket
        and (other.client, other.priority) == (ticket.client, ticket.priority)
    ]


def renumber(tickets: list[AdmissionTicket], numbers: Iterable[int]) -> None:
    """Sorts `tickets`, most urgent first, and assigns `numbers` to them in ascending order."""
    tickets.sort(key=lambda ticket: (ticket.requested_priority, ticket.number))
    for ticket, number in zip(tickets, sorted(numbers), strict=True):
        ticket.number = number
