"""Lifecycle of a replica: probes, streams and registry while it starts and drains.

Most tiers are simulated: what is tested is the service around an engine, which is the same.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

import grpc
import pytest

import outrider.model_server.lifecycle
from outrider.engine.loading.linear_kernels import OneDnnFloat32
from outrider.redis.registry import ReplicaState
from outrider.runtime.grpc_server import LIVENESS
from outrider.settings.services import DraftConfig
from outrider.v1 import draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc
from tests.engine.cpu import cpu_has
from tests.services.parts import Pair, both_tiers
from tests.services.programs import ended
from tests.services.replicas import (
    DRAINING,
    PROMPT,
    READY,
    SERVING,
    TIMEOUT_S,
    Frame,
    has_states,
    process_target,
    registered,
    tier,
)
from tests.services.streams import draft_commit, draft_open, raw, row, target_open
from tests.stack import eventually

BEST_KERNEL = "onednn_float32" if cpu_has(OneDnnFloat32) else "torch"


@pytest.mark.parametrize(
    ("settings", "kernel"),
    [({}, BEST_KERNEL), ({"forbid_kernels": "onednn_float32, onednn_bfloat16"}, "torch")],
    ids=["best", "forbidden"],
)
async def test_model_info_reports_what_the_engine_chose(
    settings: dict[str, Any], kernel: str, pair: Pair
) -> None:
    """All linear layers on one kernel; a setting forbids kernels."""
    async with (
        both_tiers(pair, draft_kv=None, **settings) as tiers,
        grpc.aio.insecure_channel(tiers.endpoints[0]) as channel,
    ):
        stub = target_pb2_grpc.TargetServiceStub(channel)
        asked = target_pb2.TargetServiceGetModelInfoRequest()
        model = (await stub.GetModelInfo(asked, timeout=TIMEOUT_S)).model
    assert model.attention_backend == "sdpa"
    assert dict(model.linear_kernels).keys() == {kernel}
    assert not model.cuda_graphs


async def test_announced_while_it_loads_and_serves(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, go_on = outrider.model_server.lifecycle.load_served_engine, threading.Event()

    def slow_load(config: Any) -> Any:
        assert go_on.wait(TIMEOUT_S)
        return load(config)

    monkeypatch.setattr(outrider.model_server.lifecycle, "load_served_engine", slow_load)
    async with registered(redis_url) as registry:

        async def finish_loading() -> None:
            try:
                starting = await registry.becomes(ReplicaState.STARTING)
                assert starting is not None
                assert (starting.tier, starting.vocab_size) == ("target", 0)
            finally:
                go_on.set()

        loading = asyncio.create_task(finish_loading())
        async with tier(redis_url=redis_url) as target:
            await loading
            ready = await registry.becomes(ReplicaState.READY)
            model = (await target.info()).model
            assert ready is not None
            assert ready.address == f"127.0.0.1:{target.server.port}"
            assert ready.model_fingerprint == model.model_fingerprint
            assert ready.tokenizer_fingerprint == model.tokenizer_fingerprint
            assert (ready.vocab_size, ready.kv_capacity_tokens) == (256, 4096)
            async with target.verify() as stream:
                await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
                await stream.answer(1)

                async def is_counted() -> bool:
                    last = registry.records[-1]
                    return last is not None and (
                        last.num_open_generations == 1 and last.kv_used_tokens > 0
                    )

                await eventually(is_counted, TIMEOUT_S)
        await registry.becomes(None)


@pytest.mark.parametrize(
    ("settings", "address"),
    [({"advertise": "far.example:7"}, "far.example:7"), ({"host": "0.0.0.0"}, None)],
)
async def test_the_advertised_address(
    settings: dict[str, Any], address: str | None, redis_url: str
) -> None:
    """The configured one; or, if it listens on all interfaces, one that others can reach."""
    async with registered(redis_url) as registry, tier(redis_url=redis_url, **settings) as target:
        ready = await registry.becomes(ReplicaState.READY)
        assert ready is not None
        if address is not None:
            assert ready.address == address
        else:
            host, _, port = ready.address.rpartition(":")
            assert host not in ("0.0.0.0", "127.0.0.1", "")
            assert int(port) == target.server.port


async def test_draining_finishes_open_generations_and_accepts_no_new_ones(redis_url: str) -> None:
    async with (
        registered(redis_url) as registry,
        tier(redis_url=redis_url, stop_grace_s=TIMEOUT_S) as target,
        target.verify() as stream,
    ):
        await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)
        await has_states(stream, READY)

        target.stop()
        await has_states(stream, READY, DRAINING)
        await registry.becomes(ReplicaState.DRAINING)
        assert not await target.is_healthy()
        assert await target.health(LIVENESS) == SERVING
        assert (await target.info()).state == DRAINING

        await stream.write(Frame(opens=[target_open(2)]))
        refused = await stream.answer(2)
        assert refused.reason == target_pb2.RowError.REASON_DRAINING
        async with target.verify() as other:
            await other.write(Frame(opens=[target_open(1)]))
            assert (await other.answer(1)).reason == target_pb2.RowError.REASON_DRAINING
            await has_states(other, DRAINING)

        await stream.write(Frame(rows=[row(1, 4, [5], [6, 7])]))
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)
        assert not target.serving.done()
        await stream.write(Frame(closes=[target_pb2.TargetClose(generation_id=1)]))
        await target.has_ended()
        await registry.becomes(None)
    assert ReplicaState.STUCK not in registry.states


async def test_a_draft_drains(redis_url: str) -> None:
    async with (
        registered(redis_url, "draft") as registry,
        tier(DraftConfig, redis_url=redis_url, stop_grace_s=TIMEOUT_S) as draft,
        raw(draft_pb2_grpc.DraftServiceStub(draft.channel).Propose()) as stream,
    ):
        await stream.write(draft_pb2.ProposeRequest(opens=[draft_open(1, PROMPT)]))
        await has_states(stream, READY)
        await registry.becomes(ReplicaState.READY)

        async def is_open() -> bool:
            last = registry.records[-1]
            return last is not None and last.num_open_generations == 1

        await eventually(is_open, TIMEOUT_S)
        draft.stop()
        await has_states(stream, READY, DRAINING)
        await registry.becomes(ReplicaState.DRAINING)
        await stream.write(draft_pb2.ProposeRequest(opens=[draft_open(2, PROMPT)]))
        assert (await stream.answer(2)).reason == draft_pb2.DraftLost.REASON_DRAINING
        await stream.write(draft_pb2.ProposeRequest(commits=[draft_commit(1, [5], 5)]))
        assert isinstance(await stream.answer(1), draft_pb2.Proposal)
        await stream.write(draft_pb2.ProposeRequest(closes=[draft_pb2.DraftClose(generation_id=1)]))
        await draft.has_ended()


async def test_draining_ends_after_its_grace_despite_an_open_generation() -> None:
    async with tier(stop_grace_s=0.3) as target, target.verify() as stream:
        await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        await stream.answer(1)
        target.stop()
        await target.has_ended()


@pytest.mark.slow
@pytest.mark.timeout(150)  # a process that imports torch, on a machine that may be busy
async def test_sigterm_drains_and_exits_with_0(redis_url: str) -> None:
    patience = ("--stop-grace-s", str(TIMEOUT_S), "--stuck-after-s", str(TIMEOUT_S))
    async with (
        registered(redis_url) as registry,
        process_target("target_service", "--redis-url", redis_url, *patience) as (process, stub),
        raw(stub.Verify()) as stream,
    ):
        await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        await stream.answer(1)
        process.send_signal(signal.SIGTERM)
        await has_states(stream, READY, DRAINING)
        await stream.write(Frame(opens=[target_open(2)], rows=[row(1, 4, [5])]))
        assert (await stream.answer(2)).reason == target_pb2.RowError.REASON_DRAINING
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)
        await stream.write(Frame(closes=[target_pb2.TargetClose(generation_id=1)]))
        end = await ended(process)
        assert (end.status, end.said) == (0, []), end
        await registry.becomes(None)
