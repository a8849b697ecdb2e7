"""One draft replica serves two targets with the same tokenizer at once, each as if it were alone.

Each target has an orchestrator and a Redis database of its own; the draft is in both registries.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import draft_service.app
import target_service.app
from outrider.runtime.grpc_server import Server
from outrider.settings.services import DraftConfig, TargetConfig
from outrider.v1 import orchestrator_pb2
from tests.services.parts import (
    GREEDY,
    KV_TOKENS,
    STUCK_AFTER_S,
    Greedy,
    Pair,
    System,
    Tiers,
    orchestrating,
)
from tests.stack import eventually
from tests.telemetry.parts import Scrape, get
from tests.tiny_models import make_tiny_draft

PROMPT = [7, 8, 9, 10]
NUM_TOKENS = 24
QUICK: dict[str, Any] = {
    "port": 0,
    "kv_cache_tokens": KV_TOKENS,
    "calibration_s": 0.0,
    "stuck_after_s": STUCK_AFTER_S,
}


class Both(NamedTuple):
    first: System
    second: System
    draft: Server


@pytest.fixture(scope="module")
def second_target(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, which the draft agrees with less."""
    directory = tmp_path_factory.mktemp("second") / "target"
    return make_tiny_draft(pair.target, directory, seed=9, noise=0.1)


@contextlib.asynccontextmanager
async def two_targets(
    pair: Pair, second_target: Path, redis_url: str, **settings: Any
) -> AsyncIterator[Both]:
    """Two targets, one draft, two orchestrators that find their replicas in their registries."""
    databases = [f"{redis_url}?db={number}" for number in (1, 2)]
    everywhere = ",".join(databases)
    async with contextlib.AsyncExitStack() as stack:
        draft = await stack.enter_async_context(
            draft_service.app.serving(
                DraftConfig(model=str(pair.draft), redis_url=everywhere, metrics_port=0, **QUICK)
            )
        )
        systems = []
        for model, database in zip((pair.target, second_target), databases, strict=True):
            target = await stack.enter_async_context(
                target_service.app.serving(
                    TargetConfig(model=str(model), redis_url=database, **QUICK)
                )
            )
            registry = {"target_endpoint": "registry", "draft_endpoint": "registry"}
            systems.append(
                await stack.enter_async_context(
                    orchestrating(Tiers(target, draft), database, **registry, **settings)
                )
            )
        yield Both(*systems, draft)


async def test_each_target_gets_its_own_output_with_drafts(
    pair: Pair, second_target: Path, redis_url: str
) -> None:
    """At the same time, and sessions of the same name: the draft keeps them apart."""
    references = (Greedy(pair.target), Greedy(second_target))
    sampling = {**GREEDY, "max_tokens": NUM_TOKENS}
    async with two_targets(pair, second_target, redis_url) as both:
        systems = (both.first, both.second)
        contexts = [list(PROMPT), list(PROMPT)]
        for turn in range(3):
            fields = {"session_id": "demo", "create_session": turn == 0, "gamma": 3}
            outputs = await asyncio.gather(
                *(system.generate(PROMPT, sampling=sampling, **fields) for system in systems)
            )
            for output, reference, context in zip(outputs, references, contexts, strict=True):
                assert output.token_ids == reference(context, NUM_TOKENS)
                assert output.speculation.num_draft_tokens > 0
                context += output.token_ids + PROMPT
        load = await both.first.draft_load()
        scraped = Scrape(await get(both.draft.metrics_port))
    names = sorted(target.name for target in load.targets)
    assert names == sorted((str(pair.target), str(second_target)))
    assert [target.num_open_generations for target in load.targets] == [0, 0]
    for target in load.targets:
        assert 0 < target.num_agreed_tokens_total <= target.num_compared_tokens_total
        labels = {"target": target.name, "fingerprint": target.model_fingerprint[:12]}
        for name in ("compared", "agreed"):
            expected = getattr(target, f"num_{name}_tokens_total")
            assert scraped(f"outrider_draft_target_{name}_tokens_total", **labels) == expected
        assert scraped("outrider_draft_target_tokens_total", **labels) > 0
    # Nothing was displaced: every failure counter is zero.
    assert scraped("outrider_failures_total", tier="draft", reason="displaced") == 0
    assert load.num_idle_sessions == 2


async def test_the_sessions_of_one_are_deleted_alone(
    pair: Pair, second_target: Path, redis_url: str
) -> None:
    sampling = {**GREEDY, "max_tokens": 4}
    async with two_targets(pair, second_target, redis_url) as both:
        for system in (both.first, both.second):
            await system.generate(
                PROMPT, sampling=sampling, session_id="demo", create_session=True, gamma=3
            )
        assert (await both.first.draft_load()).num_idle_sessions == 2
        await both.first.client.DeleteSession(
            orchestrator_pb2.DeleteSessionRequest(session_id="demo")
        )

        async def is_one_left() -> bool:
            return (await both.first.draft_load()).num_idle_sessions == 1

        await eventually(is_one_left)
        again = await both.second.generate(PROMPT, sampling=sampling, session_id="demo", gamma=3)
        assert len(again.token_ids) == 4
