"""Replicas come and go inside a running stream: the same tokens, at another replica."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest

import draft_service.app
import orchestrator.app
import target_service.app
from orchestrator.replicas.pool import ReplicaPool
from outrider.cli.relay import Relay
from outrider.runtime.grpc_server import Server
from outrider.settings.services import DraftConfig, TargetConfig
from outrider.v1 import (
    draft_pb2,
    draft_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    sampling_pb2,
    target_pb2,
    target_pb2_grpc,
)
from tests.e2e.byte_tokenizer import VOCAB_SIZE, add_byte_tokenizer
from tests.services import parts
from tests.services.parts import (
    CONTEXT_LEN,
    GREEDY,
    KV_TOKENS,
    STUCK_AFTER_S,
    Brake,
    Greedy,
    Pair,
    Tiers,
    orchestrating,
    refusal,
)
from tests.stack import Output, eventually, request
from tests.tiny_models import make_tiny_draft, make_tiny_model

PROMPT = list(range(20, 60))
NUM_TOKENS = 160
ACCEPTED = 1
SETTINGS: dict[str, Any] = {
    "kv_cache_tokens": KV_TOKENS,
    "calibration_s": 0.0,
    "stuck_after_s": STUCK_AFTER_S,
}


class Replicas:
    """Of one tier; each can be stopped and its place be taken."""

    def __init__(self) -> None:
        self.servers: list[Server] = []

    @property
    def endpoints(self) -> str:
        return ",".join(f"127.0.0.1:{server.port}" for server in self.servers)


@contextlib.asynccontextmanager
async def replicas(pair: Pair, num_targets: int, num_drafts: int) -> AsyncIterator[list[Replicas]]:
    settings: dict[str, Any] = {"port": 0, **SETTINGS}
    targets, drafts = Replicas(), Replicas()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(num_targets):
            config = TargetConfig(model=str(pair.target), **settings)
            serving = target_service.app.serving(config)
            targets.servers.append(await stack.enter_async_context(serving))
        for _ in range(num_drafts):
            draft_config = DraftConfig(model=str(pair.draft), **settings)
            drafting = draft_service.app.serving(draft_config)
            drafts.servers.append(await stack.enter_async_context(drafting))
        yield [targets, drafts]


@contextlib.asynccontextmanager
async def serving(
    tiers: list[Replicas], redis_url: str, **settings: Any
) -> AsyncIterator[orchestrator_pb2_grpc.OrchestratorServiceStub]:
    """Every replica is connected or refused. `parts`' clients are of each tier's first one."""
    targets, drafts = tiers
    first = Tiers(targets.servers[0], drafts.servers[0] if drafts.servers else None)
    pools: list[ReplicaPool[Any]] = []

    class Noted(ReplicaPool[Any]):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            pools.append(self)

    async def are_known() -> bool:
        links = [link for pool in pools for link in pool.links.values()]
        num_replicas = len(targets.servers) + len(drafts.servers)
        return len(links) == num_replicas and all(link.condition != "away" for link in links)

    endpoints = {
        "target_endpoint": targets.endpoints,
        "draft_endpoint": drafts.endpoints or None,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orchestrator.app, "ReplicaPool", Noted)
        async with orchestrating(first, redis_url, **{**endpoints, **settings}) as system:
            await eventually(are_known)
            yield system.client


async def num_open(server: Server, tier: str = "target") -> int:
    """Generations that a replica holds."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        if tier == "draft":
            asked = draft_pb2.DraftServiceGetModelInfoRequest()
            drafting = await draft_pb2_grpc.DraftServiceStub(channel).GetModelInfo(asked)
            return int(drafting.load.num_open_generations)
        stub = target_pb2_grpc.TargetServiceStub(channel)
        answer = await stub.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest())
    return int(answer.load.num_open_generations)


async def where(replicas: Replicas, tier: str = "target") -> Server:
    """The one replica that holds the one generation there is."""
    found: list[Server] = []

    async def is_one() -> bool:  # a generation that has ended may still be there for a moment
        found[:] = [server for server in replicas.servers if await num_open(server, tier)]
        return len(found) == 1

    await eventually(is_one)
    return found[0]


