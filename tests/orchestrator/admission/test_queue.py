"""Admission queue: order, bounds, displacement, waits for room; no running slot leaks."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from orchestrator.admission.queue import AdmissionQueue
from orchestrator.admission.ticket import AdmissionTicket
from outrider.errors import CapacityExceeded, Unavailable


def one_room() -> frozenset[str]:
    """The only target."""
    return frozenset({"a"})


class Request:
    """A request in a task of its own; once admitted it runs until `end`."""

    def __init__(
        self,
        admission: AdmissionQueue,
        priority: int = 0,
        time_left_s: float | None = None,
        key: str = "",
        min_priority: int | None = None,
    ):
        self.ticket: AdmissionTicket | None = None
        self._ends = asyncio.Event()
        admitted = admission.admitted(priority, time_left_s, client=key, min_priority=min_priority)
        self.task = asyncio.create_task(self._run(admitted))
        # Retrieves the exception, which asyncio otherwise logs.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _run(self, admitted: contextlib.AbstractAsyncContextManager[AdmissionTicket]) -> None:
        async with admitted as self.ticket:
            await self._ends.wait()
        self.ticket = None

    @property
    def is_running(self) -> bool:
        return self.ticket is not None

    async def end(self) -> None:
        self._ends.set()
        await self.task
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def arrivals(admission: AdmissionQueue, *priorities: int) -> list[Request]:
    """Requests that arrive one after the other."""
    made = []
    for priority in priorities:
        made.append(Request(admission, priority))
        await settle()
    return made


async def refusal(request: Request) -> CapacityExceeded:
    with pytest.raises(CapacityExceeded) as caught:
        await request.task
    return caught.value


async def test_requests_are_admitted_by_priority_then_by_arrival() -> None:
    admission = AdmissionQueue(1, 8)
    first, *waiting = await arrivals(admission, 0, 5, 0, -1, 0)
    assert first.is_running
    served = []
    ending = first
    for _ in waiting:
        await ending.end()
        (ending,) = [request for request in waiting if request.is_running]
        served.append(waiting.index(ending))
    assert served == [2, 1, 3, 0]
    await ending.end()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_a_full_queue_rejects_a_request_that_is_no_more_urgent_than_its_last() -> None:
    """A displaced request gets an error of its own; both have a retry hint."""
    admission = AdmissionQueue(1, 2)
    _, kept, last, late = await arrivals(admission, 0, 0, 1, 1)
    assert "2 requests wait" in str(await refusal(late))
    (urgent,) = await arrivals(admission, 0)
    displaced = await refusal(last)
    assert "more urgent" in str(displaced)
    assert displaced.retry_after_s > 0
    assert admission.num_waiting == 2
    for request in (kept, urgent):
        request.task.cancel()


async def test_without_a_queue_requests_are_rejected_at_once() -> None:
    admission = AdmissionQueue(2, 0)
    first, _, late = await arrivals(admission, 0, 0, -9)
    await refusal(late)
    await first.end()
    (again,) = await arrivals(admission, 0)
    assert again.is_running


async def test_a_deadline_that_cannot_be_met_is_rejected_at_once() -> None:
    admission = AdmissionQueue(1, 8)
    (first,) = await arrivals(admission, 0)
    await asyncio.sleep(0.2)
    await first.end()  # so generations take 0.2 s
    await arrivals(admission, 0)
    assert "the estimated wait is" in str(await refusal(Request(admission, time_left_s=0.05)))
    patient = Request(admission, time_left_s=3600)
    await settle()
    assert not patient.task.done()
    patient.task.cancel()


async def test_a_stop_rejects_queued_requests_and_no_running_one() -> None:
    admission = AdmissionQueue(1, 8)
    first, waiting = await arrivals(admission, 0, 0)
    admission.close()
    with pytest.raises(Unavailable):
        await waiting.task
    assert first.is_running
    await first.end()


async def test_generations_short_of_room_go_before_the_queue() -> None:
    """Freed capacity is theirs, unless a request is more urgent."""
    admission = AdmissionQueue(3, 8)
    first, second = await arrivals(admission, 0, 0)
    assert first.ticket is not None
    assert second.ticket is not None
    with second.ticket.short_of_room(one_room, has_begun=True):
        with first.ticket.short_of_room(one_room, has_begun=False):
            assert admission.num_waiting == 1  # the one that has sent no token
            waits, urgent = await arrivals(admission, 0, -1)
            assert not waits.is_running
            assert urgent.is_running
            await first.ticket.turn_for_room(at_once=True)
            turn = asyncio.create_task(second.ticket.turn_for_room(at_once=True))
            await settle()
            assert not turn.done()
            await urgent.end()
            assert not waits.is_running
        await turn
        assert not waits.is_running
    await settle()
    assert waits.is_running


async def test_no_request_waits_for_one_that_needs_another_target() -> None:
    """Each claims the targets that it fits into; the other targets are free for later requests."""
    admission = AdmissionQueue(4, 8)
    admission.targets = lambda: rooms
    rooms = frozenset({"large", "small"})
    long, short = await arrivals(admission, 0, 0)
    assert long.ticket is not None
    assert short.ticket is not None
    with long.ticket.short_of_room(lambda: rooms & {"large"}, has_begun=False):
        assert await long.ticket.turn_for_room(at_once=True) == {"large"}
        (other,) = await arrivals(admission, 0)
        assert other.is_running, "the small one is unclaimed"
        with short.ticket.short_of_room(lambda: rooms, has_begun=False):
            assert await short.ticket.turn_for_room(at_once=True) == {"small"}
            (waits,) = await arrivals(admission, 0)
            assert not waits.is_running, "both are claimed"
            # Without the large target, the first fits nowhere and claims nothing.
            rooms = frozenset({"small"})
            assert await long.ticket.turn_for_room(at_once=True) == frozenset()
            assert await short.ticket.turn_for_room(at_once=True) == {"small"}
            rooms = frozenset({"small", "new"})
            assert await short.ticket.turn_for_room(at_once=False) == {"small", "new"}
    await settle()
    assert waits.is_running


async def test_a_full_queue_rejects_a_generation_short_of_room() -> None:
    """A generation that has sent tokens is never rejected."""
    admission = AdmissionQueue(4, 1)
    (first, second, third) = await arrivals(admission, 0, 0, 0)
    assert first.ticket is not None
    assert second.ticket is not None
    assert third.ticket is not None
    with first.ticket.short_of_room(one_room, has_begun=False):
        with (
            pytest.raises(CapacityExceeded),
            second.ticket.short_of_room(one_room, has_begun=False),
        ):
            pass
        with third.ticket.short_of_room(one_room, has_begun=True):
            pass
    assert admission.num_waiting == 0


async def test_an_urgent_request_displaces_the_least_urgent_one_short_of_room() -> None:
    """Its next wait for room raises the error. One that has sent tokens is never displaced."""
    admission = AdmissionQueue(8, 2)
    begun, first, last = await arrivals(admission, 9, 0, 1)
    assert begun.ticket is not None
    assert first.ticket is not None
    assert last.ticket is not None
    with (
        begun.ticket.short_of_room(one_room, has_begun=True),
        first.ticket.short_of_room(one_room, has_begun=False),
        last.ticket.short_of_room(one_room, has_begun=False),
    ):
        waiting = asyncio.create_task(last.ticket.turn_for_room(at_once=True))
        (urgent, equal) = await arrivals(admission, -5, 1)
        assert urgent.ticket is not None
        with urgent.ticket.short_of_room(one_room, has_begun=False):
            with pytest.raises(CapacityExceeded, match="more urgent") as caught:
                await waiting
            assert caught.value.retry_after_s > 0
            assert admission.num_waiting == 2
            await urgent.ticket.turn_for_room(at_once=True)
            assert "2 requests wait" in str(await refusal(equal))
    assert admission.num_waiting == 0
    assert admission.rejected == {"queue_full": 1, "displaced": 1, "deadline": 0}


async def test_a_displaced_request_that_found_room_all_the_same_goes_on() -> None:
    """A later wait does not raise the error of the earlier one."""
    admission = AdmissionQueue(8, 1)
    (first,) = await arrivals(admission, 0)
    assert first.ticket is not None
    with first.ticket.short_of_room(one_room, has_begun=False):
        (urgent,) = await arrivals(admission, -5)
        assert urgent.ticket is not None
        with urgent.ticket.short_of_room(one_room, has_begun=False):
            assert first.ticket.displaced is not None
    with first.ticket.short_of_room(one_room, has_begun=True):
        assert await first.ticket.turn_for_room(at_once=True) == one_room()


async def test_an_urgent_request_in_the_queue_displaces_one_short_of_room() -> None:
    """The urgent request is admitted when the displaced one ends."""
    admission = AdmissionQueue(1, 1)
    (first,) = await arrivals(admission, 0)
    assert first.ticket is not None
    with first.ticket.short_of_room(one_room, has_begun=False):
        waiting = asyncio.create_task(first.ticket.turn_for_room(at_once=False))
        (urgent,) = await arrivals(admission, -5)
        assert not urgent.is_running
        with pytest.raises(CapacityExceeded, match="more urgent"):
            await waiting
    await first.end()
    assert urgent.is_running


async def arrivals_of_keys(admission: AdmissionQueue, *asked: tuple[str, int]) -> list[Request]:
    """Requests of keys with min_priority 0, one after the other."""
    made = []
    for key, priority in asked:
        made.append(Request(admission, priority, key=key, min_priority=0))
        await settle()
    return made


async def served(running: Request, waiting: list[Request]) -> list[int]:
    """Ends them one after the other; returns the order in which `waiting` was admitted."""
    order: list[int] = []
    for _ in waiting:
        await running.end()
        (running,) = [request for request in waiting if request.is_running]
        order.append(waiting.index(running))
    await running.end()
    return order


async def test_below_min_priority_a_priority_orders_only_the_clients_own_requests() -> None:
    """They exchange their positions; every other request keeps its own."""
    admission = AdmissionQueue(1, 8)
    (first,) = await arrivals_of_keys(admission, ("ada", 0))
    waiting = await arrivals_of_keys(
        admission, ("ada", 0), ("bob", 0), ("ada", -9), ("cleo", 0), ("ada", -5), ("bob", -1)
    )
    # ada has positions 1, 3 and 5; bob has 2 and 6.
    assert await served(first, waiting) == [2, 5, 4, 3, 0, 1]


async def test_a_rejected_request_leaves_the_order_of_its_client_unchanged() -> None:
    """Rejected by its deadline, it returns the position that it took from an earlier request."""
    admission = AdmissionQueue(1, 8)
    (first,) = await arrivals_of_keys(admission, ("ada", 0))
    await asyncio.sleep(0.2)
    await first.end()  # so generations take 0.2 s
    (running,) = await arrivals_of_keys(admission, ("ada", 0))
    waiting = await arrivals_of_keys(admission, ("ada", 0), ("bob", 0), ("ada", -2))
    late = Request(admission, -9, time_left_s=0.01, key="ada", min_priority=0)
    assert "the estimated wait is" in str(await refusal(late))
    # ada has positions 1 and 3; bob has 2.
    assert await served(running, waiting) == [2, 1, 0]


async def test_a_cancelled_request_returns_the_position_it_took_from_its_client() -> None:
    admission = AdmissionQueue(1, 8)
    (running,) = await arrivals_of_keys(admission, ("ada", 0))
    *waiting, urgent = await arrivals_of_keys(
        admission, ("ada", 0), ("bob", 0), ("ada", -2), ("cleo", 0), ("ada", -9)
    )
    urgent.task.cancel()
    await settle()
    assert await served(running, waiting) == [2, 1, 0, 3]


async def test_cancelling_a_request_keeps_the_position_that_another_took_from_it() -> None:
    admission = AdmissionQueue(1, 8)
    (running,) = await arrivals_of_keys(admission, ("ada", 0))
    early, *waiting = await arrivals_of_keys(admission, ("ada", 0), ("bob", 0), ("ada", -9))
    early.task.cancel()
    await settle()
    assert await served(running, waiting) == [1, 0]


async def test_a_request_rejected_by_a_full_queue_changes_nothing() -> None:
    admission = AdmissionQueue(1, 2)
    (running,) = await arrivals_of_keys(admission, ("ada", 0))
    waiting = await arrivals_of_keys(admission, ("ada", -2), ("bob", 0))
    (late,) = await arrivals_of_keys(admission, ("ada", -1))
    assert "2 requests wait" in str(await refusal(late))
    assert await served(running, waiting) == [0, 1]


async def test_below_min_priority_no_other_client_is_displaced_or_overtaken() -> None:
    admission = AdmissionQueue(2, 2)
    running = await arrivals_of_keys(admission, ("ada", 0), ("bob", 0))
    assert running[0].ticket is not None
    with running[0].ticket.short_of_room(one_room, has_begun=False):
        (bobs,) = await arrivals_of_keys(admission, ("bob", 0))
        (urgent,) = await arrivals_of_keys(admission, ("cleo", -9))
        assert "2 requests wait" in str(await refusal(urgent))
        (own,) = await arrivals_of_keys(
            admission, ("bob", -9)
        )  # takes the position of bob's other request
        assert "more urgent" in str(await refusal(bobs))
        assert not own.is_running
    own.task.cancel()


@pytest.mark.parametrize(("least", "counts_as"), [(None, -7), (0, 0), (-3, -3), (-9, -7), (5, 5)])
async def test_a_priority_counts_as_at_least_min_priority(
    least: int | None, counts_as: int
) -> None:
    request = Request(AdmissionQueue(1, 0), -7, key="ada", min_priority=least)
    await settle()
    assert request.ticket is not None
    assert (request.ticket.priority, request.ticket.requested_priority) == (counts_as, -7)
    await request.end()


@pytest.mark.parametrize("seed", range(20))
async def test_bounds_hold_and_no_slot_leaks_whatever_requests_do(seed: int) -> None:
    """Requests arrive, end, or are cancelled while queued or just admitted."""
    generator = random.Random(seed)
    admission = AdmissionQueue(3, 5)
    requests: list[Request] = []
    for _ in range(300):
        what = generator.random()
        if what < 0.5 or not requests:
            priority, key = generator.randint(-2, 2), generator.choice(("ada", "bob", ""))
            requests.append(Request(admission, priority, key=key, min_priority=0 if key else None))
        else:
            request = requests.pop(generator.randrange(len(requests)))
            if what < 0.75:
                request.task.cancel()
            else:
                request._ends.set()
        if generator.random() < 0.7:
            await asyncio.sleep(0)
        assert 0 <= admission.num_running <= 3
        assert 0 <= admission.num_waiting <= 5
    for request in requests:
        request._ends.set()
    for request in requests:
        with contextlib.suppress(CapacityExceeded):
            await request.task
    await settle()
    assert (admission.num_running, admission.num_waiting) == (0, 0)
    (last,) = await arrivals(admission, 0)
    assert last.is_running
