"""One draft worker for several targets: rows, prompt tokens and KV pages are shared fairly.

The clock advances by the costs of passes, so no real time is involved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from draft_service.messages import OpenDraft, Proposed, TargetIdentity
from outrider.engine import Engine
from outrider.model_server.messages import Failure, FailureReason
from outrider.runtime.protobuf import pack_ranges
from tests.draft_service.draft_worker import PROMPT, Draft, key, opening
from tests.services.noting import Clock
from tests.services.parts import Greedy

BIG = TargetIdentity("models/big", "b" * 64)
SMALL = TargetIdentity("models/small", "5" * 64)
# Passes take as long as they have rows: at most 8 generations are served at a time.
BY_ROWS = {"token_s": 0.001}
BATCH = 8
GAMMA = 3


def opened(draft: Draft, numbers: Iterable[int], target: TargetIdentity) -> None:
    """Opens generations; their prompts have run."""
    for number in numbers:
        context = [number % 256, *PROMPT[1:]]
        draft.run(opening(number, context, max_len=64, target=target, ahead_gamma=0))
        draft.run(draft.commit(number, [8], gamma=1, ahead_gamma=0))


def of(target: TargetIdentity, draft: Draft) -> Counter[str]:
    """The target's statistics."""
    (found,) = [each for each in draft.proposer.statistics().targets if each.name == target.name]
    return Counter(
        open=found.num_open_generations,
        waiting=found.num_waiting_generations,
        tokens=found.num_run_tokens_total,
        compared=found.num_compared_tokens_total,
        agreed=found.num_agreed_tokens_total,
    )


def answered(draft: Draft, events: list[Proposed | Failure], num_passes: int) -> list[set[int]]:
    """The generations that have got their proposal after each pass."""
    rounds = [{event.key.generation_id for event in events}]
    for _ in range(num_passes - 1):
        rounds.append({event.key.generation_id for event in draft.step()})
    return rounds


def test_one_generation_is_not_behind_a_hundred_of_another_target(
    engine: Engine, clock: Clock
) -> None:
    draft = Draft(engine, clock, **BY_ROWS)
    many, single = range(1, 26), 40
    opened(draft, many, BIG)
    opened(draft, [single], SMALL)
    # All of the big target's ask first.
    events = draft.step(*(draft.commit(number, [9], ahead_gamma=0) for number in (*many, single)))
    assert of(SMALL, draft)["waiting"] == 1
    rounds = answered(draft, events, GAMMA)
    assert single in rounds[-1], "as soon as its tokens can be sampled one by one"
    assert len(rounds[-1]) == BATCH, "the rest of the batch is the other target's"
    assert of(SMALL, draft)["waiting"] == 0
    assert of(BIG, draft)["waiting"] == len(many) - BATCH + 1
    draft.close()


def test_where_both_want_all_each_gets_half(engine: Engine, clock: Clock) -> None:
    """Twenty against eight that always ask again: of 30 batches each target has half the rows."""
    draft = Draft(engine, clock, **BY_ROWS)
    of_target = {number: BIG for number in range(1, 21)}
    of_target |= {number: SMALL for number in range(31, 39)}
    for target in (BIG, SMALL):
        opened(draft, [n for n, t in of_target.items() if t is target], target)
    before = {target: of(target, draft)["tokens"] for target in (BIG, SMALL)}
    commits = [draft.commit(number, [9], ahead_gamma=0) for number in of_target]
    num_answered: Counter[TargetIdentity] = Counter()
    for number_of_pass in range(30):
        events = draft.step(*commits)
        answers = [event.key.generation_id for event in events if isinstance(event, Proposed)]
        num_answered.update(of_target[number] for number in answers)
        token = 10 + 7 * number_of_pass  # none that the draft has proposed
        commits = [draft.commit(number, [token], ahead_gamma=0) for number in answers]
    tokens = {target: of(target, draft)["tokens"] - before[target] for target in (BIG, SMALL)}
    assert abs(tokens[BIG] - tokens[SMALL]) <= BATCH
    assert abs(num_answered[BIG] - num_answered[SMALL]) <= BATCH
    assert min(num_answered.values()) > 30
    draft.close()


def test_a_target_alone_gets_everything(engine: Engine, clock: Clock) -> None:
    """The other one is connected, and idle."""
    draft = Draft(engine, clock, **BY_ROWS)
    opened(draft, range(1, 21), BIG)
    opened(draft, [30], SMALL)
    events = draft.step(*(draft.commit(n, [9], ahead_gamma=0) for n in range(1, 21)))
    assert len(answered(draft, events, GAMMA)[-1]) == BATCH
    draft.close()


