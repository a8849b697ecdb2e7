"""Malformed fields of a session's hash: every field, every method of the store that reads it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from orchestrator.sessions import KvHandle, Lease, SessionStore
from orchestrator.sessions.records import Cursor
from outrider.errors import (
    InvalidRequest,
    LeaseLost,
    OutriderError,
    SessionNotFound,
    Unavailable,
    UnreadableRecord,
)
from tests.orchestrator.sessions.malformed import (
    JUNK,
    KEY,
    NUMBERS,
    TEXTS,
    TOKENS,
    keeper,
    redis_hash,
)
from tests.orchestrator.sessions.parts import MODEL, begin, leased, round_of, tokens_of
from tests.redis_fixture import redis_command

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def saved(store: SessionStore, redis_url: str) -> Callable[[str, str], bytes]:
    """Restores session s as it was after its first turn, with one field changed."""
    lease = await leased(store)
    await store.begin_turn(lease, [1, 2], keep_len=0, messages=MESSAGES, turn_json="{}")
    handle = KvHandle("target:0", lease.epoch, 2)
    await store.record(lease, round_of(3, kv=handle))
    await store.release(lease, target_kv=handle, draft_kv=handle)
    other = await leased(store, "other")
    await begin(store, other, [1])
    return keeper(redis_url)


async def outcome(action: Awaitable[object]) -> object:
    """The result, or the error that the store documents. Every UnreadableRecord names s."""
    try:
        return await action
    except UnreadableRecord as error:
        return error if str(error).startswith("session s: its record ") else str(error)
    except (InvalidRequest, LeaseLost, SessionNotFound, Unavailable) as error:
        return error


async def acquired(store: SessionStore, *, takeover: bool) -> Lease:
    return await store.acquire("s", create=True, model=MODEL, takeover=takeover)


@pytest.mark.parametrize("name", NUMBERS)
async def test_a_malformed_number_makes_a_session_unreadable(
    name: str, store: SessionStore, redis_url: str, saved: Callable[[str, str], bytes]
) -> None:
    """Nothing is written to it, the list counts it, and it can be deleted."""
    for value in JUNK:
        before = saved(name, value)
        for read in (
            store.get("s"),
            acquired(store, takeover=False),
            acquired(store, takeover=True),
        ):
            error = await outcome(read)
            assert isinstance(error, UnreadableRecord), (value, error)
            assert f"'{name}'" in str(error)
        page = await store.page(0)
        assert [one.session_id for one in page.sessions] == ["other"], value
        assert page.num_unreadable == 1
        assert redis_hash(redis_url) == before
        await store.delete("s")
        assert redis_command(redis_url, "EXISTS", KEY, TOKENS) == b":0"


@pytest.mark.parametrize("name", TEXTS)
async def test_a_malformed_text_is_no_internal_error(
    name: str, store: SessionStore, redis_url: str, saved: Callable[[str, str], bytes]
) -> None:
    """A text that is valid for its field is read; any other makes the session unreadable."""
    for value in JUNK:
        saved(name, value)
        is_readable = not isinstance(await outcome(store.get("s")), UnreadableRecord)
        page = await store.page(0)
        assert len(page.sessions) + page.num_unreadable == 2
        for takeover in (False, True):
            saved(name, value)
            lease = await outcome(acquired(store, takeover=takeover))
            if is_readable:
                assert isinstance(lease, Lease) or name == "model", (value, lease)
            else:
                assert isinstance(lease, UnreadableRecord), (value, lease)
                assert not redis_command(redis_url, "HGET", KEY, "owner").startswith(b"$1")
        saved(name, value)
        await store.delete("s")
        assert redis_command(redis_url, "EXISTS", KEY, TOKENS) == b":0"


@pytest.mark.parametrize("name", ["model", "num_tokens"])
async def test_a_session_without_a_field_that_it_needs(
    name: str, store: SessionStore, redis_url: str, saved: Callable[[str, str], bytes]
) -> None:
    saved("mood", "good")
    redis_command(redis_url, "HDEL", KEY, name)
    expected = UnreadableRecord if name == "model" else SessionNotFound
    for read in (store.get("s"), store.acquire("s", create=False, model=MODEL)):
        assert isinstance(await outcome(read), expected)
    page = await store.page(0)
    assert [one.session_id for one in page.sessions] == ["other"]
    assert page.num_unreadable == (name == "model")


async def test_a_session_whose_tokens_are_of_another_type_is_deleted(
    store: SessionStore, redis_url: str, saved: Callable[[str, str], bytes]
) -> None:
    saved("mood", "good")
    redis_command(redis_url, "DEL", TOKENS)
    redis_command(redis_url, "RPUSH", TOKENS, "x")
    for read in (store.get("s"), acquired(store, takeover=True)):
        with pytest.raises(UnreadableRecord, match="session s: "):
            await read
    await store.delete("s")
    assert redis_command(redis_url, "EXISTS", KEY, TOKENS) == b":0"


@pytest.mark.parametrize("name", [*NUMBERS, *TEXTS])
async def test_a_holder_of_a_session_that_becomes_malformed(
    name: str, store: SessionStore, redis_url: str
) -> None:
    """Each write succeeds or is refused by name; a one-off session is still deleted."""
    lease = await leased(store)
    restore = keeper(redis_url)
    writes: list[Callable[[Lease], Awaitable[None]]] = [
        lambda held: begin(store, held, [1, 2]),
        lambda held: store.record(held, round_of(1)),
        lambda held: store.renew(held),
        lambda held: store.release(held, target_kv=None, draft_kv=None),
        lambda held: store.release(held, target_kv=None, draft_kv=None, delete=True),
    ]
    for value in JUNK:
        for write in writes:
            restore(name, value)
            result = await outcome(write(replace(lease, cursor=Cursor())))
            allowed = (LeaseLost, UnreadableRecord) if name in NUMBERS else ()
            assert result is None or isinstance(result, allowed), (value, result)


async def test_a_malformed_session_is_left_whole_by_a_turn_that_is_refused(
    store: SessionStore, redis_url: str
) -> None:
    lease = await leased(store)
    await begin(store, lease, [1, 2, 3])
    redis_command(redis_url, "HSET", KEY, "num_turns", "many")
    later = replace(lease, epoch=lease.epoch + 1, cursor=Cursor(committed_len=3))
    redis_command(redis_url, "HSET", KEY, "lease_epoch", str(later.epoch))
    before = redis_hash(redis_url)
    with pytest.raises(OutriderError, match=r"session s: .*'num_turns'"):
        await begin(store, later, [4], keep_len=1)
    assert redis_hash(redis_url) == before
    redis_command(redis_url, "HSET", KEY, "num_turns", "1")
    assert await tokens_of(store) == [1, 2, 3]
