"""Masks of structured outputs, computed beside the forward pass on a thread of their own.

The device thread starts a batch before a pass and takes the result after it. llguidance releases
the GIL while it computes, in parallel over the generations.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from llguidance import LLExecutor, LLMatcher

from outrider.engine.interface import Ids
from outrider.errors import InvalidRequest
from outrider.grammar import GrammarState, error_of

_MAX_THREADS = 8
_WORD_BYTES = 4
# llguidance's error where the grammar goes on but no token does. Its mask then allows EOS.
_DEAD_END = "NoExtension"
_NO_TOKEN = "no token of the model continues this output"


@dataclass(frozen=True)
class MaskRequest:
    """Masks of the positions after output_ids[:num_committed], one for each of `num_rows`.

    Row i is after i tokens more of `output_ids`, which are draft tokens.
    """

    state: GrammarState
    output_ids: Ids
    num_committed: int
    num_rows: int


@dataclass(frozen=True)
class Masks:
    """`forbidden`, bool [num_rows, 32 * num_words]: tokens that the format does not allow.

    Rows after a draft token that is not allowed, and after EOS, forbid none: nothing of them is
    used. `num_live`: rows before the first one that allows no token, or whose mask was too
    complex to compute; `why` is the reason if there is one.
    """

    forbidden: Ids
    num_live: int
    why: str


class MaskThread:
    """Computes masks. `start` is called by the device thread only; one batch at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def start(self, requests: Sequence[MaskRequest]) -> Future[list[Masks | InvalidRequest]]:
        """Starts a batch. A request's result is an error if its committed output is not allowed."""
        return self._pool.submit(self._compute, requests)

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(max(1, min(_MAX_THREADS, (os.cpu_count() or 1) - 1)))

    def _compute(self, requests: Sequence[MaskRequest]) -> list[Masks | InvalidRequest]:
        results: dict[int, Masks | InvalidRequest] = {}
        waiting = list(range(len(requests)))
        while waiting:  # a state is at one position at a time
            batch = list({id(requests[i].state): i for i in reversed(waiting)}.values())
            found = self._at_once([requests[i] for i in batch])
            results.update(zip(batch, found, strict=True))
            waiting = [i for i in waiting if i not in results]
        return [results[i] for i in range(len(requests))]

    def _at_once(self, requests: Sequence[MaskRequest]) -> list[Masks | InvalidRequest]:
        """Results of requests with different states, of the same tokenizer."""
        num_words = requests[0].state.grammar.num_words
        ends = list(itertools.accumulate(request.num_rows for request in requests))
        allowed = np.full((ends[-1], num_words), -1, np.int32)
        work: list[tuple[LLMatcher, int, list[int]]] = []
        is_valid: list[bool] = []
        for request, end in zip(requests, ends, strict=True):
            num, first = request.num_committed, end - request.num_rows
            is_valid.append(request.state.seek(request.output_ids[:num]) == num)
            if is_valid[-1]:
                drafts = request.output_ids[num:][: request.num_rows - 1].tolist()
                work.append((request.state.matcher, first, drafts))
        target = (allowed.ctypes.data, num_words * _WORD_BYTES, len(allowed))
        if drafted := [job for job in work if job[2]]:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *target)
        if plain := [job[:2] for job in work if not job[2]]:
            self._executor.unsafe_compute_mask_ptr(plain, *target)
        bits = np.unpackbits(~allowed.view(np.uint8), axis=1, bitorder="little").view(np.bool_)
        return [
            _result(request, bits[end - request.num_rows : end]) if valid else _refusal(request)
            for request, end, valid in zip(requests, ends, is_valid, strict=True)
        ]


def _result(request: MaskRequest, forbidden: Ids) -> Masks:
    state = request.state
    if state.matcher.is_error():
        why, num_live = error_of(state.matcher), _num_computable(request)
        is_dead_end = why.startswith(_DEAD_END)
        return Masks(forbidden, num_live, _NO_TOKEN if is_dead_end else f"is too complex: {why}")
    dead = np.flatnonzero(forbidden.all(axis=1))
    return Masks(forbidden, int(dead[0]) if len(dead) else request.num_rows, _NO_TOKEN)


def _num_computable(request: MaskRequest) -> int:
    """Rows before the one whose mask is too complex, computed one by one."""
    state = request.state
    for row in range(request.num_rows):
        state.reset()
        state.seek(request.output_ids[: request.num_committed + row])
        state.matcher.compute_bitmask()
        if state.matcher.is_error():
            state.reset()
            return row
    return request.num_rows


def _refusal(request: MaskRequest) -> InvalidRequest:
    return InvalidRequest(
        request.state.grammar.field, "the output so far is not one that the format allows"
    )
