"""Limits of a pass at the target: rows of logits, and what out-of-memory does to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from outrider.engine import Append, EngineOptions, ServedEngine, load_engine
from outrider.engine.simulated import SimulatedEngine
from outrider.errors import InternalError, StepOutOfMemory
from outrider.model_server.messages import Failure, FailureReason
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.step_limits import StepLimits
from outrider.sampling.params import SamplingParams
from outrider.settings.simulation import Simulation
from target_service.grpc_server import _REASONS
from target_service.messages import Command, OpenTarget, Verified, Verify
from target_service.verifier import Verifier
from tests.tiny_models import make_tiny_model

SIMULATION = Simulation.parse("step_ms=0,vocab_size=50,context_len=1024")
MAX_GAMMA = 4


class Engine(SimulatedEngine):
    """Counts passes; those of more tokens than `limit` run out of memory."""

    def __init__(self, max_step_rows: int, limit: int = 10**6) -> None:
        super().__init__(SIMULATION, 4096)
        self.info = replace(self.info, max_step_rows=max_step_rows)
        self.limit = limit
        self.passes: list[tuple[int, int]] = []

    def forward(self, appends: Sequence[Append]) -> Any:
        num_tokens = sum(len(append.token_ids) for append in appends)
        num_rows = sum(append.num_logits for append in appends)
        self.passes.append((num_tokens, num_rows))
        if num_tokens > self.limit:
            raise StepOutOfMemory(num_tokens, num_rows, "no room")
        return super().forward(appends)


def verifier(engine: ServedEngine, max_step_tokens: int = 512) -> Verifier:
    return Verifier(
        engine, max_gamma=MAX_GAMMA, max_step_tokens=max_step_tokens, idle_session_ttl_s=60.0
    )


def opening(number: int, num_tokens: int, num_drafts: int = 0, **params: Any) -> list[Command]:
    """Opens a generation with its first verify request."""
    key, context = GenerationKey(1, number), np.full(num_tokens, 7)
    sampling = SamplingParams(temperature=0.0, max_tokens=50, seed=0, **params)
    drafts = np.full(num_drafts, 3)
    verify = Verify(key, 0, context, drafts, None, with_prompt_logprobs=bool(params))
    return [OpenTarget(key, f"s{number}", 1, 0, num_tokens, 400, sampling), verify]


def run(worker: Verifier, commands: Sequence[Command]) -> dict[int, Any]:
    results = list(worker.step(commands, lambda: True))
    while worker.has_work:
        results += worker.step([], lambda: True)
    return {result.key.generation_id: result for result in results}


def test_verifications_beyond_the_rows_wait_for_the_next_pass() -> None:
    engine = Engine(max_step_rows=12)
    worker = verifier(engine)
    commands = [c for number in range(6) for c in opening(number, 1, num_drafts=4)]
    answers = run(worker, commands)
    assert all(isinstance(answer, Verified) for answer in answers.values())
    assert [rows for _, rows in engine.passes] == [10, 10, 10], "two blocks of 5 rows a pass"


def test_prompts_end_while_verifications_take_all_rows() -> None:
    """Rows for one block are kept for prompts."""
    engine = Engine(max_step_rows=12)
    worker = verifier(engine)
    commands = [c for number in range(5) for c in opening(number, 1, num_drafts=4)]
    results = worker.step([*commands, *opening(9, 40)], lambda: True)
    assert engine.passes == [(5 + 40, 5 + 1)]
    assert {result.key.generation_id for result in results} == {0, 9}


def test_logprobs_of_prompts_are_limited_by_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model: a simulated tier has none."""
    path = make_tiny_model("llama", tmp_path / "m")
    engine = load_engine(EngineOptions(str(path), kv_cache_tokens=512))
    engine.info = replace(engine.info, max_step_rows=20)
    num_rows: list[int] = []
    forward = engine.forward

    def counted(appends: Sequence[Append]) -> Any:
        num_rows.append(sum(append.num_logits for append in appends))
        return forward(appends)

    monkeypatch.setattr(engine, "forward", counted)
    answer = run(verifier(engine), opening(1, 100, prompt_logprobs=2))[1]
    assert isinstance(answer, Verified)
    assert answer.prompt is not None
    assert len(answer.prompt.logprobs) == 99
    assert max(num_rows) == 20
    assert sum(num_rows) == 100


def test_out_of_memory_fails_the_requests_of_the_pass_and_lowers_the_limits() -> None:
    """By name, as a lack of room: orchestrators open them again. Their KV is freed."""
    engine = Engine(max_step_rows=2048, limit=100)
    worker = verifier(engine)
    with capture_logs() as logs:
        answers = run(worker, [*opening(1, 150), *opening(2, 150)])
    for failure in answers.values():
        assert isinstance(failure, Failure)
        assert failure.reason is FailureReason.OUT_OF_MEMORY
        assert _REASONS[failure.reason] == _REASONS[FailureReason.KV_FULL]
        assert failure.detail == (
            "out of memory in a pass over 300 tokens with 2 rows of logits: no room"
        )
    assert worker.num_open == 0
    (entry,) = [entry for entry in logs if entry["event"] == "step_out_of_memory"]
    assert (entry["num_tokens"], entry["max_step_tokens"]) == (300, 150)
    for number in range(3, 20):
        answer = run(worker, opening(number, 150))[number]
        if isinstance(answer, Verified):
            break
    assert max(tokens for tokens, _ in engine.passes[-2:]) <= 100
    engine.store.check_integrity()


def test_the_smallest_pass_without_memory_is_a_failure_of_the_device() -> None:
    """Three in a row take the replica out of service."""
    engine = Engine(max_step_rows=12, limit=0)
    worker = verifier(engine, max_step_tokens=16)
    failing: list[Exception] = []
    worker.health.on_failing = failing.append
    for number in range(4):
        failure = run(worker, opening(number, 3))[number]
        assert isinstance(failure, Failure)
        lowest = number > 0  # the first lowers the rows from 12 to 10
        assert (failure.reason is FailureReason.INTERNAL) == lowest
    (error,) = failing
    assert str(error).startswith("the smallest pass does not fit into memory: out of memory")


@pytest.mark.parametrize("error", [ValueError("x"), InternalError("y")])
def test_other_errors_leave_the_limits(error: Exception) -> None:
    limits = StepLimits(512, 2048, MAX_GAMMA)
    assert limits.after(error) is error
    assert (limits.max_tokens, limits.max_rows, limits.num_exceeded) == (512, 2048, 0)


def test_limits_are_halved_down_to_one_block() -> None:
    limits = StepLimits(512, 2048, MAX_GAMMA)
    limits.after(StepOutOfMemory(700, 300, ""))
    assert (limits.max_tokens, limits.max_rows) == (256, 150)
    limits.after(StepOutOfMemory(0, 100, "sampling"))
    assert (limits.max_tokens, limits.max_rows) == (256, 50)
    for _ in range(10):
        limits.after(StepOutOfMemory(limits.max_tokens, limits.max_rows, ""))
    assert (limits.max_tokens, limits.max_rows) == (16, 10)
