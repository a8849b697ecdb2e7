"""A replica whose passes all fail, next to a healthy one: requests succeed and avoid it.

Its passes raise, as they do after a CUDA error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import outrider.model_server.lifecycle
from orchestrator.speculation.round_costs import PairCosts
from outrider.model_server import failure_policy as recovery
from outrider.settings.services import DraftConfig, ModelServiceConfig, TargetConfig
from outrider.v1 import sampling_pb2
from tests.services.parts import (
    GREEDY,
    KV_TOKENS,
    Brake,
    Greedy,
    Pair,
    Tiers,
    orchestrating,
    refusal,
)
from tests.services.replicas import Fault, Tier, tier
from tests.stack import Output, Stack, eventually

PROMPT = list(range(20, 60))
NUM_TOKENS = 24
HOW: dict[str, dict[str, Any]] = {
    "greedy": {"sampling": {**GREEDY, "max_tokens": NUM_TOKENS}},
    "coupled": {
        "sampling": {"temperature": 1.0, "seed": 3, "ignore_eos": True, "max_tokens": NUM_TOKENS},
        "verification": sampling_pb2.VERIFICATION_COUPLED,
    },
}


@contextlib.asynccontextmanager
async def faulty(
    model: Path, fault: Fault, kind: type[ModelServiceConfig] = TargetConfig
) -> AsyncIterator[Tier]:
    """A replica with a real model, whose passes fail while the fault is on."""
    load = outrider.model_server.lifecycle.load_served_engine

    def loaded(config: ModelServiceConfig) -> Any:
        loaded_model = load(config)
        engine = loaded_model.engine
        engine.forward = fault.around(engine.forward)  # type: ignore[method-assign]
        return loaded_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outrider.model_server.lifecycle, "load_served_engine", loaded)
        async with tier(kind, model=str(model), simulate=None, kv_cache_tokens=KV_TOKENS) as served:
            patch.undo()
            yield served


@contextlib.asynccontextmanager
async def two_targets(
    pair: Pair,
    redis_url: str,
    fault: Fault,
    draft: Tier | None = None,
    *,
    both: bool = False,
    **settings: Any,
) -> AsyncIterator[tuple[Stack, Tier, Tier]]:
    """The first is the faulty one, or `both` are."""
    other = fault if both else Fault()
    async with faulty(pair.target, fault) as broken, faulty(pair.target, other) as healthy:
        endpoints = ",".join(f"127.0.0.1:{t.server.port}" for t in (broken, healthy))
        tiers = Tiers(healthy.server, draft.server if draft else None)
        async with orchestrating(tiers, redis_url, target_endpoint=endpoints, **settings) as system:

            async def are_known() -> bool:
                """Both have had a generation."""
                await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 1}, gamma=0)
                return all([(await t.info()).load.num_opened_total for t in (broken, healthy)])

            await eventually(are_known)
            yield system, broken, healthy


async def outputs(system: Stack, num: int, how: str, **fields: Any) -> list[Output]:
    return await asyncio.gather(
        *(system.generate(PROMPT[n % 8 :], **{**HOW[how], **fields}) for n in range(num))
    )


@pytest.mark.parametrize("leaves_service", [True, False])
async def test_a_broken_replica_attracts_no_traffic(
    leaves_service: bool,
    pair: Pair,
    redis_url: str,
    greedy: Greedy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if it does not notice its failures. It fails fast, so it would be the least loaded."""
    monkeypatch.setattr(recovery, "MAX_FAILED_SELF_TESTS", 10_000)
    if not leaves_service:
        monkeypatch.setattr(recovery, "MAX_FAILED_PASSES", 10_000)
    fault = Fault()
    async with two_targets(pair, redis_url, fault) as (system, broken, _):
        fault.is_on = True
        num_before = (await broken.info()).load.num_opened_total
        for _ in range(5):
            for n, output in enumerate(await outputs(system, 8, "greedy", gamma=0)):
                assert output.token_ids == greedy(PROMPT[n:], NUM_TOKENS)
        # Eight requests may be open when the first fails. Then one tries it from time to time.
        assert (await broken.info()).load.num_opened_total - num_before < 20

        fault.is_on = False

        async def is_used() -> bool:
            num = (await broken.info()).load.num_opened_total
            await outputs(system, 4, "greedy", gamma=0)
            return (await broken.info()).load.num_opened_total > num + 1

        await eventually(is_used)


