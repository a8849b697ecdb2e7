"""Phases of load against a simulated system: what is recorded of every call, however it ends."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import tokenizers

from outrider.v1 import orchestrator_pb2
from outrider_bench.loadtest.campaign import Campaign, LoadPattern, Variant
from outrider_bench.loadtest.driver import LoadedOrchestrators, Phase, loaded_orchestrators
from outrider_bench.loadtest.lengths import Lengths
from outrider_bench.loadtest.measures import Distribution, Latencies
from outrider_bench.loadtest.phase_results import Passes
from outrider_bench.loadtest.plan import Conversation, Job, Workload, prompt_ids
from outrider_bench.loadtest.records import Record
from outrider_bench.loadtest.requests import RequestOptions
from outrider_bench.loadtest.results import speed_up, summary_of, verify_batch
from outrider_bench.loadtest.slo import Slo
from tests.bench.loadtest.conftest import simulated
from tests.bench.loadtest.recorder import CallTimes, Recorder, percentiles
from tests.services.parts import Pair, both_tiers, nothing_held, orchestrating, refusal
from tests.services.tokenizer_files import write_tokenizer
from tests.stack import eventually
from tests.tiny_models import make_tiny_model


def workload(output_len: str = "8", num_turns: str = "1") -> Workload:
    return Workload(
        Lengths.parse("6", "input"),
        Lengths.parse(output_len, "output"),
        Lengths.parse(num_turns, "turns"),
    )


def phase(
    orchestrator: LoadedOrchestrators, options: RequestOptions | None = None, number: int = 0
) -> Phase:
    return Phase(orchestrator, options or RequestOptions(), number=number, seed=0, run="test")


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0, 3])
async def test_times_match_an_independent_recorder(gamma: int, redis_url: str) -> None:
    """Within 5 % for every request, and at p50 and p99; no code is shared.

    Both read the clock in the same turn of the event loop. If the process is descheduled between
    the two readings they differ arbitrarily. So half of the requests must agree, and percentiles
    are compared over the same times.
    """
    async with (
        simulated(redis_url, target="step_ms=8") as system,
        grpc.aio.insecure_channel(system.endpoint) as channel,
    ):
        recorder = Recorder(channel)
        load = phase(
            await loaded_orchestrators(cast(grpc.aio.Channel, recorder)),
            RequestOptions(gamma=gamma),
        )
        conversations = workload("uniform:4:24").conversations(60)
        await load.closed_loop(iter(conversations), num_clients=6)
    assert len(recorder.seen) == len(load.records) == 60
    found = Latencies.of(load.records)
    per_request: dict[str, tuple[Callable[[Record], Any], Callable[[CallTimes], Any]]] = {
        "ttft": (lambda record: [record.ttft_s], lambda call: [call.ttft]),
        "tpot": (lambda record: [record.tpot_s], lambda call: [call.tpot]),
        "e2e": (lambda record: [record.e2e_s], lambda call: [call.e2e]),
        "itl_chunk": (lambda record: record.chunk_gaps_s, lambda call: call.gaps),
    }
    for name, (our, their) in per_request.items():
        ours = [value for record in load.records for value in our(record)]
        theirs = [value for call in recorder.seen for value in their(call)]
        deviations = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
        assert statistics.median(deviations) < 0.05, name
        distribution: Distribution = getattr(found, name)
        expected = percentiles(ours)
        assert distribution.p50 == pytest.approx(expected["p50"]), name
        assert distribution.p99 == pytest.approx(expected["p99"]), name
    tokens = sum(sum(call.num_tokens) for call in recorder.seen)
    assert tokens == sum(record.num_tokens for record in load.records)


async def test_latency_counts_from_the_intended_send_time(redis_url: str) -> None:
    """No coordinated omission."""
    async with simulated(redis_url) as system:
        load = phase(await loaded_orchestrators(system.channel))
        await asyncio.sleep(0.3)
        jobs = (Job(0, 4, 4), Job(1, 4, 4))
        await load.open_loop(
            [Conversation((jobs[0],), at_s=0.0), Conversation((jobs[1],), at_s=0.1)]
        )
    for record in load.records:
        assert record.is_ok
        assert record.lateness_s >= 0.19
        assert record.ttft_s is not None
        assert record.ttft_s > record.lateness_s


async def test_open_loop_does_not_wait_for_responses(redis_url: str) -> None:
    """One is served at a time, all are sent at once: the last waits for all others."""
    async with simulated(redis_url, max_generations=1, max_waiting=16) as system:
        load = phase(await loaded_orchestrators(system.channel))
        await load.open_loop([Conversation((Job(i, 4, 6),), at_s=0.0) for i in range(6)])
    assert all(record.is_ok for record in load.records)
    first, *_, last = sorted(record.e2e_s or 0.0 for record in load.records)
    served = [record.chunks[-1].at_s - record.chunks[0].at_s for record in load.records]
    assert last >= sum(served)
    assert last > first


async def test_turns_of_a_session_run_in_order(redis_url: str) -> None:
    """Each when the previous one has ended; KV is reused; nothing is left open."""
    async with simulated(redis_url) as system:
        load = phase(await loaded_orchestrators(system.channel))
        conversations = workload(num_turns="3").conversations(6)
        await load.closed_loop(iter(conversations), num_clients=2)
        turns = [load.records[i] for i in range(6)]
        gone = [
            await refusal(
                system.client.GetSession(
                    orchestrator_pb2.GetSessionRequest(session_id=f"load-test-0-{first}"),
                    timeout=10,
                )
            )
            for first in (0, 3)
        ]
        await eventually(lambda: nothing_held(system))
    assert [record.status for record in turns] == ["OK"] * 6
    by_index = {record.index: record for record in turns}
    for before, after in pairwise(by_index[index] for index in range(3)):
        assert before.ended_s is not None
        assert after.intended_s >= before.ended_s
        assert after.num_cached_tokens >= before.prompt_len + before.num_tokens - 1
    assert [answer.code for answer in gone] == [grpc.StatusCode.NOT_FOUND] * 2


async def test_rejections_are_recorded_with_status_and_retry_hint(redis_url: str) -> None:
    """Admitted requests are served."""
    # The first runs until the others were sent, even if one of them is late by a second.
    slow = "step_ms=40"
    async with simulated(redis_url, target=slow, max_generations=1, max_waiting=0) as system:
        load = phase(await loaded_orchestrators(system.channel), RequestOptions(gamma=0))
        await load.open_loop([Conversation((Job(i, 4, 40),), at_s=0.0) for i in range(5)])
    statuses = sorted(record.status for record in load.records)
    assert statuses == ["OK"] + ["RESOURCE_EXHAUSTED"] * 4
    refused = [record for record in load.records if not record.is_ok]
    assert all(record.retry_after_s is not None for record in refused)
    assert all(record.ended_s is not None for record in refused)


async def test_each_request_has_its_own_deadline(redis_url: str) -> None:
    async with simulated(redis_url, target="step_ms=150") as system:
        load = phase(await loaded_orchestrators(system.channel), RequestOptions(timeout_s=0.05))
        await load.open_loop([Conversation((Job(0, 4, 40),), at_s=0.0)])
        await eventually(lambda: nothing_held(system))
    (record,) = load.records
    assert record.status == "DEADLINE_EXCEEDED"


async def test_cancelled_request_is_recorded_as_cut(redis_url: str) -> None:
    """Tokens received so far are kept, and the server releases the generation."""
    async with simulated(redis_url) as system:
        load = phase(await loaded_orchestrators(system.channel))
        running = asyncio.create_task(load.open_loop([Conversation((Job(0, 4, 5_000),), at_s=0.0)]))

        async def has_tokens() -> bool:
            return bool(load.records) and load.records[0].num_tokens > 3

        await eventually(has_tokens)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await eventually(lambda: nothing_held(system))
    (record,) = load.records
    assert (record.status, record.ended_s) == ("CUT", None)


@pytest.mark.slow
async def test_campaign_alternates_the_order_of_variants(redis_url: str) -> None:
    """The same conversations for both variants, with the same lengths; passes counted by the
    target.
    """
    async with simulated(redis_url) as system:

        async def passes() -> Passes:
            load = await system.target_load()
            return Passes(load.num_steps_total, load.num_rows_total, load.num_tokens_total)

        started: list[str] = []
        campaign = Campaign(
            await loaded_orchestrators(system.channel), "test", seed=0, read_passes=passes
        )
        campaign.on_phase = lambda name, num: started.append(f"{name} {num}")
        variants = [Variant("on", RequestOptions(gamma=4)), Variant("off", RequestOptions(gamma=0))]
        conversations = workload("uniform:8:16").conversations(12)
        await campaign.warm_up(variants, conversations[:2])
        await campaign.compare(variants, conversations, LoadPattern(num_clients=3), repetitions=2)
    assert started == ["on 2", "off 2", "on 6", "off 6", "off 6", "on 6"]
    by_variant: dict[str, Any] = {
        name: [s for s in campaign.results if s.variant == name] for name in ("on", "off")
    }
    lengths = {
        n: sorted((r.index, r.num_tokens) for s in k for r in s.records)
        for n, k in by_variant.items()
    }
    assert lengths["on"] == lengths["off"]
    on, off = (summary_of(by_variant[name], Slo.parse("e2e=100s")) for name in ("on", "off"))
    assert on.num_completed == off.num_completed == 12
    assert on.attained == off.attained == 1.0
    assert on.drafting is not None
    assert on.drafting.num_drafts > 0
    assert off.drafting is not None
    assert off.drafting.num_drafts == 0
    # Without drafts each token except a prompt's first is a row; with drafts there are fewer rows.
    rows = {name: sum(result.passes.num_rows for result in by_variant[name]) for name in by_variant}
    assert rows["off"] == off.num_tokens > rows["on"]
    assert verify_batch(by_variant["off"], off.drafting)["source"] == "target replicas"
    assert set(speed_up(on, off)) >= {"tokens_per_s", "tpot_p50", "e2e_p99"}


@pytest.mark.slow
async def test_random_prompts_have_ordinary_tokens_only(redis_url: str, tmp_path: Path) -> None:
    """The vocabulary is padded: no special, EOS or padding id, and no id without a token."""
    directory = make_tiny_model("llama", tmp_path / "target", vocab_size=320)
    write_tokenizer(directory)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens(["</s>", "<pad>", "<|im_start|>"])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 319]}))
    special = {token_id for token_id, token in backend.get_added_tokens_decoder().items()}
    for tokenizer in (None, str(directory)):
        async with (
            both_tiers(Pair(directory, directory), draft_kv=None) as tiers,
            orchestrating(tiers, redis_url, tokenizer=tokenizer) as system,
        ):
            orchestrator = await loaded_orchestrators(cast(grpc.aio.Channel, system.channel))
        assert len(special) >= 4
        expected = set(range(backend.get_vocab_size())) - special - {7, 319}
        assert set(orchestrator.ordinary_ids.tolist()) == expected
        job = Job(index=0, prompt_len=5_000, max_tokens=1)
        assert set(prompt_ids(job, orchestrator.ordinary_ids, 0, 1)) == expected
