"""A draft worker without its service: runs a pass at a time and records what is fed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from draft_service.messages import Command, Commit, OpenDraft, Proposed
from draft_service.scheduler_worker import Proposer
from draft_service.tree.tree import SpeculationTree
from outrider.engine import Engine
from outrider.model_server.messages import Close, Failure
from outrider.model_server.scheduler import GenerationKey
from outrider.sampling.params import SamplingParams, Verification
from tests.services.noting import Clock, NotingEngine

PROMPT = [3, 1, 4, 1, 5]
KV_TOKENS = 1024
NUM_STEPS = 2_000
GREEDY = {"temperature": 0.0}


def key(number: int) -> GenerationKey:
    return GenerationKey(1, number)


def opening(number: int, context: Sequence[int] = PROMPT, **fields: Any) -> OpenDraft:
    """Greedy, blocks of three tokens, one round ahead, four outcomes per block."""
    given: dict[str, Any] = {
        "session_id": f"session-{number}",
        "epoch": 1,
        "prompt_len": len(context),
        "max_len": 128,
        "verification": Verification.REJECTION,
        "gamma": 0,
        "ahead_gamma": 3,
        "lookahead": 1,
        "fan_out": 4,
        "vocab_size": 256,
    } | fields
    sampling = {**GREEDY, **given.pop("sampling", {})}
    params = SamplingParams(**{"max_tokens": 1, "seed": 0, **sampling})
    return OpenDraft(key=key(number), token_ids=np.array(context), params=params, **given)


class Draft:
    """A worker whose passes are recorded."""

    def __init__(self, engine: Engine, clock: Clock, *, max_branches: int = 64, **seconds: float):
        self.engine = NotingEngine(engine, clock, **seconds)
        self.proposer = Proposer(
            self.engine,
            max_gamma=16,
            max_step_tokens=32,
            max_branches=max_branches,
            idle_session_ttl_s=60.0,
        )
        self.proposer.prepare(3.0)
        self.engine.passes.clear()
        self.committed: dict[int, int] = {}

    def step(self, *commands: Command) -> list[Proposed | Failure]:
        """One pass at most."""
        return self.proposer.step(commands, lambda: True)

    def run(self, *commands: Command) -> list[Proposed | Failure]:
        """Steps until there is no more work."""
        events = self.step(*commands)
        for _ in range(NUM_STEPS):
            if not self.proposer.has_work:
                return events
            events += self.step()
        raise AssertionError("it does not come to an end")

    def proposals(self, *commands: Command) -> list[Proposed]:
        """Runs until there is no more work. The last event of each block, in that order."""
        last: dict[tuple[int, tuple[int, ...]], Proposed] = {}
        for event in self.run(*commands):
            assert isinstance(event, Proposed), event
            place = (event.base_len, tuple(event.assumed_token_ids))
            former = last.pop(place, event)
            assert list(event.token_ids[: len(former.token_ids)]) == list(former.token_ids)
            last[place] = event
        return list(last.values())

    def tree(self, number: int) -> SpeculationTree:
        return self.proposer._drafting[key(number)].tree

    def drafted(self, number: int) -> list[tuple[int, ...]]:
        """The assumed tokens of each complete block drafted ahead, sent or not."""
        tree = self.tree(number)
        ahead = [block for block in tree.blocks() if block is not tree.root]
        return [tuple(tree.assumed(block)) for block in ahead if block.is_complete]

    def commit(self, number: int, new: Sequence[int], **fields: int) -> Commit:
        before = self.committed.get(number, len(PROMPT))
        self.committed[number] = before + len(new)
        given = {"gamma": 3, "ahead_gamma": 3, **fields}
        return Commit(key(number), list(new), before + len(new), **given)

    def close(self) -> None:
        for number in range(64):
            self.step(Close(key(number), keep=False))
        assert not self.proposer.has_work
        assert self.proposer.num_open == 0
        assert self.engine.store.used_tokens == 0
        self.engine.store.check_integrity()