@pytest.mark.parametrize("how", HOW)
async def test_one_failed_pass_ends_no_stream(
    how: str, pair: Pair, redis_url: str, brake: Brake
) -> None:
    """Its generations continue at the other replica with the same tokens."""
    fault = Fault()
    async with two_targets(pair, redis_url, fault) as (system, _, _):
        plain = [output.token_ids for output in await outputs(system, 8, how, gamma=0)]
        brake.set(NUM_TOKENS // 2)
        running = asyncio.create_task(outputs(system, 8, how, gamma=0))
        num_passes = fault.num_passes

        async def has_begun() -> bool:
            return fault.num_passes > num_passes + 4

        await eventually(has_begun)
        fault.num_to_fail = 1
        brake.release()
        assert [output.token_ids for output in await running] == plain
        assert fault.num_failed == 1


async def test_without_another_replica_the_request_fails(pair: Pair, redis_url: str) -> None:
    fault = Fault()
    async with (
        faulty(pair.target, fault) as only,
        orchestrating(Tiers(only.server, None), redis_url) as system,
    ):
        fault.num_to_fail = 1
        refused = await refusal(system.generate(PROMPT, **HOW["greedy"]))
        assert refused.code is grpc.StatusCode.INTERNAL
        assert "the target replica failed in this generation" in refused.message
        assert len((await system.generate(PROMPT, **HOW["greedy"])).token_ids) == NUM_TOKENS


async def test_a_failure_at_both_replicas_fails_the_request(
    pair: Pair, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed pass is retried once."""
    fault = Fault()
    async with two_targets(pair, redis_url, fault, both=True) as (system, _, _):
        fault.num_to_fail = 2
        refused = await refusal(system.generate(PROMPT, **HOW["greedy"]))
        assert refused.code is grpc.StatusCode.INTERNAL
        assert fault.num_failed == 2


async def test_outputs_do_not_depend_on_a_broken_draft(
    pair: Pair, redis_url: str, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves service, and drafts again when its passes succeed."""
    monkeypatch.setattr(recovery, "MAX_FAILED_SELF_TESTS", 10_000)
    fault, good = Fault(), Fault()
    async with (
        faulty(pair.draft, fault, DraftConfig) as draft,
        faulty(pair.target, good) as target,
        orchestrating(Tiers(target.server, draft.server), redis_url, gamma=4) as system,
    ):
        fault.is_on = True
        for _ in range(5):
            (output,) = await outputs(system, 1, "greedy")
            assert output.token_ids == greedy(PROMPT, NUM_TOKENS)
        assert not await draft.is_healthy()
        fault.is_on = False

        async def drafts() -> bool:
            (output,) = await outputs(system, 1, "greedy")
            assert output.token_ids == greedy(PROMPT, NUM_TOKENS)
            return output.speculation.num_accepted_tokens > 0

        await eventually(drafts)
        assert await draft.is_healthy()


@pytest.mark.parametrize("num_failures", [0, 1])
async def test_the_whole_context_at_another_replica_is_not_measured_as_a_round(
    num_failures: int,
    pair: Pair,
    redis_url: str,
    brake: Brake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every round is measured, except those that processed a prompt or the whole context again."""
    rounds: list[float] = []
    observe_result = PairCosts.observe_result

    def noted(costs: PairCosts, latency_s: float, step_s: float, *, has_waited: bool) -> None:
        rounds.append(step_s)
        observe_result(costs, latency_s, step_s, has_waited=has_waited)

    monkeypatch.setattr(PairCosts, "observe_result", noted)
    fault = Fault()
    async with two_targets(pair, redis_url, fault, both=True) as (system, _, _):
        rounds.clear()
        brake.set(NUM_TOKENS // 2)
        running = asyncio.create_task(system.generate(PROMPT, **HOW["greedy"]))

        async def is_held() -> bool:
            return len(rounds) == NUM_TOKENS // 2 - 1

        await eventually(is_held)
        fault.num_to_fail = num_failures
        brake.release()
        assert len((await running).token_ids) == NUM_TOKENS
    assert fault.num_failed == num_failures
    assert len(rounds) == NUM_TOKENS - 1 - num_failures


async def test_gamma_is_chosen_by_the_costs_of_the_generations_own_replica(redis_url: str) -> None:
    """A slow and a fast target: each generation's decision has the costs of one of them."""
    slow_ms = 40
    async with (
        tier(simulate="step_ms=1,vocab_size=256") as fast,
        tier(simulate=f"step_ms={slow_ms},vocab_size=256") as slow,
        tier(DraftConfig, simulate="step_ms=0.5,survival=0.8,vocab_size=256") as draft,
    ):
        endpoints = ",".join(f"127.0.0.1:{t.server.port}" for t in (fast, slow))
        async with orchestrating(
            Tiers(fast.server, draft.server), redis_url, target_endpoint=endpoints
        ) as system:

            async def target_step_s() -> float:
                output = await system.generate(PROMPT, **HOW["greedy"])
                return float(output.speculation.decision.target_step_s[0])

            async def num_slow() -> int:
                return int((await slow.info()).load.num_opened_total)

            seen: set[bool] = set()

            async def both_were_seen() -> bool:
                num_before = await num_slow()
                step_s = await target_step_s()
                is_slow = await num_slow() > num_before
                assert step_s > slow_ms / 2000 or not is_slow
                seen.add(is_slow)
                return len(seen) == 2

            await eventually(both_were_seen)
