"""Load over OpenAI's HTTP: the same records as over gRPC, chats, failures, the command."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outrider.client.channel import Access
from outrider.tokenizer import Tokenizer
from outrider_bench.loadtest.driver import LoadedOrchestrators, Phase, loaded_orchestrators
from outrider_bench.loadtest.http_sender import HttpSender, http_session
from outrider_bench.loadtest.lengths import Lengths
from outrider_bench.loadtest.measures import Drafting, max_overlapping
from outrider_bench.loadtest.plan import Conversation, Job, Workload
from outrider_bench.loadtest.records import Record
from outrider_bench.loadtest.requests import RequestOptions
from outrider_bench.loadtest.trace import read_trace
from tests.bench.loadtest.conftest import simulated
from tests.bench.loadtest.test_serve import serve
from tests.services.parts import Pair, System, nothing_held, whole
from tests.services.tokenizer_files import write_tokenizer
from tests.stack import eventually
from tests.tiny_models import make_tiny_draft, make_tiny_model

GREEDY = RequestOptions(gamma=3)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and a chat template; its draft is beside it."""
    directory = tmp_path_factory.mktemp("pair") / "target"
    make_tiny_model("llama", directory, vocab_size=300)
    write_tokenizer(directory)
    write_tokenizer(make_tiny_draft(directory, directory.parent / "draft"))
    return directory


@pytest.fixture
async def system(redis_url: str, tokenizer_dir: Path) -> AsyncIterator[System]:
    pair = Pair(tokenizer_dir, tokenizer_dir.parent / "draft")
    async with whole(pair, redis_url, http_port=0, tokenizer=str(tokenizer_dir)) as system:
        yield system


def workload(num_turns: str = "1") -> Workload:
    return Workload(
        *(Lengths.parse(text, "") for text in ("uniform:4:9", "uniform:8:16", num_turns))
    )


def turned(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record.index)


async def over(
    orchestrators: LoadedOrchestrators,
    conversations: list[Conversation],
    options: RequestOptions = GREEDY,
) -> list[Record]:
    """Records of a closed loop of three clients."""
    phase = Phase(orchestrators, options, number=0, seed=0, run="test")
    await phase.closed_loop(iter(conversations), num_clients=3)
    return turned(phase.records)


async def test_records_are_those_of_grpc(system: System) -> None:
    """Lengths, finish reasons, rounds and draft tokens; every event has its tokens."""
    conversations = workload().conversations(12)
    grpc_side = await loaded_orchestrators(system.channel)
    async with http_session(Access()) as session:
        sender = HttpSender(session, f"http://{system.http_endpoint}", "")
        http_side = replace(grpc_side, senders=[sender])
        ours, theirs = [await over(side, conversations) for side in (http_side, grpc_side)]

    def facts(record: Record) -> tuple[Any, ...]:
        return record.status, record.finish_reason, record.prompt_len, record.num_tokens

    assert [*map(facts, ours)] == [*map(facts, theirs)]
    for record in ours:
        stats = record.speculation
        assert stats is not None
        # Each round gives its accepted draft tokens and one more.
        assert stats.num_rounds + stats.num_accepted_tokens >= record.num_tokens
        assert sum(stats.num_accepted_per_pos) == stats.num_accepted_tokens
        assert sum(stats.num_rounds_per_gamma) == stats.num_rounds - 1
        assert record.ttft_s is not None
        assert record.ended_s is not None
        assert record.ttft_s < record.ended_s - record.intended_s
    found = Drafting.of(ours)
    assert found is not None
    assert found.num_drafts > 0
    assert found.hit_rate is not None


@pytest.mark.parametrize("is_http", [False, True])
async def test_turns_of_a_chat(is_http: bool, system: System, tokenizer_dir: Path) -> None:
    """Over gRPC in a session, over HTTP with all earlier messages: the model reads them all."""
    tokenizer = Tokenizer.load(str(tokenizer_dir))
    conversations = workload("3").conversations(6)
    side = await loaded_orchestrators(system.channel, tokenizer=tokenizer)
    async with http_session(Access()) as session:
        if is_http:
            side = replace(
                side, senders=[HttpSender(session, f"http://{system.http_endpoint}", "")]
            )
        records = await over(side, conversations, replace(GREEDY, is_chat=True))
    assert [record.status for record in records] == ["OK"] * 6
    first, second, third = records[:3]
    assert first.num_tokens >= 8
    if is_http:
        assert first.prompt_len < second.prompt_len < third.prompt_len
    assert second.num_cached_tokens > 0
    await eventually(lambda: nothing_held(system))


MOONCAKE = '{"timestamp": 0, "input_length": 20, "output_length": 12, "hash_ids": [7]}\n'
# 12 tokens of output for each request.
TRACES = {
    "mooncake.jsonl": 2 * MOONCAKE,
    "azure.csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,9,12\n2023-11-16 18:15:46.6905900,8,12\n"
    ),
    "sharegpt.json": (
        '[{"conversations": [{"from": "human", "value": "the quick brown fox"},'
        f' {{"from": "gpt", "value": "{48 * "a"}"}}]}}]'
    ),
}  # fmt: skip


