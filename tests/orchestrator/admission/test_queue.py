"""AdmissionQueue queue: order, bounds, displacement, and that no running slot leaks."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from orchestrator.admission.queue import AdmissionQueue
from orchestrator.admission.ticket import AdmissionTicket
from outrider.errors import CapacityExceeded, Unavailable


def one_room() -> frozenset[str]:
    """All wait for the same target."""
    return frozenset({"a"})


class Caller:
    """One call in a task of its own; runs until `end`."""

    def __init__(
        self,
        admission: AdmissionQueue,
        priority: int = 0,
        patience_s: float | None = None,
        key: str = "",
        min_priority: int | None = None,
    ):
        self.place: AdmissionTicket | None = None
        self._ends = asyncio.Event()
        admitted = admission.admitted(priority, patience_s, client=key, min_priority=min_priority)
        self.task = asyncio.create_task(self._call(admitted))
        # Seen, should nobody ask how it ended.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _call(
        self, admitted: contextlib.AbstractAsyncContextManager[AdmissionTicket]
    ) -> None:
        async with admitted as self.place:
            await self._ends.wait()
        self.place = None

    @property
    def is_running(self) -> bool:
        return self.place is not None

    async def end(self) -> None:
        self._ends.set()
        await self.task
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def calls(admission: AdmissionQueue, *priorities: int) -> list[Caller]:
    """One after the other."""
    made = []
    for priority in priorities:
        made.append(Caller(admission, priority))
        await settle()
    return made


async def refusal(client: Caller) -> CapacityExceeded:
    with pytest.raises(CapacityExceeded) as caught:
        await client.task
    return caught.value


async def test_the_most_urgent_first_then_whoever_came_first() -> None:
    admission = AdmissionQueue(1, 8)
    first, *waiting = await calls(admission, 0, 5, 0, -1, 0)
    assert first.is_running
    served = []
    ending = first
    for _ in waiting:
        await ending.end()
        (ending,) = [client for client in waiting if client.is_running]
        served.append(waiting.index(ending))
    assert served == [2, 1, 3, 0]
    await ending.end()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_a_full_queue_rejects_a_request_that_is_no_more_urgent_than_its_last() -> None:
    """A displaced request gets an error of its own; both have a retry hint."""
    admission = AdmissionQueue(1, 2)
    _, kept, last, late = await calls(admission, 0, 0, 1, 1)
    assert "2 requests wait" in str(await refusal(late))
    (urgent,) = await calls(admission, 0)
    displaced = await refusal(last)
    assert "more urgent" in str(displaced)
    assert displaced.retry_after_s > 0
    assert admission.num_waiting == 2
    for client in (kept, urgent):
        client.task.cancel()


async def test_with_a_queue_of_zero_requests_are_rejected_at_once() -> None:
    admission = AdmissionQueue(2, 0)
    first, _, late = await calls(admission, 0, 0, -9)
    await refusal(late)
    await first.end()
    (again,) = await calls(admission, 0)
    assert again.is_running


async def test_a_deadline_that_cannot_be_met_is_rejected_at_once() -> None:
    admission = AdmissionQueue(1, 8)
    (first,) = await calls(admission, 0)
    await asyncio.sleep(0.2)
    await first.end()  # so generations take 0.2 s
    await calls(admission, 0)
    assert "the estimated wait is" in str(await refusal(Caller(admission, patience_s=0.05)))
    patient = Caller(admission, patience_s=3600)
    await settle()
    assert not patient.task.done()
    patient.task.cancel()


async def test_a_stop_rejects_queued_requests_and_no_running_one() -> None:
    admission = AdmissionQueue(1, 8)
    first, waiting = await calls(admission, 0, 0)
    admission.close()
    with pytest.raises(Unavailable):
        await waiting.task
    assert first.is_running
    await first.end()


async def test_generations_short_of_room_go_before_the_queue() -> None:
    """What becomes free is theirs, unless somebody is more urgent."""
    admission = AdmissionQueue(3, 8)
    first, second = await calls(admission, 0, 0)
    assert first.place is not None
    assert second.place is not None
    with second.place.short_of_room(one_room, has_begun=True):
        with first.place.short_of_room(one_room, has_begun=False):
            assert admission.num_waiting == 1  # the one that has shown nothing
            waits, urgent = await calls(admission, 0, -1)
            assert not waits.is_running
            assert urgent.is_running
            await first.place.turn_for_room(at_once=True)
            turn = asyncio.create_task(second.place.turn_for_room(at_once=True))
            await settle()
            assert not turn.done()
            await urgent.end()
            assert not waits.is_running
        await turn
        assert not waits.is_running
    await settle()
    assert waits.is_running


async def test_nobody_waits_behind_one_that_waits_for_another_room() -> None:
    """Each claims the targets that it fits into; those that are left are for whoever comes."""
    admission = AdmissionQueue(4, 8)
    admission.rooms = lambda: rooms
    rooms = frozenset({"large", "small"})
    long, short = await calls(admission, 0, 0)
    assert long.place is not None
    assert short.place is not None
    with long.place.short_of_room(lambda: rooms & {"large"}, has_begun=False):
        assert await long.place.turn_for_room(at_once=True) == {"large"}
        (other,) = await calls(admission, 0)
        assert other.is_running, "the small one is nobody's"
        with short.place.short_of_room(lambda: rooms, has_begun=False):
            assert await short.place.turn_for_room(at_once=True) == {"small"}
            (waits,) = await calls(admission, 0)
            assert not waits.is_running, "both are claimed"
            # Without the large one, the first has nowhere to go, and claims nothing.
            rooms = frozenset({"small"})
            assert await long.place.turn_for_room(at_once=True) == frozenset()
            assert await short.place.turn_for_room(at_once=True) == {"small"}
            rooms = frozenset({"small", "new"})
            assert await short.place.turn_for_room(at_once=False) == {"small", "new"}
    await settle()
    assert waits.is_running


async def test_too_many_without_room() -> None:
    """A generation that has sent tokens is never rejected."""
    admission = AdmissionQueue(4, 1)
    (first, second, third) = await calls(admission, 0, 0, 0)
    assert first.place is not None
    assert second.place is not None
    assert third.place is not None
    with first.place.short_of_room(one_room, has_begun=False):
        with pytest.raises(CapacityExceeded), second.place.short_of_room(one_room, has_begun=False):
            pass
        with third.place.short_of_room(one_room, has_begun=True):
            pass
    assert admission.num_waiting == 0


async def test_an_urgent_request_displaces_the_least_urgent_one_short_of_room() -> None:
    """That one is told so at its next turn; one that has shown something is never displaced."""
    admission = AdmissionQueue(8, 2)
    begun, first, last = await calls(admission, 9, 0, 1)
    assert begun.place is not None
    assert first.place is not None
    assert last.place is not None
    with (
        begun.place.short_of_room(one_room, has_begun=True),
        first.place.short_of_room(one_room, has_begun=False),
        last.place.short_of_room(one_room, has_begun=False),
    ):
        waiting = asyncio.create_task(last.place.turn_for_room(at_once=True))
        (urgent, equal) = await calls(admission, -5, 1)
        assert urgent.place is not None
        with urgent.place.short_of_room(one_room, has_begun=False):
            with pytest.raises(CapacityExceeded, match="more urgent") as caught:
                await waiting
            assert caught.value.retry_after_s > 0
            assert admission.num_waiting == 2
            await urgent.place.turn_for_room(at_once=True)
            assert "2 requests wait" in str(await refusal(equal))
    assert admission.num_waiting == 0
    assert admission.rejected == {"queue_full": 1, "displaced": 1, "deadline": 0}


async def test_a_displaced_request_that_found_room_all_the_same_goes_on() -> None:
    """It was tried while it was displaced: later waits are none of the earlier one's."""
    admission = AdmissionQueue(8, 1)
    (first,) = await calls(admission, 0)
    assert first.place is not None
    with first.place.short_of_room(one_room, has_begun=False):
        (urgent,) = await calls(admission, -5)
        assert urgent.place is not None
        with urgent.place.short_of_room(one_room, has_begun=False):
            assert first.place.displaced is not None
    with first.place.short_of_room(one_room, has_begun=True):
        assert await first.place.turn_for_room(at_once=True) == one_room()


