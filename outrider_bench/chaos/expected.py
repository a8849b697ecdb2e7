"""What the outputs must be: asked of the same system while nothing disturbs it, without drafts.

Where two tokens are equally likely but for rounding, machines and batches may differ: either is
right, and what follows is asked for anew. Compares; knows no fault and no store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from outrider.errors import Unavailable
from outrider.sampling.random import target_gumbels
from outrider.v1 import orchestrator_pb2
from outrider_bench.chaos.jobs import Case, Job, Method

# float32 passes of other shapes differ by some 1e-5 (tests/e2e/reference.py).
TIE = 1e-4
_TIMEOUT_S = 120.0
_MAX_CONCURRENT = 8

LENGTH = orchestrator_pb2.FINISH_REASON_LENGTH


@dataclass
class Output:
    token_ids: list[int]
    finish: int


class Reference:
    """Of the repeatable cases. `stub`: an undisturbed OrchestratorService whenever it is asked."""

    def __init__(self, stub: Any, max_tokens: int) -> None:
        self._stub = stub
        self._max_tokens = max_tokens
        self._outputs: dict[int, Output] = {}
        self.num_ties = 0

    async def learn(self, cases: Sequence[Case]) -> None:
        """Raises Unavailable."""
        room = asyncio.Semaphore(_MAX_CONCURRENT)

        async def learn(case: Case) -> None:
            async with room:
                whole = await self._generate(case, case.prompt_ids, self._max_tokens)
                self._outputs[case.index] = whole

        async with asyncio.TaskGroup() as tasks:
            for case in cases:
                if case.is_repeatable:
                    tasks.create_task(learn(case))

    def of(self, job: Job) -> Output:
        """The whole of it; of what cannot be foreseen only the number of tokens, as -1."""
        known = self._outputs.get(job.case.index)
        if known is None:
            return Output([-1] * job.max_tokens, LENGTH)
        is_cut = len(known.token_ids) > job.max_tokens
        return Output(known.token_ids[: job.max_tokens], LENGTH if is_cut else known.finish)

    async def difference(self, job: Job, token_ids: Sequence[int], finish: int | None) -> str:
        """What is wrong with the output; empty: nothing. `finish` None: it is a beginning only."""
        emitted, expected = list(token_ids), self.of(job)
        if not job.case.is_repeatable:
            emitted = [-1] * len(emitted)
        while (at := _first_difference(emitted, expected.token_ids)) is not None:
            if at == len(expected.token_ids):
                return f"{len(emitted)} tokens, not {at}"
            other = expected.token_ids[at]
            if not await self._is_tied(job.case, emitted[:at], emitted[at], other):
                return f"token {at} is {emitted[at]}, not {other}"
            self.num_ties += 1
            expected = await self._going_on(job, emitted[: at + 1])
        if finish is None:
            return ""
        if len(emitted) < len(expected.token_ids):
            return f"{len(emitted)} tokens, not {len(expected.token_ids)}"
        if finish != expected.finish:
            name = orchestrator_pb2.FinishReason.Name
            return f"{name(finish)}, not {name(expected.finish)}"
        return ""

    async def _going_on(self, job: Job, begun: list[int]) -> Output:
        num_left = job.max_tokens - len(begun)
        if not num_left:
            return Output(begun, LENGTH)
        rest = await self._generate(job.case, (*job.case.prompt_ids, *begun), num_left)
        return Output([*begun, *rest.token_ids], rest.finish)

    async def _is_tied(self, case: Case, output: list[int], one: int, other: int) -> bool:
        """Whether rounding decides between the two tokens after that output."""
        position = len(case.prompt_ids) + len(output)
        scores = []
        for token_id in (one, other):
            logprob = await self._logprob(case, (*case.prompt_ids, *output), token_id)
            if logprob is None:
                return False
            if case.method is Method.COUPLED:
                noise = target_gumbels(case.seed, position, np.array([token_id]))[0]
                logprob = logprob / case.temperature + float(noise)
            scores.append(logprob)
        return abs(scores[0] - scores[1]) < TIE

    async def _logprob(self, case: Case, prompt: tuple[int, ...], token_id: int) -> float | None:
        """The model's own, of that token next; None where it does not tell (a simulated one)."""
        request = case.request(prompt, 1)
        request.gamma = 0
        request.sampling.logprobs = 0
        request.sampling.allowed_token_ids.append(token_id)
        try:
            async for chunk in self._stub.Generate(request, timeout=_TIMEOUT_S):
                if chunk.logprobs:
                    return float(chunk.logprobs[0].logprob)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                raise Unavailable(f"the reference failed: {error.details()}") from error
        return None

    async def _generate(self, case: Case, prompt: tuple[int, ...], max_tokens: int) -> Output:
        request = case.request(prompt, max_tokens)
        request.gamma = 0
        output = Output([], LENGTH)
        try:
            async for chunk in self._stub.Generate(request, timeout=_TIMEOUT_S):
                output.token_ids += chunk.token_ids
                output.finish = chunk.result.finish_reason
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"the reference failed: {error.details()}") from error
        return output


def _first_difference(emitted: Sequence[int], expected: Sequence[int]) -> int | None:
    """Where the first is not the beginning of the second."""
    for at, token_id in enumerate(emitted):
        if at == len(expected) or token_id != expected[at]:
            return at
    return None