@pytest.mark.parametrize("is_chat", [False, True])
async def test_public_traces(
    is_chat: bool, system: System, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Each format over HTTP, as prompts and as chats: its lengths, and shared blocks are cached."""
    tokenizer = Tokenizer.load(str(tokenizer_dir))
    side = await loaded_orchestrators(system.channel, tokenizer=tokenizer)
    async with http_session(Access()) as session:
        sender = HttpSender(session, f"http://{system.http_endpoint}", "")
        side = replace(side, senders=[sender])
        for name, content in TRACES.items():
            (tmp_path / name).write_text(content)
            conversations = read_trace(tmp_path / name).conversations
            phase = Phase(side, replace(GREEDY, is_chat=is_chat), number=0, seed=0, run="test")
            await phase.closed_loop(iter(conversations), num_clients=1)
            records = turned(phase.records)
            assert [(one.status, one.num_tokens) for one in records] == [
                ("OK", 12) for _ in conversations
            ], name
            if name == "azure.csv" and not is_chat:
                assert [record.prompt_len for record in records] == [9, 8]
            if name == "mooncake.jsonl":
                assert records[1].num_cached_tokens >= 16


async def test_failures_are_recorded(redis_url: str) -> None:
    """Refusals with the hint, deadlines, a service that is away; nothing is left running."""
    async with simulated(
        redis_url, target="step_ms=40", max_generations=1, max_waiting=0, http_port=0
    ) as system:
        grpc_side = await loaded_orchestrators(system.channel)
        async with http_session(Access()) as session:
            url = f"http://{system.http_endpoint}"
            side = replace(grpc_side, senders=[HttpSender(session, url, "")])
            load = Phase(side, RequestOptions(gamma=0), number=0, seed=0, run="test")
            await load.open_loop([Conversation((Job(i, 4, 40),), at_s=0.0) for i in range(5)])
            hurried = replace(GREEDY, timeout_s=0.05)
            (late,) = await over(side, [Conversation((Job(0, 4, 40),))], hurried)
            await eventually(lambda: nothing_held(system))
            (wrong,) = await over(
                replace(grpc_side, senders=[HttpSender(session, url, "another")]),
                [Conversation((Job(0, 4, 4),))],
            )
            (away,) = await over(
                replace(grpc_side, senders=[HttpSender(session, "http://127.0.0.1:1", "")]),
                [Conversation((Job(0, 4, 4),))],
            )
    refused = [record for record in load.records if record.status != "OK"]
    assert [record.status for record in refused] == ["HTTP 429"] * 4
    assert all(record.retry_after_s for record in refused)
    assert late.status == "DEADLINE_EXCEEDED"
    assert wrong.status == "HTTP 404"
    assert "is not served here" in wrong.detail
    assert away.status == "UNAVAILABLE"


async def test_a_rate_with_a_limit_of_running_requests(redis_url: str) -> None:
    """Over either transport; those that wait count from their intended time."""
    async with simulated(redis_url, target="step_ms=5") as system:
        load = Phase(
            await loaded_orchestrators(system.channel), RequestOptions(gamma=0),
            number=0, seed=0, run="test",
        )  # fmt: skip
        await load.open_loop([Conversation((Job(i, 4, 8),), at_s=0.0) for i in range(6)], 2)
    spans = [(record.sent_s, record.ended_s or 0.0) for record in load.records]
    assert max_overlapping(spans) == 2
    sent_s, ended_s = (sorted(times) for times in zip(*spans, strict=True))
    assert sent_s[2] >= ended_s[0]
    last = max(load.records, key=lambda record: record.sent_s)
    assert last.queued_s >= ended_s[3]
    assert last.ttft_s is not None
    assert last.ttft_s > last.queued_s


@pytest.mark.slow
async def test_the_command(system: System, tokenizer_dir: Path, tmp_path: Path) -> None:
    """A chat of random prompts over HTTP; without a tokenizer it says what is missing."""
    url = f"--http=http://{system.http_endpoint}/v1"
    small = ("--requests=8", "--output-len=6", "--warm-up=2", "--no-html", "--concurrency=4")
    told, _ = await serve(
        system, tmp_path, url, "--chat", f"--tokenizer={tokenizer_dir}", "--gamma=2", *small
    )
    assert told["completed"] == 8
    assert told["endpoint_type"] == "openai-chat"
    assert told["total_output_tokens"] == 48
    assert told["spec_decode_num_drafts"] > 0
    with pytest.raises(AssertionError, match=r"--tokenizer: random prompts over HTTP"):
        await serve(system, tmp_path, url, *small)
    with pytest.raises(AssertionError, match=r"--http: 'nowhere' is not a URL"):
        await serve(system, tmp_path, "--http=nowhere", *small)
    with pytest.raises(AssertionError, match=r"GET http://127\.0\.0\.1:1/v1/models: "):
        await serve(system, tmp_path, "--http=http://127.0.0.1:1", "--texts=/etc/hostname", *small)
