"""Jobs of a chaos run: requests and the behaviour of their clients.

Pure functions of a seed and an index, endless. Sends nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from outrider.v1 import orchestrator_pb2, sampling_pb2


class SamplingMethod(StrEnum):
    """How tokens are chosen. With the first two the output depends on the request alone."""

    GREEDY = "greedy"
    COUPLED = "coupled"
    REJECTION = "rejection"


class ClientBehaviour(StrEnum):
    """What the client does besides reading and resuming broken streams."""

    LISTENS = "listens"
    # Disconnects during the output and resumes at once, on any orchestrator.
    RETURNS = "returns"
    # Disconnects during the output for good.
    ABANDONS = "abandons"
    # Sends its request to two orchestrators at once; one of them must refuse.
    ASKS_TWICE = "asks twice"
    # Disconnects, then resumes on two orchestrators at once.
    RESUMES_TWICE = "resumes twice"


_BEHAVIOUR_WEIGHTS = {
    ClientBehaviour.LISTENS: 64,
    ClientBehaviour.RETURNS: 12,
    ClientBehaviour.ABANDONS: 8,
    ClientBehaviour.ASKS_TWICE: 8,
    ClientBehaviour.RESUMES_TWICE: 8,
}
# Not possible with a single orchestrator.
_NEED_TWO_ORCHESTRATORS = (ClientBehaviour.ASKS_TWICE, ClientBehaviour.RESUMES_TWICE)
# Shorter outputs may end before their client disconnects.
_MIN_TOKENS_TO_DISCONNECT = 8
_MAX_PROMPT_LEN = 48
_TEMPERATURES = (0.7, 1.0)
# None: adaptive, as for most clients.
_GAMMAS = (None, None, None, 0, 1, 4)


@dataclass(frozen=True)
class Case:
    """A prompt and its sampling parameters. A shorter output is a prefix of a longer one."""

    index: int
    method: SamplingMethod
    prompt_ids: tuple[int, ...]
    temperature: float
    seed: int
    ignores_eos: bool

    @property
    def is_deterministic(self) -> bool:
        """Whether the output is independent of rounds, drafts and faults."""
        return self.method is not SamplingMethod.REJECTION

    def sampling(self, max_tokens: int) -> sampling_pb2.SamplingParams:
        """Sampling parameters of a request."""
        return sampling_pb2.SamplingParams(
            temperature=self.temperature,
            seed=self.seed,
            max_tokens=max_tokens,
            ignore_eos=self.ignores_eos,
        )

    def request(
        self, prompt_ids: tuple[int, ...], max_tokens: int
    ) -> orchestrator_pb2.GenerateRequest:
        """Request without a session."""
        request = orchestrator_pb2.GenerateRequest(sampling=self.sampling(max_tokens))
        request.token_ids.ids.extend(prompt_ids)
        if self.method is SamplingMethod.COUPLED:
            request.verification = sampling_pb2.VERIFICATION_COUPLED
        elif self.method is SamplingMethod.REJECTION:
            request.verification = sampling_pb2.VERIFICATION_REJECTION
        return request


@dataclass(frozen=True)
class Job:
    """One generation. `disconnects_at`: number of tokens after which its client disconnects."""

    index: int
    case: Case
    session_id: str
    max_tokens: int
    gamma: int | None
    behaviour: ClientBehaviour
    disconnects_at: int | None
    # Index of the orchestrator called first.
    first_orchestrator: int

    def __str__(self) -> str:
        return f"{self.session_id} ({self.case.method}, {self.max_tokens} tokens, {self.behaviour})"

    def request(self) -> orchestrator_pb2.GenerateRequest:
        """First request; creates the session."""
        request = self.case.request(self.case.prompt_ids, self.max_tokens)
        request.session_id, request.create_session = self.session_id, True
        if self.gamma is not None:
            request.gamma = self.gamma
        return request

    def resume_request(self, num_received: int) -> orchestrator_pb2.GenerateRequest:
        """Request that resumes after the first `num_received` tokens."""
        return orchestrator_pb2.GenerateRequest(
            session_id=self.session_id, resume_from=num_received
        )


def make_cases(seed: int, num_cases: int, vocab_size: int) -> list[Case]:
    """Cases of all methods in turn. Token ids are uniform over the vocabulary."""
    cases = []
    for index, method in zip(range(num_cases), itertools.cycle(SamplingMethod), strict=False):
        generator = random.Random(f"outrider case {seed} {index}")
        length = generator.randint(1, _MAX_PROMPT_LEN)
        cases.append(
            Case(
                index=index,
                method=method,
                prompt_ids=tuple(generator.randrange(vocab_size) for _ in range(length)),
                temperature=0.0
                if method is SamplingMethod.GREEDY
                else generator.choice(_TEMPERATURES),
                seed=generator.getrandbits(63),
                # The output of rejection sampling is not known, but its length then is.
                ignores_eos=method is SamplingMethod.REJECTION or generator.random() < 0.5,
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
    """Endless jobs. `prefix`: of the session names; must differ from those of other runs."""
    weights = {
        c: n
        for c, n in _BEHAVIOUR_WEIGHTS.items()
        if num_orchestrators > 1 or c not in _NEED_TWO_ORCHESTRATORS
    }
    for index in itertools.count():
        generator = random.Random(f"outrider job {seed} {index}")
        length = generator.randint(1, max_tokens)
        (behaviour,) = generator.choices(list(weights), list(weights.values()))
        disconnects_at = None
        if length < _MIN_TOKENS_TO_DISCONNECT:
            behaviour = ClientBehaviour.LISTENS
        elif behaviour not in (ClientBehaviour.LISTENS, ClientBehaviour.ASKS_TWICE):
            disconnects_at = generator.randint(1, length - 2)
        gamma = generator.choice(_GAMMAS)
        yield Job(
            index=index,
            case=cases[index % len(cases)],
            session_id=f"{prefix}-{index}",
            max_tokens=length,
            gamma=None if gamma is None else min(gamma, max_gamma),
            behaviour=behaviour,
            disconnects_at=disconnects_at,
            first_orchestrator=generator.randrange(num_orchestrators),
        )
