"""Generations in a format: what is asked for, what must hold of the output, and what did not."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from outrider.sampling.structured_outputs import StructuredOutputs
from outrider.v1 import orchestrator_pb2, sampling_pb2
from outrider_bench.structured.schemas import Schema, random_schema

_TEMPERATURES = (0.0, 0.3, 0.7, 1.0, 1.5)
_GAMMAS = (1, 2, 4, 8)
_METHODS = (
    sampling_pb2.VERIFICATION_REJECTION,
    sampling_pb2.VERIFICATION_COUPLED,
    sampling_pb2.VERIFICATION_BLOCK,
)
# Streams, and the share of the cases with that many: few streams take long.
STREAMS = ((1, 0.04), (4, 0.12), (16, 0.28), (32, 0.56))


@dataclass(frozen=True)
class Case:
    """One generation. `num_streams`: how many run at the same time. `gamma` None: chosen."""

    number: int
    schema: Schema
    temperature: float
    gamma: int | None
    method: Any
    seed: int
    num_streams: int

    @property
    def is_repeatable(self) -> bool:
        """Whether the output must equal the one without drafts."""
        return not self.temperature or self.method == sampling_pb2.VERIFICATION_COUPLED

    @property
    def structured(self) -> StructuredOutputs:
        return StructuredOutputs(json=json.dumps(self.schema))

    def without_drafts(self) -> Case:
        return replace(self, gamma=0)

    def request(self, prompt: str, max_tokens: int) -> orchestrator_pb2.GenerateRequest:
        request = orchestrator_pb2.GenerateRequest(
            text=prompt,
            verification=self.method,
            sampling=sampling_pb2.SamplingParams(
                temperature=self.temperature,
                seed=self.seed,
                max_tokens=max_tokens,
                structured_outputs=sampling_pb2.StructuredOutputs(json=self.structured.json),
            ),
        )
        if self.gamma is not None:
            request.gamma = self.gamma
        return request


def random_cases(num: int, seed: int) -> Iterator[Case]:
    """Schemas, seeds, temperatures, methods and γ at random; streams in turn."""
    rng = random.Random(seed)
    for number in range(num):
        yield Case(
            number=number,
            schema=random_schema(rng),
            temperature=rng.choice(_TEMPERATURES),
            gamma=rng.choice((*_GAMMAS, None)),
            method=rng.choice(_METHODS),
            seed=rng.randrange(1 << 40),
            num_streams=_num_streams(number / num),
        )


def _num_streams(place: float) -> int:
    """Streams of the case at this place in [0, 1) of all cases."""
    ends = itertools.accumulate(share for _, share in STREAMS)
    ways = zip(STREAMS, ends, strict=True)
    return next((num for (num, _), end in ways if place < end), STREAMS[-1][0])


@dataclass(frozen=True)
class CaseResult:
    """Outcome of a case. `problem`: empty if all holds. `token_ids`: of the output with drafts."""

    case: Case
    finish_reason: str
    text: str
    token_ids: list[int]
    num_draft_tokens: int
    num_accepted_tokens: int
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Entry of the JSON document."""
        case = self.case
        return {
            "number": case.number,
            "temperature": case.temperature,
            "gamma": case.gamma,
            "method": sampling_pb2.Verification.Name(case.method),
            "num_streams": case.num_streams,
            "finish_reason": self.finish_reason,
            "num_tokens": len(self.token_ids),
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "problem": self.problem,
        }


def problem_of(case: Case, finish_reason: str, text: str) -> str:
    """Why an output that ended by itself is not in its format; empty if it is."""
    import jsonschema  # type: ignore[import-untyped]

    if finish_reason != "stop":
        return ""
    try:
        jsonschema.Draft202012Validator(case.schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}: {text}"
    return ""
