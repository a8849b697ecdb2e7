"""`outrider drafts`: operators change the rollout in Redis; `list` shows it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from typer.testing import CliRunner

from outrider.cli.app import app
from outrider.draft_rollout import Role, Rollout
from outrider.errors import ConfigError, Unavailable
from outrider.redis.rollout_store import RolloutStore
from tests import redis_fixture

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url

_CANARY = Rollout(1, current="old", trial="new", rolled_back=("worse",))


def store_rollout(url: str, target: str = "target", rollout: Rollout = _CANARY) -> None:
    async def write() -> None:
        store = RolloutStore(url, target)
        assert await store.replace(0, rollout)
        await store.close()

    asyncio.run(write())


def stored(url: str, target: str = "target") -> Rollout:
    async def read() -> Any:
        store = RolloutStore(url, target)
        found = await store.sync(0, {})
        await store.close()
        return found

    rollout: Rollout = asyncio.run(read()).rollout
    return rollout


def drafts(*words: str) -> str:
    """The output. Raises what the command raises."""
    result = CliRunner().invoke(app(["drafts"]), ["drafts", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_operator_promotes_rolls_back_and_retries(redis_url: str) -> None:
    store_rollout(redis_url)
    assert "new promoted by the operator" in drafts("promote", "new", "--redis-url", redis_url)
    assert stored(redis_url).current == "new"
    drafts("roll-back", "old", "--redis-url", redis_url)
    assert stored(redis_url).rolled_back == ("worse", "old")
    drafts("retry", "worse", "--redis-url", redis_url)
    assert stored(redis_url).role("worse") is Role.WAITING
    assert stored(redis_url).version == 4


def test_redis_is_found_in_the_orchestrators_own_variables(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_rollout(redis_url)
    monkeypatch.setenv("OUTRIDER_ORCHESTRATOR_REDIS_URL", redis_url)
    drafts("promote", "new")
    assert stored(redis_url).current == "new"


def test_one_of_several_targets_is_named(redis_url: str) -> None:
    store_rollout(redis_url)
    store_rollout(redis_url, "other")
    with pytest.raises(ConfigError, match="name one; targets with draft revisions: other, target"):
        drafts("promote", "new", "--redis-url", redis_url)
    drafts("promote", "new", "--redis-url", redis_url, "--target", "other")
    assert (stored(redis_url).current, stored(redis_url, "other").current) == ("old", "new")


def test_what_cannot_be_done_is_said(redis_url: str) -> None:
    with pytest.raises(ConfigError, match="targets with draft revisions: none"):
        drafts("promote", "new", "--redis-url", redis_url)
    store_rollout(redis_url)
    with pytest.raises(ConfigError, match="typo has no role yet; those with one are old, new"):
        drafts("promote", "typo", "--redis-url", redis_url)
    with pytest.raises(ConfigError, match="promote another revision"):
        drafts("roll-back", "old", "--redis-url", redis_url)
    with pytest.raises(Unavailable, match="Redis cannot be reached"):
        drafts("promote", "new", "--redis-url", "redis://127.0.0.1:1")
    assert stored(redis_url) == _CANARY
