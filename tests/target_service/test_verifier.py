"""Errors in the target worker while it plans a pass: only the generations concerned fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from outrider.engine.kv.store import Sequence
from outrider.engine.simulated import SimulatedEngine
from outrider.model_server.messages import Failure, FailureReason
from outrider.model_server.scheduler import GenerationKey
from outrider.sampling.params import SamplingParams
from outrider.settings.simulation import Simulation
from target_service.messages import Command, OpenTarget, Verified, Verify
from target_service.verifier import Verifier

SIMULATION = Simulation.parse("step_ms=0,vocab_size=50,context_len=1024")
SHORT, LONG = [7] * 3, [8] * 40


class Target:
    def __init__(self) -> None:
        self.engine = SimulatedEngine(SIMULATION, 1024)
        self.verifier = Verifier(
            self.engine, max_gamma=4, max_step_tokens=512, idle_session_ttl_s=60.0
        )

    def opening(self, number: int, context: list[int]) -> list[Command]:
        """Opens a generation, with its first verify request."""
        key = GenerationKey(1, number)
        params = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
        opened = OpenTarget(key, f"s{number}", 1, 0, len(context), 200, params)
        return [opened, Verify(key, 0, np.asarray(context), np.zeros(0, np.int64), None)]

    def run(self, *commands: Command) -> dict[int, Any]:
        """Steps until all requests are answered: FailureReason or Verified of each generation."""
        results = list(self.verifier.step(commands, lambda: True))
        while self.verifier.has_work:
            results += self.verifier.step([], lambda: True)
        return {
            result.key.generation_id: result.reason if isinstance(result, Failure) else result
            for result in results
        }


def broken_for(session: int, target: Target, method: Callable[..., Any]) -> Callable[..., Any]:
    """The store's method, with a bookkeeping error for the session's sequence."""

    def faulty(sequence: Sequence, *args: Any, **fields: Any) -> Any:
        live = target.verifier._table.find(f"s{session}")
        if live is not None and live.sequence is sequence:
            raise RuntimeError("a page of the sequence has two owners")
        return method(sequence, *args, **fields)

    return faulty


@pytest.mark.parametrize("context", [SHORT, LONG])
def test_an_error_while_planning_fails_its_generation_only(
    context: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verification (SHORT) or a prompt; the other ones are answered in the same pass."""
    target = Target()
    store = target.engine.store
    monkeypatch.setattr(
        store, "extend_with_prefix", broken_for(2, target, store.extend_with_prefix)
    )
    commands = [c for number in (1, 2, 3) for c in target.opening(number, context)]
    answers = target.run(*commands)
    assert answers.pop(2) is FailureReason.INTERNAL
    assert set(answers) == {1, 3}
    assert all(isinstance(answer, Verified) for answer in answers.values())
    assert target.verifier.statistics().num_steps_total == 1
    store.check_integrity()


def test_an_error_of_no_generation_fails_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker goes on, and the error counts as a failed pass."""
    target = Target()
    errors: list[Exception] = []
    target.verifier.health.on_failing = errors.append

    def fail(live: Any) -> bool:
        raise RuntimeError("no plan")

    with monkeypatch.context() as patched:
        patched.setattr(target.verifier, "_is_prompt", fail)
        for number in (1, 3, 5):
            both = [*target.opening(number, SHORT), *target.opening(number + 1, LONG)]
            assert target.run(*both) == dict.fromkeys((number, number + 1), FailureReason.INTERNAL)
    assert [str(error) for error in errors] == ["no plan"], "three in a row"
    assert isinstance(target.run(*target.opening(7, SHORT))[7], Verified)
    assert target.verifier.num_open == 1


def test_a_displaced_generation_fails_as_displaced_before_a_request_of_the_same_step() -> None:
    """The first failure counts: its orchestrator reports LeaseLost, not an internal error."""
    target = Target()
    first, request = target.opening(1, SHORT)
    target.run(first)
    assert isinstance(first, OpenTarget)
    later = replace(first, key=GenerationKey(2, 1), epoch=first.epoch + 1)
    failures = target.verifier.step([later, request], lambda: True)
    assert [f.reason for f in failures if isinstance(f, Failure) and f.key == first.key] == [
        FailureReason.DISPLACED,
        FailureReason.BAD_MESSAGE,
    ]


def test_prompt_logprobs_that_do_not_fit_the_request_are_refused() -> None:
    """They need the whole prompt, from its first token on, and a generation that asks for them.

    Other generations are answered.
    """
    target = Target()
    opened, asked = target.opening(1, LONG)
    assert isinstance(opened, OpenTarget)
    opened = replace(opened, params=replace(opened.params, prompt_logprobs=0))
    short = replace(asked, context_token_ids=np.asarray(LONG[:-1]), with_prompt_logprobs=True)
    late = replace(target.opening(3, SHORT)[1], keep_len=1, with_prompt_logprobs=True)
    unasked = replace(target.opening(4, SHORT)[1], with_prompt_logprobs=True)
    others = [target.opening(number, SHORT)[0] for number in (3, 4)]
    answers = target.run(opened, short, *target.opening(2, LONG), *others, late, unasked)
    assert answers.pop(2) is not FailureReason.BAD_MESSAGE
    assert answers == dict.fromkeys((1, 3, 4), FailureReason.BAD_MESSAGE)
