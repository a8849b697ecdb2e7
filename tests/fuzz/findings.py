"""What a fuzzing run has sent, what came back, and what should never have.

Knows what no answer may say whatever was asked; knows no connections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from outrider.runtime.protobuf import FLOAT32, UINT16, UINT32, unpack
from outrider.v1 import draft_pb2, orchestrator_pb2, target_pb2

_MAX_DEFECTS = 20
# Probabilities are rounded to float32, and sums of them with it.
_SLACK = 1e-3
# What gRPC's own client says of a call that is cancelled before it has begun.
_GIVEN_UP = "Internal error from Core"


@dataclass
class Findings:
    """`defects` are sentences; a run without any has passed."""

    sent: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    # Names under which sessions may have been left.
    session_ids: set[str] = field(default_factory=set)
    # Targets whose sessions may have been left at the draft; "": a stream that names none.
    fingerprints: set[str] = field(default_factory=lambda: {""})
    num_healthy_tokens: int = 0

    def defect(self, text: str) -> None:
        if len(self.defects) < _MAX_DEFECTS:
            self.defects.append(text[:500])

    def ended(self, code: grpc.StatusCode, details: str, allowed: Iterable[Any]) -> None:
        """How a call or stream has ended."""
        if details == _GIVEN_UP:
            code = grpc.StatusCode.CANCELLED
        self.statuses[code.name] += 1
        if code not in allowed:
            self.defect(f"ended with {code.name}: {details}")

    def read(self, response: Any) -> None:
        """Looks through everything that a response says."""
        match response:
            case target_pb2.VerifyResponse():
                self._verdicts(response)
            case draft_pb2.ProposeResponse():
                self._proposals(response)
            case orchestrator_pb2.GenerateResponse():
                self.answers["chunk"] += 1
            case _:
                self.answers[type(response).__name__] += 1

    def _verdicts(self, response: target_pb2.VerifyResponse) -> None:
        for error in response.errors:
            self._error(target_pb2.RowError.Reason.Name(error.reason), error.detail)
        for result in response.results:
            self.answers["result"] += 1
            if not len(unpack(result.sample_ids, UINT32, "sample_ids")):
                self.defect("a result without samples")
            for name in ("support_probs", "tail_mass"):
                values = unpack(getattr(result, name), FLOAT32, name)
                if not ((values >= -_SLACK) & (values <= 1 + _SLACK)).all():
                    self.defect(f"{name} are no probabilities: {values.tolist()}")
            for name in ("tail_logprobs", "support_logprobs", "sample_logprobs", "top_logprobs"):
                values = unpack(getattr(result, name), FLOAT32, name)
                if np.isnan(values).any() or (values > _SLACK).any():
                    self.defect(f"{name} are no log-probabilities: {values.tolist()}")

    def _proposals(self, response: draft_pb2.ProposeResponse) -> None:
        for error in response.errors:
            self._error(draft_pb2.DraftLost.Reason.Name(error.reason), error.detail)
        for proposal in response.proposals:
            self.answers["proposal"] += 1
            num_tokens = len(unpack(proposal.token_ids, UINT32, "token_ids"))
            support_sizes = unpack(proposal.support_sizes, UINT16, "support_sizes")
            weights = unpack(proposal.support_probs, FLOAT32, "support_probs")
            if not num_tokens or len(support_sizes) not in (0, num_tokens):
                self.defect(f"a proposal of {num_tokens} tokens, {len(support_sizes)} supports")
            if not (np.isfinite(weights) & (weights > 0)).all():
                self.defect(f"support_probs are no probabilities: {weights.tolist()}")
            if len(weights) != support_sizes.astype(np.int64).sum():
                self.defect("support_probs do not fit support_sizes")

    def _error(self, reason: str, detail: str) -> None:
        self.answers[reason.removeprefix("REASON_")] += 1
        if reason in ("REASON_INTERNAL", "REASON_UNSPECIFIED"):
            self.defect(f"{reason}: {detail}")
