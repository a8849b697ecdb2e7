"""Place of one generation in the order of admission, and exchanges of places of one API key.

`orchestrator.admission.queue` owns the queue itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from outrider.errors import CapacityExceeded

if TYPE_CHECKING:
    from orchestrator.admission.queue import AdmissionQueue

# Endpoints of the targets whose KV cache is large enough for a generation.
Rooms = Callable[[], Collection[str]]

# Generations of other orchestrators free KV too, and their end is not reported here.
_ROOM_RETRY_S = 0.2


class AdmissionTicket:
    """Position of one generation in the order of admission.

    `priority`: lower runs first, 0 is the default. `asked`: the priority of the request itself; it
    orders the requests of one API key that have equal `priority`. `number`: the order of arrival;
    requests of one key may exchange theirs. `arrived`: its own number, which never changes.
    """

    def __init__(
        self, admission: AdmissionQueue, *, client: str, priority: int, asked: int, number: int
    ) -> None:
        self.client = client
        self.priority = priority
        self.asked = asked
        self.number = self.arrived = number
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # The error of a generation that was displaced while it ran and waited for room.
        self.displaced: CapacityExceeded | None = None
        # Targets that it fits into, while it waits for room.
        self.rooms: Rooms = frozenset
        self._asked_at = time.monotonic()
        self._admission = admission

    @property
    def age_s(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self._asked_at

    def __lt__(self, other: AdmissionTicket) -> bool:
        return (self.priority, self.number) < (other.priority, other.number)

    def short_of_room(self, rooms: Rooms, *, has_begun: bool) -> AbstractContextManager[None]:
        """Marks this running generation as waiting for KV in one of `rooms`, for the block.

        `has_begun`: it has sent tokens to its client, so it is never rejected or displaced. Raises
        CapacityExceeded when it has not begun, the queue is full and nothing in it is less urgent.
        """
        self.rooms = rooms
        return self._admission.short_of_room(self, has_begun=has_begun)

    async def turn_for_room(self, *, at_once: bool) -> frozenset[str]:
        """Waits until it is first in the order for some rooms, and returns these.

        Returns the empty set when no room fits it any more. `at_once` False: it has just failed
        there, so wait first until something ends or `_ROOM_RETRY_S` have passed. Raises
        CapacityExceeded when a more urgent request has displaced it.
        """
        while True:
            if not at_once:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ROOM_RETRY_S):
                        await self._admission.change()
                self._admission.admit_queued()  # a target may have joined
            at_once = False
            if self.displaced is not None:
                raise self.displaced
            rooms = frozenset(self.rooms())
            unclaimed = rooms - self._admission.claimed_before(self)
            if unclaimed or not rooms:
                return unclaimed


def of_same_client(
    places: Iterable[AdmissionTicket], place: AdmissionTicket
) -> list[AdmissionTicket]:
    """Those of `places`, without `place`, that are ordered by `asked` among each other."""
    return [
        other
        for other in places
        if other is not place and (other.client, other.priority) == (place.client, place.priority)
    ]


def renumber(places: list[AdmissionTicket], numbers: Iterable[int]) -> None:
    """Gives the lowest of `numbers` to the most urgent of `places`, and so on."""
    places.sort(key=lambda place: (place.asked, place.number))
    for place, number in zip(places, sorted(numbers), strict=True):
        place.number = number
