"""Replicas of one tier with other settings: limits follow those that are there, and none is lost.

A replica that is restarted with another setting is one too.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from structlog.testing import capture_logs

import draft_service.app
import target_service.app
from outrider.cli.relay import Relay
from outrider.runtime.grpc_server import Server
from outrider.settings.services import DraftConfig, TargetConfig
from outrider.v1 import orchestrator_pb2, target_pb2
from tests.services.parts import (
    GREEDY,
    KV_TOKENS,
    STUCK_AFTER_S,
    Brake,
    Greedy,
    Pair,
    System,
    Tiers,
    disturbed,
    orchestrating,
    refusal,
)
from tests.services.streams import Stream, raw, row, target_open
from tests.stack import Output, eventually, request

PROMPT = list(range(20, 60))
NUM_TOKENS = 120
ACCEPTED = 1


@contextlib.asynccontextmanager
async def replica(model: Path, *, is_draft: bool = False, **settings: Any) -> AsyncIterator[Server]:
    how = {
        "model": str(model),
        "port": 0,
        "kv_cache_tokens": KV_TOKENS,
        "calibration_s": 0.0,
        "stuck_after_s": STUCK_AFTER_S,
        **settings,
    }
    serving = (
        draft_service.app.serving(DraftConfig(**how))
        if is_draft
        else target_service.app.serving(TargetConfig(**how))
    )
    async with serving as server:
        yield server


class Places:
    """Two addresses of a tier, at which replicas come and go."""

    def __init__(self, first: Relay, second: Relay) -> None:
        self.first, self.second = first, second

    @property
    def endpoints(self) -> str:
        return f"{self.first.address},{self.second.address}"

    @staticmethod
    def move(relay: Relay, server: Server) -> None:
        relay.retarget("127.0.0.1", server.port)


@contextlib.asynccontextmanager
async def places(server: Server) -> AsyncIterator[Places]:
    """The first is this server's; at the second there is nobody."""
    async with (
        Relay("127.0.0.1", 0, "127.0.0.1", server.port, 0.0) as first,
        Relay("127.0.0.1", 0, "127.0.0.1", 1, 0.0) as second,
    ):
        yield Places(first, second)


async def model_info(system: System) -> orchestrator_pb2.GetModelInfoResponse:
    return await system.client.GetModelInfo(orchestrator_pb2.GetModelInfoRequest(), timeout=60)


async def max_gamma_becomes(system: System, max_gamma: int) -> None:
    async def is_so() -> bool:
        return (await model_info(system)).max_gamma == max_gamma

    await eventually(is_so)


def with_gamma(gamma: int, num_tokens: int = 4) -> Any:
    return request(PROMPT, {**GREEDY, "max_tokens": num_tokens}, gamma=gamma)


async def test_the_smallest_max_gamma_of_the_pool_is_the_limit(pair: Pair, redis_url: str) -> None:
    """Whichever was there first; the limit rises again when the smaller one is gone."""
    async with (
        replica(pair.target, max_gamma=16) as large,
        places(large) as targets,
        orchestrating(Tiers(large, None), redis_url, target_endpoint=targets.endpoints) as system,
    ):
        assert (await model_info(system)).max_gamma == 16
        async with replica(pair.target, max_gamma=8) as small:
            targets.move(targets.second, small)
            await max_gamma_becomes(system, 8)
            assert (await model_info(system)).target.max_gamma == 8
            refused = await refusal(system.client.Generate(with_gamma(9), timeout=60).read())
            assert (refused.code, refused.fields) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                ["gamma"],
            )
            assert "[0, 8]" in refused.message
        await max_gamma_becomes(system, 16)
        assert (await system.client.Generate(with_gamma(9), timeout=60).read()).token_ids


async def test_a_draft_that_joins_late_lowers_the_limit_too(pair: Pair, redis_url: str) -> None:
    async with (
        replica(pair.target) as target,
        replica(pair.draft, is_draft=True, max_gamma=12) as draft,
        places(draft) as drafts,
        orchestrating(Tiers(target, None), redis_url, draft_endpoint=drafts.endpoints) as system,
    ):
        await max_gamma_becomes(system, 12)
        async with replica(pair.draft, is_draft=True, max_gamma=3) as small:
            drafts.move(drafts.second, small)
            await max_gamma_becomes(system, 3)
        await max_gamma_becomes(system, 12)


async def moved(
    system: System, brake: Brake, places: Places, large: Server, small: Server
) -> Output:
    """An output, the larger of whose two replicas goes in the middle of it; the smaller has γ 3."""

    async def replace() -> None:
        places.move(places.second, small)
        await max_gamma_becomes(system, 3)
        await large.grpc_server.stop(0)

    return await disturbed(system.client, brake, with_gamma(12, NUM_TOKENS), replace)