async def disturbed(client: Any, brake: Brake, disturb: Any, **how: Any) -> Output:
    how = {"gamma": 4, "sampling": {**GREEDY, "max_tokens": NUM_TOKENS}} | how
    return await parts.disturbed(client, brake, request(PROMPT, **how), disturb)


@pytest.mark.slow
@pytest.mark.parametrize("num_drafts", [0, 1])
async def test_a_target_dies_and_another_goes_on(
    num_drafts: int, pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    async with replicas(pair, 2, num_drafts) as tiers, serving(tiers, redis_url) as client:

        async def kill() -> None:
            await (await where(tiers[0])).grpc_server.stop(0)

        output = await disturbed(client, brake, kill)
    assert output.token_ids == greedy(PROMPT, NUM_TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("verification", ["coupled", "rejection"])
async def test_sampled_outputs_go_on_too(
    verification: str, pair: Pair, redis_url: str, brake: Brake
) -> None:
    """Coupled ones with the very tokens that they would have had. All keep their fields."""
    fields: dict[str, Any] = {"prompt_logprobs": 1, "bad_words_token_ids": [{"ids": [7, 9]}]}
    free = {"temperature": 1.0, "seed": 11, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    fields["bad_words_token_ids"] += [{"ids": [token_id]} for token_id in range(100, 180)]
    how: dict[str, Any] = {
        "sampling": {**free, **fields},
        "verification": sampling_pb2.Verification.Value(f"VERIFICATION_{verification.upper()}"),
    }
    async with replicas(pair, 2, 1) as tiers, serving(tiers, redis_url) as client:
        plain = Output()
        async for chunk in client.Generate(request(PROMPT, **{**how, "gamma": 0}), timeout=200):
            plain.add(chunk)

        async def kill() -> None:
            await (await where(tiers[0])).grpc_server.stop(0)

        output = await disturbed(client, brake, kill, **how)
    assert len(output.token_ids) == NUM_TOKENS
    assert not set(output.token_ids) & set(range(100, 180))
    if verification == "coupled":
        assert output.token_ids == plain.token_ids


async def test_a_draft_dies_and_another_drafts(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    async with replicas(pair, 1, 2) as tiers, serving(tiers, redis_url) as client:

        async def kill() -> None:
            await (await where(tiers[1], "draft")).grpc_server.stop(0)

        output = await disturbed(client, brake, kill)
    assert output.token_ids == greedy(PROMPT, NUM_TOKENS)
    assert output.origins[-60:].count(ACCEPTED) > 10, "the other one drafts"


async def test_no_target_for_a_while(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    """The only one dies; a new one at the same address goes on with the stream."""
    async with (
        contextlib.AsyncExitStack() as later,
        replicas(pair, 1, 0) as tiers,
        # The address is the relay's: nobody else can take it meanwhile.
        Relay("127.0.0.1", 0, "127.0.0.1", tiers[0].servers[0].port, 0.0) as relay,
        serving(tiers, redis_url, target_endpoint=relay.address, target_wait_s=60.0) as client,
    ):

        async def replace() -> None:
            await tiers[0].servers[0].grpc_server.stop(0)
            config = TargetConfig(model=str(pair.target), port=0, **SETTINGS)
            other = await later.enter_async_context(target_service.app.serving(config))
            relay.retarget("127.0.0.1", other.port)

        output = await disturbed(client, brake, replace, gamma=0)
    assert output.token_ids == greedy(PROMPT, NUM_TOKENS)


async def test_none_comes_back(pair: Pair, redis_url: str, brake: Brake) -> None:
    """What was emitted is recorded, and the call fails by name once patience is at an end."""
    async with (
        replicas(pair, 1, 0) as tiers,
        serving(tiers, redis_url, target_wait_s=0.5) as client,
    ):

        async def kill() -> None:
            await tiers[0].servers[0].grpc_server.stop(0)

        refused = await refusal(disturbed(client, brake, kill))
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert "target" in refused.message


async def test_new_streams_go_to_the_least_loaded(pair: Pair, redis_url: str, brake: Brake) -> None:
    brake.set(1)
    async with replicas(pair, 2, 0) as tiers, serving(tiers, redis_url) as client:
        how = {"gamma": 0, "sampling": {**GREEDY, "max_tokens": CONTEXT_LEN - 100}}
        calls = [client.Generate(request(PROMPT, **how), timeout=200) for _ in range(4)]
        for call in calls:
            await call.read()
        assert [await num_open(server) for server in tiers[0].servers] == [2, 2]
        for call in calls:
            call.cancel()

        async def are_free() -> bool:
            return not any([await num_open(server) for server in tiers[0].servers])

        await eventually(are_free)


async def test_a_session_goes_where_its_keys_and_values_lie(pair: Pair, redis_url: str) -> None:
    async with replicas(pair, 2, 0) as tiers, serving(tiers, redis_url) as client:
        how = {"gamma": 0, "sampling": {**GREEDY, "max_tokens": 8}}
        for number in range(3):
            output = Output()
            asked = request(PROMPT, session_id="sticky", create_session=number == 0, **how)
            async for chunk in client.Generate(asked, timeout=200):
                output.add(chunk)
            assert output.result is not None
            assert bool(output.result.usage.cached_tokens) == (number > 0)


async def test_a_replica_with_another_model_is_not_used(pair: Pair, redis_url: str) -> None:
    """It is refused by name in the log; the others serve."""
    async with replicas(pair, 1, 0) as tiers:
        stranger = TargetConfig(model=str(pair.draft), port=0, calibration_s=0.0)
        async with target_service.app.serving(stranger) as other:
            tiers[0].servers.append(other)
            async with serving(tiers, redis_url) as client:
                calls = [
                    client.Generate(
                        request(PROMPT, {**GREEDY, "max_tokens": 8}, gamma=0), timeout=200
                    )
                    for _ in range(4)
                ]
                for call in calls:
                    async for _ in call:
                        pass
                assert 0 in [await num_open(server) for server in tiers[0].servers]


@pytest.mark.slow
async def test_structured_outputs_go_on_too(redis_url: str, brake: Brake, tmp_path: Path) -> None:
    """Target and draft die inside the object; later its client leaves and resumes it."""
    size = {"minItems": 30, "maxItems": 40}
    schema = {
        "type": "object",
        "properties": {"ids": {"type": "array", "items": {"enum": [1, "two"]}, **size}},
        "required": ["ids"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    how: dict[str, Any] = {
        "sampling": {
            "temperature": 1.0,
            "seed": 7,
            "max_tokens": NUM_TOKENS * 2,
            "structured_outputs": sampling_pb2.StructuredOutputs(json=json.dumps(schema)),
        },
        "verification": sampling_pb2.VERIFICATION_COUPLED,
    }
    target = make_tiny_model("llama", tmp_path / "target", vocab_size=VOCAB_SIZE)
    pair = Pair(target, make_tiny_draft(target, tmp_path / "draft"))
    for model in pair:
        add_byte_tokenizer(model)
    settings = {"tokenizer": str(target)}
    async with (
        replicas(pair, 2, 2) as tiers,
        serving(tiers, redis_url, **settings) as client,
    ):
        plain = Output()
        asked = request("x", session_id="s", create_session=True, **{**how, "gamma": 0})
        async for chunk in client.Generate(asked, timeout=200):
            plain.add(chunk)
        again = orchestrator_pb2.GenerateRequest(session_id="s", resume_from=20)
        resumed = Output()
        async for chunk in client.Generate(again, timeout=200):
            resumed.add(chunk)

        async def kill() -> None:
            for index, tier in enumerate(("target", "draft")):
                await (await where(tiers[index], tier)).grpc_server.stop(0)

        output = await parts.disturbed(client, brake, request("x", gamma=4, **how), kill)
    assert output.token_ids == plain.token_ids
    assert resumed.token_ids == plain.token_ids[20:]
    jsonschema.validate(json.loads(output.text), schema)
