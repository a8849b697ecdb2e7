"""What is asked of a system under faults: requests of all kinds, and how their callers behave.

Pure functions of a seed and an index, without end. Sends nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from outrider.v1 import orchestrator_pb2, sampling_pb2


class Method(StrEnum):
    """How tokens are chosen. The output of the first two is a function of the request alone."""

    GREEDY = "greedy"
    COUPLED = "coupled"
    REJECTION = "rejection"


class Caller(StrEnum):
    """What the caller does beyond listening and, where a stream breaks, resuming it."""

    LISTENS = "listens"
    # Disconnects in the midst and resumes at once, on any orchestrator.
    RETURNS = "returns"
    # Disconnects in the midst and never comes back.
    ABANDONS = "abandons"
    # Sends its request to two orchestrators at once: one of them must be refused.
    ASKS_TWICE = "asks twice"
    # Disconnects, then resumes on two orchestrators at once.
    RESUMES_TWICE = "resumes twice"


_CALLERS = {
    Caller.LISTENS: 64,
    Caller.RETURNS: 12,
    Caller.ABANDONS: 8,
    Caller.ASKS_TWICE: 8,
    Caller.RESUMES_TWICE: 8,
}
# What a single orchestrator has nobody to share with.
_OF_TWO = (Caller.ASKS_TWICE, Caller.RESUMES_TWICE)
# Shorter outputs are over before their caller can do anything.
_LEAST_TO_LEAVE = 8
_MAX_PROMPT_LEN = 48
_TEMPERATURES = (0.7, 1.0)
# None: chosen round by round, as most callers have it.
_GAMMAS = (None, None, None, 0, 1, 4)


@dataclass(frozen=True)
class Case:
    """A prompt and how to continue it; its output of any length begins that of a greater one."""

    index: int
    method: Method
    prompt_ids: tuple[int, ...]
    temperature: float
    seed: int
    ignores_eos: bool

    @property
    def is_repeatable(self) -> bool:
        """Its output does not depend on rounds, drafts or faults."""
        return self.method is not Method.REJECTION

    def sampling(self, max_tokens: int) -> sampling_pb2.SamplingParams:
        return sampling_pb2.SamplingParams(
            temperature=self.temperature,
            seed=self.seed,
            max_tokens=max_tokens,
            ignore_eos=self.ignores_eos,
        )

    def request(
        self, prompt_ids: tuple[int, ...], max_tokens: int
    ) -> orchestrator_pb2.GenerateRequest:
        """A one-off."""
        request = orchestrator_pb2.GenerateRequest(sampling=self.sampling(max_tokens))
        request.token_ids.ids.extend(prompt_ids)
        if self.method is Method.COUPLED:
            request.verification = sampling_pb2.VERIFICATION_COUPLED
        elif self.method is Method.REJECTION:
            request.verification = sampling_pb2.VERIFICATION_REJECTION
        return request


@dataclass(frozen=True)
class Job:
    """One generation. `leaves_at`: tokens after which its caller disconnects, if it does."""

    index: int
    case: Case
    session_id: str
    max_tokens: int
    gamma: int | None
    caller: Caller
    leaves_at: int | None
    # The orchestrator it goes to first.
    first: int

    def __str__(self) -> str:
        return f"{self.session_id} ({self.case.method}, {self.max_tokens} tokens, {self.caller})"

    def request(self) -> orchestrator_pb2.GenerateRequest:
        """The first one, in a session of its own."""
        request = self.case.request(self.case.prompt_ids, self.max_tokens)
        request.session_id, request.create_session = self.session_id, True
        if self.gamma is not None:
            request.gamma = self.gamma
        return request

    def resumption(self, num_held: int) -> orchestrator_pb2.GenerateRequest:
        return orchestrator_pb2.GenerateRequest(session_id=self.session_id, resume_from=num_held)


def make_cases(seed: int, num_cases: int, vocab_size: int) -> list[Case]:
    """As many of each method, one after the other. Token ids are any of the vocabulary's."""
    cases = []
    for index, method in zip(range(num_cases), itertools.cycle(Method), strict=False):
        generator = random.Random(f"outrider case {seed} {index}")
        length = generator.randint(1, _MAX_PROMPT_LEN)
        cases.append(
            Case(
                index=index,
                method=method,
                prompt_ids=tuple(generator.randrange(vocab_size) for _ in range(length)),
                temperature=0.0 if method is Method.GREEDY else generator.choice(_TEMPERATURES),
                seed=generator.getrandbits(63),
                # Of outputs that cannot be foreseen the length can, at least.
                ignores_eos=method is Method.REJECTION or generator.random() < 0.5,
            )
        )
    return cases


def make_jobs(
    seed: int,
    cases: list[Case],
    *,
    prefix: str,
    max_tokens: int,
    max_gamma: int,
    num_orchestrators: int,
) -> Iterator[Job]:
    """Without end. `prefix`: of the sessions' names, not to meet those of another run."""
    callers = {c: n for c, n in _CALLERS.items() if num_orchestrators > 1 or c not in _OF_TWO}
    for index in itertools.count():
        generator = random.Random(f"outrider job {seed} {index}")
        length = generator.randint(1, max_tokens)
        (caller,) = generator.choices(list(callers), list(callers.values()))
        leaves_at = None
        if length < _LEAST_TO_LEAVE:
            caller = Caller.LISTENS
        elif caller not in (Caller.LISTENS, Caller.ASKS_TWICE):
            leaves_at = generator.randint(1, length - 2)
        gamma = generator.choice(_GAMMAS)
        yield Job(
            index=index,
            case=cases[index % len(cases)],
            session_id=f"{prefix}-{index}",
            max_tokens=length,
            gamma=None if gamma is None else min(gamma, max_gamma),
            caller=caller,
            leaves_at=leaves_at,
            first=generator.randrange(num_orchestrators),
        )