async def test_a_generation_moves_to_a_target_that_takes_fewer_draft_tokens(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    async with (
        replica(pair.target, max_gamma=16) as large,
        replica(pair.target, max_gamma=3) as small,
        replica(pair.draft, is_draft=True) as draft,
        places(large) as targets,
        orchestrating(Tiers(large, draft), redis_url, target_endpoint=targets.endpoints) as system,
    ):
        output = await moved(system, brake, targets, large, small)
    assert output.token_ids == greedy(PROMPT, NUM_TOKENS)
    assert output.origins[-40:].count(ACCEPTED) > 10


async def test_a_generation_moves_to_a_draft_that_drafts_fewer_tokens(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    async with (
        replica(pair.target) as target,
        replica(pair.draft, is_draft=True) as large,
        replica(pair.draft, is_draft=True, max_gamma=3) as small,
        places(large) as drafts,
        orchestrating(Tiers(target, large), redis_url, draft_endpoint=drafts.endpoints) as system,
    ):
        output = await moved(system, brake, drafts, large, small)
    assert output.token_ids == greedy(PROMPT, NUM_TOKENS)
    assert output.origins[-40:].count(ACCEPTED) > 10


async def test_a_generation_goes_where_the_context_is_long_enough(
    pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """Requests may be as long as the longest allows, and GetModelInfo says so."""
    num_tokens = 200
    async with (
        replica(pair.target, max_model_len=100) as short,
        replica(pair.target, max_model_len=300) as long,
        places(short) as targets,
        orchestrating(Tiers(short, None), redis_url, target_endpoint=targets.endpoints) as system,
    ):
        assert (await model_info(system)).target.max_context_len == 100
        targets.move(targets.second, long)

        async def is_long() -> bool:
            return (await model_info(system)).target.max_context_len == 300

        await eventually(is_long)
        for _ in range(3):
            output = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": num_tokens})
            assert output.token_ids == greedy(PROMPT, num_tokens)
        asked = request(PROMPT, {**GREEDY, "max_tokens": 261})
        refused = await refusal(system.client.Generate(asked, timeout=60).read())
        assert refused.fields == ["sampling.max_tokens"]
        assert "at most 260" in refused.message


async def test_replicas_with_other_sampling_defaults_are_not_mixed(
    pair: Pair, redis_url: str, tmp_path: Path
) -> None:
    """The one that is there serves; once it is gone, the other one's settings hold."""
    model = shutil.copytree(pair.target, tmp_path / "target")
    (model / "generation_config.json").write_text('{"temperature": 0.0, "top_k": 7}', "utf-8")
    async with (
        replica(model, generation_config="none") as other,
        replica(model) as former,
        places(former) as targets,
        orchestrating(Tiers(former, None), redis_url, target_endpoint=targets.endpoints) as system,
    ):
        assert (await model_info(system)).target.sampling_defaults.top_k == 7
        with capture_logs() as logs:
            targets.move(targets.second, other)

            async def is_refused() -> bool:
                return any(entry["event"] == "replica_refused" for entry in logs)

            await eventually(is_refused)
            (why,) = {entry["why"] for entry in logs if entry["event"] == "replica_refused"}
            assert "sampling_defaults" in why
            await former.grpc_server.stop(0)

            async def is_other() -> bool:
                return not (await model_info(system)).target.HasField("sampling_defaults")

            await eventually(is_other)
        output = await system.generate(PROMPT, sampling={"seed": 3, "max_tokens": 4})
        assert len(output.token_ids) == 4


async def kv_becomes(system: System, num_tokens: int) -> None:
    async def is_so() -> bool:
        return (await model_info(system)).target.kv_capacity_tokens == num_tokens

    await eventually(is_so)


async def test_limits_follow_a_target_that_is_restarted_with_less_memory(
    pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """Memory and context are told apart; what fits goes on being answered."""
    sampling = {**GREEDY, "max_tokens": 150}
    async with (
        replica(pair.target, kv_cache_tokens=256) as large,
        replica(pair.target, kv_cache_tokens=128) as small,
        places(large) as targets,
        orchestrating(Tiers(large, None), redis_url, target_endpoint=targets.endpoints) as system,
    ):
        assert (await system.generate(PROMPT, sampling=sampling)).token_ids == greedy(PROMPT, 150)
        targets.move(targets.first, small)
        await large.grpc_server.stop(0)
        await kv_becomes(system, 128)
        for prompt, field, said in (
            (PROMPT, "sampling.max_tokens", "at most 88"),
            ([1] * 129, "token_ids", "1 to 128"),
            ([1] * 128, "token_ids", "no room"),
        ):
            refused = await refusal(system.generate(prompt, sampling=sampling))
            assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
            assert "the target's KV cache of 128 tokens" in refused.message
            assert said in refused.message
        output = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 88})
        assert output.token_ids == greedy(PROMPT, 88)
        # Without a limit of its own it is cut to what there is.
        output = await system.generate([1] * 116, sampling=GREEDY)
        assert len(output.token_ids) == 12
    async with (
        replica(pair.target, max_model_len=100) as only,
        orchestrating(Tiers(only, None), redis_url) as system,
    ):
        refused = await refusal(system.generate(PROMPT, sampling=sampling))
        assert "the model's context of 100 tokens" in refused.message


async def test_nobody_waits_behind_what_fits_the_larger_replica_only(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    """It waits for that one; the smaller one answers whoever fits there meanwhile.

    When the larger one dies, what waits is refused by name, and what it had begun ends so.
    """
    sampling = {**GREEDY, "max_tokens": 2}
    async with (
        replica(pair.target, kv_cache_tokens=1_024) as large,
        replica(pair.target, kv_cache_tokens=256) as small,
        places(small) as targets,
        orchestrating(
            Tiers(large, None), redis_url, target_endpoint=targets.endpoints, target_wait_s=1.0
        ) as system,
    ):
        targets.move(targets.second, large)
        await kv_becomes(system, 1_024)
        brake.set(3)
        begun = aiter(system.client.Generate(asked_of([4] * 200, 100), timeout=200))
        await anext(begun)
        with capture_logs() as logs:

            async def waiting(prompt: list[int]) -> asyncio.Task[Output]:
                """One that is known to wait for room."""
                logs.clear()
                asking = asyncio.create_task(system.generate(prompt, sampling=sampling))

                async def is_short() -> bool:
                    return any(entry["event"] == "short_of_room" for entry in logs)

                await eventually(is_short)
                return asking

            async with raw(system.target.Verify()) as holder:
                await hold(holder, 600)
                waits = await waiting([2] * 300)
                for n in range(3):
                    output = await system.generate([n] * 90, sampling=sampling)
                    assert output.token_ids == greedy([n] * 90, 2)
                assert not waits.done()
            assert (await waits).token_ids == greedy([2] * 300, 2)
            async with raw(system.target.Verify()) as holder:
                await hold(holder, 600)
                waits = await waiting([3] * 300)
                await large.grpc_server.stop(0)
                refused = await refusal(waits)
        assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["token_ids"])
        assert "the target's KV cache of 256 tokens" in refused.message
        brake.release()
        ended = await refusal(to_its_end(begun))
        assert ended.code is grpc.StatusCode.UNAVAILABLE
        assert "no target has a KV cache for 300 tokens; the largest: 256" in ended.message
        assert (await model_info(system)).target.kv_capacity_tokens == 256
        assert (await system.generate([9], sampling=sampling)).token_ids == greedy([9], 2)


def asked_of(prompt: list[int], num_tokens: int) -> Any:
    return request(prompt, {**GREEDY, "max_tokens": num_tokens}, gamma=0)


async def to_its_end(chunks: Any) -> None:
    async for _ in chunks:
        pass


async def hold(stream: Stream, num_tokens: int) -> None:
    """So many tokens of the replica's memory, for as long as the stream is open."""
    opening = target_open(1, prompt_len=num_tokens, max_len=num_tokens + 10, age_ms=600_000)
    rows = [row(1, 0, [7] * num_tokens)]
    await stream.write(target_pb2.VerifyRequest(opens=[opening], rows=rows))
    assert isinstance(await stream.answer(1), target_pb2.VerifyResult)


async def test_requests_go_to_the_replica_that_they_fit(
    pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """The larger one, though the smaller one has less to do; limits follow when it comes."""
    async with (
        replica(pair.target, kv_cache_tokens=128) as small,
        replica(pair.target, kv_cache_tokens=512) as large,
        places(small) as targets,
        orchestrating(Tiers(small, None), redis_url, target_endpoint=targets.endpoints) as system,
    ):
        refused = await refusal(system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 100}))
        assert "at most 88" in refused.message
        targets.move(targets.second, large)
        await kv_becomes(system, 512)
        outputs = await asyncio.gather(
            *(system.generate([n] * 40, sampling={**GREEDY, "max_tokens": 100}) for n in range(4))
        )
        for n, output in enumerate(outputs):
            assert output.token_ids == greedy([n] * 40, 100)
        assert (await system.target_load()).num_opened_total == 0
