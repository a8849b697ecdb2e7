"""Many calls at once, and what must hold of every output."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

import orchestrator.replicas.draft_client
import orchestrator.replicas.target_client
from orchestrator.replicas.target_client import TargetHandle
from orchestrator.speculation.round_costs import PairCosts
from orchestrator.speculation.verification import Proposal, VerifyResult
from outrider.replica import CostReport
from outrider.v1 import orchestrator_pb2, sampling_pb2
from tests.stack import Output, Stack

REJECTION = sampling_pb2.VERIFICATION_REJECTION
COUPLED = sampling_pb2.VERIFICATION_COUPLED
BLOCK = sampling_pb2.VERIFICATION_BLOCK

ACCEPTED = orchestrator_pb2.TOKEN_ORIGIN_ACCEPTED
RECOVERED = orchestrator_pb2.TOKEN_ORIGIN_RECOVERED
BONUS = orchestrator_pb2.TOKEN_ORIGIN_BONUS
PLAIN = orchestrator_pb2.TOKEN_ORIGIN_PLAIN

STOP = orchestrator_pb2.FINISH_REASON_STOP
LENGTH = orchestrator_pb2.FINISH_REASON_LENGTH

# How drafts may be asked for: every γ, chosen and fixed, with look-ahead and fan-out of each kind.
SETTINGS: list[dict[str, int]] = [
    {"lookahead": lookahead, "fan_out": fan_out} | ({} if gamma is None else {"gamma": gamma})
    for gamma in (None, 0, 1, 3, 5, 8, 16)
    for lookahead, fan_out in ((0, 1), (1, 1), (1, 16), (2, 4), (4, 16))
]


def far_target(monkeypatch: pytest.MonkeyPatch, delay_s: float) -> None:
    """Its verdicts take so much longer, and passes are said to be long, whatever they hold.

    So a few draft tokens are worth while, and there is time to draft ahead. How long answers are
    under way is not learnt: where the machine is busy, no draft token would be worth while.
    """
    target, draft = CostReport((1, 256), (0.05, 0.051)), CostReport((1,), (0.012,))
    monkeypatch.setattr(orchestrator.replicas.target_client, "costs_from_proto", lambda _: target)
    monkeypatch.setattr(orchestrator.replicas.draft_client, "costs_from_proto", lambda _: draft)
    for learning in ("observe_result", "observe_proposal", "observe_missing_proposal"):
        monkeypatch.setattr(PairCosts, learning, lambda *_, **__: None)
    reply = TargetHandle.reply

    async def late_reply(
        self: TargetHandle, proposal: Proposal | None, timeout_s: float
    ) -> VerifyResult:
        await asyncio.sleep(delay_s)
        return await reply(self, proposal, timeout_s)

    monkeypatch.setattr(TargetHandle, "reply", late_reply)


async def generate_all(
    stack: Stack, calls: Iterable[dict[str, Any]], at_once: int = 64
) -> list[Output]:
    """The outputs in the order of the calls, each the keyword arguments of `Stack.generate`."""
    room = asyncio.Semaphore(at_once)

    async def one(call: dict[str, Any]) -> Output:
        async with room:
            return await stack.generate(**call)

    return await asyncio.gather(*(one(call) for call in calls))


def prompt_of(length: int, *, vocab_size: int = 256, seed: int = 0) -> list[int]:
    rng = np.random.default_rng((seed, length))
    tokens: list[int] = rng.integers(vocab_size - 1, size=length).tolist()
    return tokens


def num_drafted(outputs: Sequence[Output]) -> tuple[int, int]:
    """Draft tokens verified and accepted, of all outputs together."""
    stats = [output.speculation for output in outputs]
    return sum(s.num_draft_tokens for s in stats), sum(s.num_accepted_tokens for s in stats)


def assert_speculated(outputs: Sequence[Output]) -> None:
    """Drafts were used, and were rejected too: else nothing was tested."""
    drafted, accepted = num_drafted(outputs)
    assert 0 < accepted < drafted, f"{accepted} of {drafted} draft tokens accepted"


def check_setting(how: dict[str, int], output: Output) -> None:
    """That the output was made as was asked, as far as its statistics tell."""
    stats, gamma = output.speculation, how.get("gamma")
    assert stats.HasField("gamma") == (gamma is not None)
    assert stats.HasField("decision") == (gamma != 0)
    assert stats.decision.is_fixed == bool(gamma)
    assert sum(stats.num_rounds_per_gamma) == stats.num_rounds - 1
    by_gamma = list(enumerate(stats.num_rounds_per_gamma))
    assert sum(gamma * count for gamma, count in by_gamma) == stats.num_draft_tokens
    assert sum(count for gamma, count in by_gamma if gamma) == stats.num_drafts
    assert 0 < stats.target_step_s <= stats.verify_s
    if gamma is not None:
        assert len(stats.num_rounds_per_gamma) <= gamma + 1
        assert stats.gamma == gamma
    if gamma == 0:
        assert stats.num_drafts == stats.draft_wire_bytes == stats.draft_wait_s == 0
    if gamma is not None and not how["lookahead"]:
        assert stats.num_lookahead_hits == 0
