"""The target worker with any mix of generations and any KV size: all end with right tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from outrider.engine.simulated import SimulatedEngine
from outrider.model_server.messages import Close, Failure, FailureReason
from outrider.model_server.scheduler import GenerationKey
from outrider.sampling.params import SamplingParams
from outrider.settings.simulation import Simulation
from target_service.messages import OpenTarget, Verified, Verify
from target_service.verifier import Verifier

PAGE = 16
VOCAB_SIZE = 50
SIMULATION = Simulation.parse(f"step_ms=0,vocab_size={VOCAB_SIZE},context_len=1024")
MAX_GAMMA = 4


@dataclass(eq=False)
class Generation:
    """A generation as its orchestrator sees it; it begins at step `starts_at`."""

    number: int
    priority: int
    prompt: list[int]
    num_tokens: int
    gamma: int
    starts_at: int
    context: list[int] = field(default_factory=list)
    key: GenerationKey | None = None
    held: int = 0
    num_refused: int = 0
    drafts: list[int] = field(default_factory=list)

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.number

    @property
    def max_len(self) -> int:
        return len(self.prompt) + self.num_tokens

    @property
    def is_done(self) -> bool:
        return len(self.context) >= self.max_len


class Play:
    """All generations of one orchestrator at one target with `num_pages`."""

    def __init__(self, num_pages: int, generations: Sequence[Generation]) -> None:
        self.engine = SimulatedEngine(SIMULATION, num_pages * PAGE)
        self.target = Verifier(
            self.engine, max_gamma=MAX_GAMMA, max_step_tokens=64, idle_session_ttl_s=60.0
        )
        self.generations = list(generations)
        self.num_opened = self.num_steps = self.num_preempted = 0
        self.closing: list[Close] = []

    def run(self) -> None:
        for generation in self.generations:
            generation.context = list(generation.prompt)
        # Each alone would take a step a token; what is computed again is not much more than that.
        most = 20 + sum(g.starts_at + 4 * g.max_len for g in self.generations)
        while not all(g.is_done for g in self.generations):
            self.step()
            assert self.num_steps <= most, "it does not come to an end"
        self.target.step(self.closing, lambda: True)
        assert self.engine.store.used_tokens == 0
        self.engine.store.check_integrity()

    def step(self) -> None:
        """Acts as an orchestrator: generations without room retry first, then new ones open."""
        self.num_steps += 1
        commands: list[OpenTarget | Verify | Close] = list(self.closing)
        self.closing.clear()
        for generation in self.waiting():
            self.num_opened += 1
            generation.key = GenerationKey(1, self.num_opened)
            generation.held = 0
            commands.append(self.opening(generation, generation.key))
        is_open = [g for g in self.generations if g.key is not None]
        commands += [self.row(g) for g in is_open]
        self.handle(self.target.step(commands, lambda: True), is_open)

    def waiting(self) -> list[Generation]:
        there = [g for g in self.generations if g.starts_at < self.num_steps and not g.is_done]
        closed = sorted((g for g in there if g.key is None), key=lambda g: g.order)
        short = [g for g in closed if g.num_refused][:1]
        return [
            g for g in closed if not g.num_refused and not (short and short[0].order < g.order)
        ] + short

    def opening(self, generation: Generation, key: GenerationKey) -> OpenTarget:
        return OpenTarget(
            key=key,
            session_id=f"s{generation.number}",
            epoch=self.num_opened,
            kept_epoch=0,
            prompt_len=len(generation.prompt),
            max_len=generation.max_len,
            params=SamplingParams(temperature=0.0, max_tokens=generation.num_tokens, seed=0),
            priority=generation.priority,
            preempts=generation.num_refused > 0,
            age_s=1e6 - generation.number,
        )

    def row(self, generation: Generation) -> Verify:
        """A verify request whose last draft token is wrong."""
        context = generation.context
        room = generation.max_len - len(context) - 1
        drafts, previous = list[int](), context[-1]
        for position in range(len(context), len(context) + min(generation.gamma, room)):
            previous = self.engine.truth(position, previous)
            drafts.append(previous)
        if drafts:
            drafts[-1] = (drafts[-1] + 1) % VOCAB_SIZE
        generation.drafts = drafts
        assert generation.key is not None
        new = np.asarray(context[generation.held :])
        return Verify(generation.key, generation.held, new, np.asarray(drafts, np.int64), None)

    def handle(self, results: Sequence[Verified | Failure], is_open: list[Generation]) -> None:
        by_key = {g.key: g for g in is_open}
        first = min(is_open, key=lambda g: g.order, default=None)
        while True:  # until every row is answered
            for result in results:
                if (generation := by_key.pop(result.key, None)) is None:
                    continue  # the row of one that could not even be opened
                if isinstance(result, Failure):
                    assert result.reason is FailureReason.KV_FULL, result
                    assert generation is not first or not generation.held, "the first gave way"
                    self.num_preempted += generation.held > 0
                    generation.key, generation.num_refused = None, generation.num_refused + 1
                else:
                    self.commit(generation, result)
            self.engine.store.check_integrity()
            if not by_key:
                return
            assert self.target.has_work, "a row was forgotten"
            results = self.target.step([], lambda: True)

    def commit(self, generation: Generation, reply: Verified) -> None:
        samples, context = reply.reply.sample_ids.tolist(), generation.context
        generation.held = len(context)
        for sample, draft in zip(samples, [*generation.drafts, None], strict=True):
            assert sample == self.engine.truth(len(context), context[-1]), "another token"
            context.append(sample)
            if sample != draft:
                break
            generation.held += 1
        generation.num_refused = 0
        if generation.is_done:
            assert generation.key is not None
            self.closing.append(Close(generation.key, keep=False))
            generation.key = None


words = st.lists(st.integers(0, 2), min_size=1, max_size=8)
asked = st.tuples(
    st.integers(0, 2), words, st.integers(1, 120), st.integers(0, MAX_GAMMA), st.integers(0, 30)
)


def play(num_pages: int, asked: list[tuple[int, list[int], int, int, int]]) -> Play:
    generations = []
    for number, (priority, prompt_words, num_tokens, gamma, starts_at) in enumerate(asked):
        prompt = [word for word in prompt_words for _ in range(8)]
        num_tokens = min(num_tokens, num_pages * PAGE - len(prompt))
        generations.append(Generation(number, priority, prompt, num_tokens, gamma, starts_at))
    made = Play(num_pages, generations)
    made.run()
    return made


@settings(max_examples=40, deadline=None, derandomize=True)
@given(num_pages=st.integers(5, 24), asked=st.lists(asked, min_size=1, max_size=10))
def test_all_generations_end_with_the_right_tokens(
    num_pages: int, asked: list[tuple[int, list[int], int, int, int]]
) -> None:
    """Each fits the KV cache alone. The most urgent, of those the first, is never preempted."""
    play(num_pages, asked)


def test_most_of_the_work_is_done_once() -> None:
    """Ten long ones in memory for three: few preemptions."""
    made = play(24, [(0, [n % 3] * 4, 88, n % 4, 0) for n in range(10)])
    assert 1 <= made.num_preempted <= 20
