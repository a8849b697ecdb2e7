"""Outbox: no item is lost, and its end is always noticed."""

from __future__ import annotations

import asyncio

from outrider.runtime.grpc_streams import Outbox


async def test_items_pending_at_close_are_delivered_before_the_end() -> None:
    """Regression: with items pending at close, `batches` never ended."""
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
