"""Search for stop strings: agrees with a plain search; costs nothing before a match begins."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.generation.conversation import Turn
from orchestrator.generation.resume import turn_json
from orchestrator.generation.stop_strings import StopString
from outrider.sampling.params import (
    MAX_ALLOWED_TOKENS,
    MAX_STOP_TEXT_CHARS,
    MAX_STOP_TEXTS,
    SamplingParams,
)
from tests.orchestrator.generation.test_resume_versions import REQUEST


@given(stop=st.text("ab", min_size=1, max_size=12), text=st.text("ab", max_size=60))
@example(stop="aabaaab", text="aabaabaaabaabaaab")
@settings(deadline=None, max_examples=300)
def test_stop_string_is_found_where_the_text_ends_with_it(stop: str, text: str) -> None:
    search = StopString(stop, stop)
    for end in range(1, len(text) + 1):
        so_far = text[:end]
        assert search.feed(text[end - 1]) == so_far.endswith(stop)
        longest = max(n for n in range(len(stop)) if so_far.endswith(stop[:n]))
        assert search.num_partial_chars == longest


class Calls:
    """Counts the calls of Python and C functions in this thread."""

    def __init__(self) -> None:
        self.num = 0

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        self.num += event in ("call", "c_call")

    def __enter__(self) -> Calls:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)


def test_longest_stop_strings_cost_nothing_before_a_match_begins() -> None:
    texts = [("ab" * MAX_STOP_TEXT_CHARS)[:MAX_STOP_TEXT_CHARS]] * MAX_STOP_TEXTS
    with Calls() as calls:
        searches = [StopString(text, text) for text in texts]
        for search in searches:
            search.feed("x")
    assert calls.num < 20 * MAX_STOP_TEXTS


def test_longest_lists_are_stored_without_a_function_call_per_entry() -> None:
    params = SamplingParams(max_tokens=8, allowed_token_ids=tuple(range(MAX_ALLOWED_TOKENS)))
    with Calls() as calls:
        recorded = turn_json(replace(REQUEST, params=params), Turn([1], 0, ()))
    assert len(recorded) > MAX_ALLOWED_TOKENS
    assert calls.num < 1_000
