"""The losslessness audit through the services: silent if all is right, and it finds what is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import orchestrator.speculation.verification
from orchestrator.admission.queue import AdmissionQueue
from orchestrator.audit.auditor import MAX_PENDING, MAX_RUNNING
from orchestrator.replicas.target_client import TargetHandle
from orchestrator.speculation.verification import Proposal, VerifyResult
from outrider.sampling.verify import VerifyOutcome
from outrider.v1 import orchestrator_pb2
from tests.e2e.pairs import PROMPT, SpreadPair, TinyPair
from tests.e2e.traffic import BLOCK, COUPLED, REJECTION, generate_all, prompt_of
from tests.stack import Stack, eventually, running_stack

_NUM_TOKENS = 24
_GREEDY = {"temperature": 0.0}
_PENALISED = {"temperature": 0.0, "presence_penalty": 0.7, "repetition_penalty": 1.2}
_CUT = {"top_p": 0.8, "temperature": 0.9}


def _call(length: int, verification: int, sampling: dict[str, Any], gamma: int = 3) -> Any:
    given = {"ignore_eos": True, "max_tokens": _NUM_TOKENS, **sampling}
    return {
        "prompt": prompt_of(length),
        "sampling": given,
        "verification": verification,
        "gamma": gamma,
    }


async def _audit(stack: Stack) -> orchestrator_pb2.GetAuditResponse:
    response: orchestrator_pb2.GetAuditResponse = await stack.client.GetAudit(
        orchestrator_pb2.GetAuditRequest()
    )
    return response


async def _audited(stack: Stack, num: int) -> orchestrator_pb2.GetAuditResponse:
    """The audit once `num` generations were re-run or dropped."""

    async def are_done() -> bool:
        found = await _audit(stack)
        return sum(found.num_generations.values()) + sum(found.num_dropped.values()) >= num

    await eventually(are_done)
    return await _audit(stack)


async def test_nothing_is_found_if_all_is_right(tiny_pair: TinyPair, redis: str) -> None:
    """Every method, with processors: re-runs give the same tokens and probabilities."""
    calls = [
        _call(4 + i, verification, sampling)
        for i, (verification, sampling) in enumerate(
            (verification, sampling)
            for verification in (REJECTION, BLOCK, COUPLED)
            for sampling in (_GREEDY, _PENALISED, {}, _CUT, {"presence_penalty": 0.5})
        )
    ]
    calls.append(_call(30, REJECTION, {}, gamma=0))  # without drafts there is nothing to check
    async with running_stack(tiny_pair.target, tiny_pair.draft, redis, audit_share=1.0) as stack:
        await generate_all(stack, calls)
        found = await _audited(stack, len(calls) - 1)
    assert dict(found.num_generations) == {"same": len(calls) - 1, "near_tie": 0, "mismatch": 0}
    assert sum(found.num_dropped.values()) == 0
    assert found.num_tokens == _NUM_TOKENS * (len(calls) - 1)
    assert list(found.failures) == []
    tests = {test.name: test for test in found.tests}
    assert set(tests) == {"acceptance", "identity", "position"}
    assert all(test.num_trials > 0 for test in tests.values())
    # Each is false with the probability that the audit states, 1e-4 for all together.
    assert all(test.num_alarms == 0 for test in tests.values())


def _accept_all(draft_token_ids: Any, samples: Any) -> VerifyOutcome:
    """The draft's tokens instead of the target's."""
    return VerifyOutcome(len(draft_token_ids), samples[-1])


@pytest.mark.parametrize("shows_tokens", [False, True])
async def test_a_wrong_token_is_found(
    shows_tokens: bool, spread_pair: SpreadPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and coupled; token ids are evidence only if the operator allows it."""
    monkeypatch.setattr(orchestrator.speculation.verification, "verify_equal", _accept_all)
    sampling = {"ignore_eos": True, "max_tokens": _NUM_TOKENS}
    calls: list[dict[str, Any]] = [
        {"prompt": PROMPT, "sampling": {**sampling, **extra}, "verification": COUPLED, "gamma": 3}
        for extra in ({"temperature": 0.0}, {"seed": 3})
    ]
    async with running_stack(
        spread_pair.target, spread_pair.draft, redis,
        audit_share=1.0, audit_shows_tokens=shows_tokens,
    ) as stack:  # fmt: skip
        outputs = await generate_all(stack, calls)
        found = await _audited(stack, len(calls))
    assert found.num_generations["mismatch"] == len(calls)
    by_session = {failure.session_id: failure for failure in found.failures}
    for output, method in zip(outputs, ("greedy", "coupled"), strict=True):
        failure = by_session[output.session_id]
        assert failure.verification == method
        assert failure.prompt_len == len(PROMPT)
        assert failure.gap > found.tolerance
        assert failure.HasField("token_id") == shows_tokens
        if shows_tokens:
            index = failure.index - failure.prompt_len
            assert failure.token_id == output.token_ids[index] != failure.expected_id