async def test_an_urgent_request_in_the_queue_displaces_one_short_of_room() -> None:
    """All may run at once: the urgent one waits for the turn that the displaced one gives back."""
    admission = AdmissionQueue(1, 1)
    (first,) = await calls(admission, 0)
    assert first.place is not None
    with first.place.short_of_room(one_room, has_begun=False):
        waiting = asyncio.create_task(first.place.turn_for_room(at_once=False))
        (urgent,) = await calls(admission, -5)
        assert not urgent.is_running
        with pytest.raises(CapacityExceeded, match="more urgent"):
            await waiting
    await first.end()
    assert urgent.is_running


async def of_keys(admission: AdmissionQueue, *asked: tuple[str, int]) -> list[Caller]:
    """Requests of keys without rights, one after the other."""
    made = []
    for key, priority in asked:
        made.append(Caller(admission, priority, key=key, min_priority=0))
        await settle()
    return made


async def served(running: Caller, waiting: list[Caller]) -> list[int]:
    """Ends one after the other: the order in which those that wait come to run."""
    order: list[int] = []
    for _ in waiting:
        await running.end()
        (running,) = [client for client in waiting if client.is_running]
        order.append(waiting.index(running))
    await running.end()
    return order


async def test_without_the_right_a_priority_orders_only_a_callers_own_requests() -> None:
    """They exchange their places; every other caller keeps its own."""
    admission = AdmissionQueue(1, 8)
    (first,) = await of_keys(admission, ("ada", 0))
    waiting = await of_keys(
        admission, ("ada", 0), ("bob", 0), ("ada", -9), ("cleo", 0), ("ada", -5), ("bob", -1)
    )
    # ada's three places are the first, third and fifth; bob's are the second and sixth.
    assert await served(first, waiting) == [2, 5, 4, 3, 0, 1]


