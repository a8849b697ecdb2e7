"""Parses and checks the proposals of a draft replica (draft.proto)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestrator.speculation.verification import Proposal
from outrider.errors import InvalidRequest
from outrider.runtime.protobuf import UINT32, unpack, unpack_supports
from outrider.sampling.support import Support
from outrider.v1 import draft_pb2


def proposal_from_proto(
    message: draft_pb2.Proposal,
    context_len: int,
    max_gamma: int,
    vocab_size: int,
    has_supports: bool,
) -> Proposal:
    """`context_len`: committed tokens. `has_supports`: for rejection and block verification.

    Raises InvalidRequest if the message contradicts itself or the request.
    """
    assumed = tuple(unpack(message.assumed_token_ids, UINT32, "assumed_token_ids").tolist())
    if not 0 < message.base_len - len(assumed) <= context_len:
        raise InvalidRequest(
            "base_len",
            f"{message.base_len} minus {len(assumed)} assumed tokens is not in [1, {context_len}]",
        )
    token_ids = tuple(unpack(message.token_ids, UINT32, "token_ids").tolist())
    if not 1 <= len(token_ids) <= max_gamma:
        raise InvalidRequest("token_ids", f"{len(token_ids)} tokens; allowed are 1 to {max_gamma}")
    if max(token_ids) >= vocab_size:
        raise InvalidRequest("token_ids", f"{max(token_ids)} is not in [0, {vocab_size})")
    if has_supports != bool(message.support_sizes):
        raise InvalidRequest(
            "support_sizes", "required for rejection and block verification, otherwise empty"
        )
    supports = None
    if has_supports:
        supports = unpack_supports(
            message.support_sizes, message.support_ids, message.support_probs
        )
        _check_supports(supports, token_ids, vocab_size)
    return Proposal(message.base_len, token_ids, supports, assumed)


def _check_supports(supports: Sequence[Support], token_ids: Sequence[int], vocab_size: int) -> None:
    if len(supports) != len(token_ids):
        raise InvalidRequest("support_sizes", f"{len(supports)} for {len(token_ids)} draft tokens")
    for token_id, support in zip(token_ids, supports, strict=True):
        if support.index_of(token_id) < 0:
            raise InvalidRequest("support_ids", f"draft token {token_id} is not in its support")
        if support.token_ids.max() >= vocab_size:
            raise InvalidRequest("support_ids", f"must be in [0, {vocab_size})")
        if len(np.unique(support.token_ids)) != len(support.token_ids):
            raise InvalidRequest("support_ids", "a token is twice in one support")