def test_long_prompts_of_one_do_not_hold_up_the_other(engine: Engine, clock: Clock) -> None:
    """Four prompts of 200 tokens, 32 a pass. The other's 60 tokens take every other pass."""
    draft = Draft(engine, clock)
    draft.step(*(prompt(n, 200, BIG) for n in range(1, 5)))
    draft.step(prompt(9, 60, SMALL))
    for _ in range(4):
        draft.step()
    assert of(SMALL, draft)["tokens"] >= 60
    assert 2 * 32 <= of(BIG, draft)["tokens"] <= 5 * 32
    draft.run()
    draft.close()


def prompt(number: int, length: int, target: TargetIdentity) -> OpenDraft:
    context = [(number * 31 + i) % 256 for i in range(length)]
    return opening(number, context, max_len=256, target=target, gamma=1, lookahead=0)


def test_kv_pages_are_shared(engine: Engine, clock: Clock, truth: Greedy) -> None:
    """One target has filled all pages. The other gets its half, and no more."""
    draft = Draft(engine, clock)
    for number in range(1, 9):
        draft.run(prompt(number, 120, BIG))
    assert draft.engine.store.used_tokens == 7 * 128
    assert of(BIG, draft)["open"] == 7, "the last one found no room"
    lost: Counter[int] = Counter()
    for number in range(11, 19):
        events = draft.run(prompt(number, 120, SMALL))
        failures = [event for event in events if isinstance(event, Failure)]
        assert {failure.reason for failure in failures} <= {FailureReason.KV_FULL}
        lost.update(failure.key.generation_id for failure in failures)
    assert 3 <= of(SMALL, draft)["open"] <= 4
    victims = sorted(number for number in lost if number < 10)
    assert len(victims) == 7 - of(BIG, draft)["open"]
    assert 3 <= of(BIG, draft)["open"] <= 5
    assert victims == list(range(8 - len(victims), 8)), "the latest of the other target"
    # One that was preempted comes back, and finds no room: both have their share.
    (full,) = [e for e in draft.run(prompt(7, 120, BIG)) if isinstance(e, Failure)]
    assert (full.key, full.reason) == (key(7), FailureReason.KV_FULL)
    draft.engine.store.check_integrity()
    draft.close()


def test_each_target_teaches_its_own_acceptance_model(draft: Draft, truth: Greedy) -> None:
    """One accepts every draft token, the other none."""
    draft.run(opening(1, target=BIG, lookahead=0))
    draft.run(opening(2, target=SMALL, lookahead=0))
    committed = list(PROMPT)
    for _ in range(10):
        draft.run(draft.commit(1, [7], gamma=3))
        committed.append(7)
        accepted = truth(committed, 3)
        draft.run(draft.commit(1, accepted, gamma=3))
        committed += accepted
    wrong = list(PROMPT)
    for _ in range(20):
        (token,) = truth(wrong, 1)
        wrong.append((token + 1) % 256)
        draft.run(draft.commit(2, wrong[-1:], gamma=3))
    big, small = of(BIG, draft), of(SMALL, draft)
    assert big["agreed"] >= 30
    assert small["agreed"] == 0
    assert small["compared"] >= 19


def test_idle_targets_are_forgotten(draft: Draft) -> None:
    """Names come from orchestrators: their number is bounded."""
    for number in range(100):
        draft.run(opening(1, target=TargetIdentity(f"models/{number}"), lookahead=0))
        draft.close()
    assert len(draft.proposer.statistics().targets) <= 33


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_draft_and_target_do_not_share_are_never_proposed(
    temperature: float, draft: Draft, truth: Greedy
) -> None:
    """Not even those that the draft likes best, and only for the target that lacks them."""
    liked = sorted({*truth(PROMPT, 4), *truth([*PROMPT, 9], 4)})
    lacking = TargetIdentity("models/lacking", "1" * 64, pack_ranges(np.array(liked)))
    fields = {"gamma": 3, "fan_out": 8, "sampling": {"temperature": temperature}}
    proposals = draft.proposals(opening(1, target=lacking, **fields))
    proposals += draft.proposals(draft.commit(1, [9]))
    assert len(proposals) > 2
    for proposal in proposals:
        assert not {*proposal.token_ids, *proposal.assumed_token_ids} & {*liked}
        for support in proposal.supports or ():
            assert not {*support.token_ids.tolist()} & {*liked}
    with_all = draft.proposals(opening(2, target=BIG, gamma=3))
    assert list(with_all[0].token_ids) == truth(PROMPT, 3)