async def test_a_refused_request_leaves_its_own_keys_order_as_it_was() -> None:
    """Rejected by its deadline, it gives back the place that it took from an earlier request."""
    admission = AdmissionQueue(1, 8)
    (first,) = await of_keys(admission, ("ada", 0))
    await asyncio.sleep(0.2)
    await first.end()  # so generations take 0.2 s
    (running,) = await of_keys(admission, ("ada", 0))
    waiting = await of_keys(admission, ("ada", 0), ("bob", 0), ("ada", -2))
    late = Caller(admission, -9, patience_s=0.01, key="ada", min_priority=0)
    assert "the estimated wait is" in str(await refusal(late))
    # ada's places are the first and the third; bob's is the second.
    assert await served(running, waiting) == [2, 1, 0]


async def test_a_cancelled_request_gives_back_the_place_it_took_from_its_own_key() -> None:
    admission = AdmissionQueue(1, 8)
    (running,) = await of_keys(admission, ("ada", 0))
    *waiting, urgent = await of_keys(
        admission, ("ada", 0), ("bob", 0), ("ada", -2), ("cleo", 0), ("ada", -9)
    )
    urgent.task.cancel()
    await settle()
    assert await served(running, waiting) == [2, 1, 0, 3]


async def test_cancelling_a_request_keeps_the_place_that_another_took_from_it() -> None:
    admission = AdmissionQueue(1, 8)
    (running,) = await of_keys(admission, ("ada", 0))
    early, *waiting = await of_keys(admission, ("ada", 0), ("bob", 0), ("ada", -9))
    early.task.cancel()
    await settle()
    assert await served(running, waiting) == [1, 0]


async def test_a_request_rejected_by_a_full_queue_changes_nothing() -> None:
    admission = AdmissionQueue(1, 2)
    (running,) = await of_keys(admission, ("ada", 0))
    waiting = await of_keys(admission, ("ada", -2), ("bob", 0))
    (late,) = await of_keys(admission, ("ada", -1))
    assert "2 requests wait" in str(await refusal(late))
    assert await served(running, waiting) == [0, 1]


async def test_without_the_right_nobody_else_is_displaced_or_overtaken() -> None:
    admission = AdmissionQueue(2, 2)
    running = await of_keys(admission, ("ada", 0), ("bob", 0))
    assert running[0].place is not None
    with running[0].place.short_of_room(one_room, has_begun=False):
        (bobs,) = await of_keys(admission, ("bob", 0))
        (urgent,) = await of_keys(admission, ("cleo", -9))
        assert "2 requests wait" in str(await refusal(urgent))
        (own,) = await of_keys(admission, ("bob", -9))  # in the place of bob's other one
        assert "more urgent" in str(await refusal(bobs))
        assert not own.is_running
    own.task.cancel()


@pytest.mark.parametrize(("least", "counts_as"), [(None, -7), (0, 0), (-3, -3), (-9, -7), (5, 5)])
async def test_what_a_priority_counts_as_towards_others(least: int | None, counts_as: int) -> None:
    client = Caller(AdmissionQueue(1, 0), -7, key="ada", min_priority=least)
    await settle()
    assert client.place is not None
    assert (client.place.priority, client.place.asked) == (counts_as, -7)
    await client.end()


@pytest.mark.parametrize("seed", range(20))
async def test_nothing_leaks_whatever_callers_do(seed: int) -> None:
    """Requests arrive, are cancelled while queued or just admitted, end: bounds always hold."""
    generator = random.Random(seed)
    admission = AdmissionQueue(3, 5)
    clients: list[Caller] = []
    for _ in range(300):
        what = generator.random()
        if what < 0.5 or not clients:
            priority, key = generator.randint(-2, 2), generator.choice(("ada", "bob", ""))
            clients.append(Caller(admission, priority, key=key, min_priority=0 if key else None))
        else:
            client = clients.pop(generator.randrange(len(clients)))
            if what < 0.75:
                client.task.cancel()
            else:
                client._ends.set()
        if generator.random() < 0.7:
            await asyncio.sleep(0)
        assert 0 <= admission.num_running <= 3
        assert 0 <= admission.num_waiting <= 5
    for client in clients:
        client._ends.set()
    for client in clients:
        with contextlib.suppress(CapacityExceeded):
            await client.task
    await settle()
    assert (admission.num_running, admission.num_waiting) == (0, 0)
    (last,) = await calls(admission, 0)
    assert last.is_running
