"""Outbox: nothing pending is lost, and its end is never slept through."""

from __future__ import annotations

import asyncio

from outrider.runtime.grpc_streams import Outbox


async def test_what_is_pending_at_the_close_comes_before_the_end() -> None:
    """The bug: with items pending at the close, the end was waited for for ever."""
    outbox: Outbox[int] = Outbox()
    outbox.put([1, 2])
    outbox.close()
    async with asyncio.timeout(20):
        assert [items async for items in outbox.batches()] == [[1, 2]]


async def test_everything_pending_is_one_batch() -> None:
    outbox: Outbox[int] = Outbox()
    batches = outbox.batches()
    outbox.put([1])
    outbox.put([2, 3])
    assert await anext(batches) == [1, 2, 3]
    outbox.put([4])
    assert await anext(batches) == [4]
    outbox.close()
    assert await anext(batches, None) is None
