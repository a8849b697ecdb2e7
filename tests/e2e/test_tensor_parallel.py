"""A target over two ranks: the tokens of one rank; a killed or stopped rank costs no stream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import draft_service.app
import orchestrator.app
import target_service.app
from outrider.engine.parallel.processes import EXIT_RANK_LOST
from outrider.runtime.main import LISTENING_PREFIX
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig
from outrider.v1 import target_pb2, target_pb2_grpc
from tests.e2e.pairs import TinyPair
from tests.e2e.reference import assert_greedy, assert_seeded
from tests.e2e.traffic import COUPLED, assert_speculated, generate_all, prompt_of
from tests.services.programs import END_TIMEOUT_S, ended, program
from tests.stack import QUICK, Output, Stack, eventually, request

pytestmark = pytest.mark.slow

RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "num_threads": 1}
NUM_STREAMS = 6
NUM_TOKENS = 700
SEEDED: dict[str, Any] = {
    "temperature": 0.9,
    "seed": 5,
    "ignore_eos": True,
    "max_tokens": NUM_TOKENS,
}


async def test_greedy_and_coupled_tokens_are_those_of_one_rank(
    tiny_pair: TinyPair, redis: str
) -> None:
    """Ragged prompts in one batch, plain and with drafts; then one alone."""
    greedy = {"temperature": 0.0, "max_tokens": 24}
    coupled = {"temperature": 0.9, "max_tokens": 24, "ignore_eos": True}
    calls = [
        {"prompt": prompt_of(length), "gamma": i % 4 * 2, "sampling": greedy}
        for i, length in enumerate((1, 3, 16, 17, 33, 48, 90, 130))
    ]
    calls += [
        {**call, "sampling": {**coupled, "seed": i}, "verification": COUPLED}
        for i, call in enumerate(calls)
    ]
    drafting = draft_service.app.serving(
        DraftConfig(model=str(tiny_pair.draft), port=0, num_threads=1, **QUICK)
    )
    async with (
        target_of_two_ranks(tiny_pair.target, max_step_tokens=24) as ranks,
        drafting as draft,
        orchestrating(ranks.address, redis, f"127.0.0.1:{draft.port}") as stack,
    ):
        info = await ranks.info()
        outputs = await generate_all(stack, calls)
        outputs.append(await stack.generate(**calls[3]))
    assert info.model.tensor_parallel_size == 2
    for call, output in zip([*calls, calls[3]], outputs, strict=True):
        prompt, sampling = call["prompt"], call["sampling"]
        if "seed" in sampling:
            assert_seeded(tiny_pair.reference, prompt, output.token_ids, sampling)
        else:
            expected = tiny_pair.reference.greedy(prompt, 24)
            assert_greedy(tiny_pair.reference, prompt, expected, output.token_ids)
    assert_speculated(outputs)


class Ranks:
    """A target of two ranks in processes of their own."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address
        (self.other_pid,) = children(process.pid)

    async def info(self) -> target_pb2.TargetServiceGetModelInfoResponse:
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub: Any = target_pb2_grpc.TargetServiceStub(channel)
            asked = target_pb2.TargetServiceGetModelInfoRequest()
            answer: target_pb2.TargetServiceGetModelInfoResponse = await stub.GetModelInfo(asked)
            return answer

    async def other_has_ended(self) -> bool:
        """Nobody may have waited for it yet."""
        with contextlib.suppress(FileNotFoundError):
            fields = await asyncio.to_thread(Path(f"/proc/{self.other_pid}/stat").read_text)
            return fields.rpartition(")")[2].split()[0] == "Z"
        return True


@contextlib.asynccontextmanager
async def target_of_two_ranks(model: Path, **settings: Any) -> AsyncIterator[Ranks]:
    flags = {**RANKS, **QUICK, "model": model, "port": 0, **settings}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    async with program("target_service", *words) as process:
        assert process.stdout is not None
        async with asyncio.timeout(END_TIMEOUT_S):
            line = (await process.stdout.readline()).decode()
        assert line.startswith(LISTENING_PREFIX), await ended(process)
        yield Ranks(process, line.strip().removeprefix(LISTENING_PREFIX))


@contextlib.asynccontextmanager
async def orchestrating(targets: str, redis: str, draft: str | None = None) -> AsyncIterator[Stack]:
    """An orchestrator; the stack has no client of a tier."""
    config = OrchestratorConfig(
        target_endpoint=targets,
        draft_endpoint=draft,
        redis_url=redis,
        port=0,
        draft_wait_ms=20_000.0,
        assume_same_vocabulary=True,
    )
    async with orchestrator.app.serving(config) as server:
        endpoint = f"127.0.0.1:{server.port}"
        async with grpc.aio.insecure_channel(endpoint) as channel:
            yield Stack(channel, channel, None, endpoint=endpoint)


def children(pid: int) -> list[int]:
    """Processes started by any thread of the process."""
    lists = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(word) for text in lists for word in text.split()]


@pytest.mark.parametrize(
    ("number", "rank", "why"),
    [
        (signal.SIGKILL, 1, "rank 1 of 2"),
        (signal.SIGKILL, 0, None),
        (signal.SIGSTOP, 1, "Timed out"),
    ],
)
async def test_a_lost_rank_costs_no_stream_and_no_token(
    number: signal.Signals, rank: int, why: str | None, tiny_pair: TinyPair, redis: str
) -> None:
    """Its generations continue on another replica; both of its processes end."""
    plain = target_service.app.serving(
        TargetConfig(model=str(tiny_pair.target), port=0, num_threads=1, **QUICK)
    )
    hang = {"stuck_after_s": 1, "tensor_parallel_timeout_s": 6}
    settings = hang if number is signal.SIGSTOP else {}
    async with target_of_two_ranks(tiny_pair.target, **settings) as ranks, plain as other:
        endpoints = f"{ranks.address},127.0.0.1:{other.port}"
        async with orchestrating(endpoints, redis) as stack:
            prompts = [prompt_of(5 + 7 * i) for i in range(NUM_STREAMS)]
            outputs = [Output() for _ in prompts]

            async def is_connected() -> bool:  # both replicas get requests
                short = {"prompt": prompts[0], "sampling": {"max_tokens": 2}}
                await generate_all(stack, [short] * 4)
                return (await ranks.info()).load.num_opened_total > 0

            await eventually(is_connected)
            async with asyncio.TaskGroup() as tasks:
                for prompt, output in zip(prompts, outputs, strict=True):
                    tasks.create_task(read(stack, prompt, output))

                async def is_under_way() -> bool:
                    has_tokens = all(len(output.token_ids) > 5 for output in outputs)
                    return has_tokens and (await ranks.info()).load.num_open_generations > 0

                await eventually(is_under_way)
                os.kill((ranks.process.pid, ranks.other_pid)[rank], number)
        end = await ended(ranks.process)
        await eventually(ranks.other_has_ended)
    assert end.status == (EXIT_RANK_LOST if rank else -signal.SIGKILL)
    assert why is None or why in end.stderr
    assert [len(output.token_ids) for output in outputs] == [NUM_TOKENS] * NUM_STREAMS
    for prompt, output in list(zip(prompts, outputs, strict=True))[:2]:
        assert_seeded(tiny_pair.reference, prompt, output.token_ids, SEEDED)


async def read(stack: Stack, prompt: list[int], output: Output) -> None:
    asked = request(prompt, SEEDED, verification=COUPLED)
    async for chunk in stack.client.Generate(asked, timeout=200):
        output.add(chunk)