async def test_wrong_probabilities_are_found(
    tiny_pair: TinyPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acceptance itself is consistent with them, so only the re-run can tell."""
    parse = TargetHandle._parse

    def wrong_after_the_first(
        handle: TargetHandle, result: Any, proposal: Proposal | None
    ) -> VerifyResult:
        right = parse(handle, result, proposal)
        probs = [part if i == 0 else part**0.9 for i, part in enumerate(right.support_probs)]
        return replace(right, support_probs=probs)

    monkeypatch.setattr(TargetHandle, "_parse", wrong_after_the_first)
    calls = [_call(5, REJECTION, {}), _call(6, BLOCK, _CUT)]
    async with running_stack(tiny_pair.target, tiny_pair.draft, redis, audit_share=1.0) as stack:
        await generate_all(stack, calls)
        found = await _audited(stack, len(calls))
    assert found.num_generations["mismatch"] == len(calls)
    assert {failure.verification for failure in found.failures} == {"rejection", "block"}
    assert not any(failure.HasField("expected_id") for failure in found.failures)


async def test_a_tie_is_not_a_defect(spread_pair: SpreadPair, redis: str) -> None:
    """With a tolerance above every gap, differing tokens count as near ties, with their gap."""
    async with running_stack(
        spread_pair.target, spread_pair.draft, redis, audit_share=1.0, audit_tolerance=1e6,
    ) as stack:  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(orchestrator.speculation.verification, "verify_equal", _accept_all)
            await generate_all(stack, [{**_call(9, REJECTION, _GREEDY), "prompt": PROMPT}])
        found = await _audited(stack, 1)
    assert dict(found.num_generations) == {"same": 0, "near_tie": 1, "mismatch": 0}
    assert 0 < found.max_gap < 1e6
    assert found.num_near_ties > 0


async def test_seeded_requests_are_no_trials(tiny_pair: TinyPair, redis: str) -> None:
    """A client may use a seed again: then trials would not be independent."""
    calls = [_call(4, REJECTION, {"seed": 1})] * 3
    async with running_stack(tiny_pair.target, tiny_pair.draft, redis, audit_share=1.0) as stack:
        await generate_all(stack, calls)
        found = await _audited(stack, len(calls))
    assert found.num_generations["same"] == len(calls)
    assert [test.num_trials for test in found.tests] == [0, 0, 0]


async def test_users_come_first(
    tiny_pair: TinyPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Re-runs wait while requests wait; what the queue does not hold is dropped and counted."""
    is_busy = True
    monkeypatch.setattr(AdmissionQueue, "is_busy", property(lambda _: is_busy))
    num = MAX_PENDING + MAX_RUNNING + 3
    call = _call(4, REJECTION, {"temperature": 0.0, "max_tokens": 6})
    async with running_stack(tiny_pair.target, tiny_pair.draft, redis, audit_share=1.0) as stack:
        for _ in range(num):
            await stack.generate(**call)
        found = await _audited(stack, 3)
        assert found.num_dropped["queue_full"] == 3
        assert sum(found.num_generations.values()) == 0
        is_busy = False
        found = await _audited(stack, num)
        assert found.num_generations["same"] == num - 3


async def test_a_rerun_ends_when_a_request_waits(
    tiny_pair: TinyPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-way, and it leaves nothing open at the target."""
    answers = iter([False] * 10 + [True])
    monkeypatch.setattr(AdmissionQueue, "is_busy", property(lambda _: next(answers, False)))

    async def is_closed() -> bool:
        return (await stack.target_load()).num_open_generations == 0

    async with running_stack(tiny_pair.target, tiny_pair.draft, redis, audit_share=1.0) as stack:
        await stack.generate(**_call(4, REJECTION, _GREEDY))
        found = await _audited(stack, 1)
        assert found.num_dropped["busy"] == 1
        await eventually(is_closed)


@pytest.mark.slow
@pytest.mark.parametrize("verification", [REJECTION, BLOCK])
async def test_a_planted_bias_raises_an_alarm(
    verification: int, spread_pair: SpreadPair, redis: str
) -> None:
    """A large one, to be quick; tests/orchestrator/audit has 1 %."""
    sampling = {"ignore_eos": True, "max_tokens": 40}
    call = {"prompt": PROMPT, "sampling": sampling, "verification": verification, "gamma": 3}
    num_tokens = 0
    async with running_stack(
        spread_pair.target, spread_pair.draft, redis,
        audit_share=1.0, audit_planted_bias=0.4, audit_false_alarm_probability=1e-3,
    ) as stack:  # fmt: skip
        while not any(test.num_alarms for test in (await _audit(stack)).tests):
            outputs = await generate_all(stack, [call] * 16, at_once=16)
            num_tokens += sum(len(output.token_ids) for output in outputs)
            assert num_tokens < 20_000
        found = await _audit(stack)
    assert found.planted_bias == pytest.approx(0.4)
    assert np.isclose(found.tests[0].alarm_log_evidence, np.log(3 / 1e-3))
