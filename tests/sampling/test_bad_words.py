"""Banned token sequences, compared with a search of the whole output."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from outrider.sampling.bad_words import BannedSequences

TOKENS = st.integers(0, 2)
OUTPUTS = st.lists(TOKENS, max_size=6)
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=4), max_size=4)


def contains(output: list[int], sequences: list[list[int]]) -> bool:
    """Whether the output ends with one of the sequences."""
    return any(output[-len(sequence) :] == sequence for sequence in sequences)


@given(
    sequences=SEQUENCES, prompt=st.lists(TOKENS, max_size=4), output=st.lists(TOKENS, max_size=6)
)
def test_a_token_is_banned_where_it_completes_a_sequence(
    sequences: list[list[int]], prompt: list[int], output: list[int]
) -> None:
    """In the output; the prompt's tokens do not count. Tokens after the position do not matter."""
    banned = BannedSequences(sequences, len(prompt))
    position, context = len(prompt) + len(output), [*prompt, *output]
    expected = {token for token in range(3) if contains([*output, token], sequences)}
    assert bool(banned) == bool(sequences)
    for ids in (context, np.array([*context, 0, 1], np.int64)):
        assert set(banned.at(position, ids)) == expected


@given(sequences=SEQUENCES, prompt=OUTPUTS, output=OUTPUTS, drafts=OUTPUTS)
def test_drafts_are_cut_before_the_first_banned_token(
    sequences: list[list[int]], prompt: list[int], output: list[int], drafts: list[int]
) -> None:
    kept = BannedSequences(sequences, len(prompt)).cut([*prompt, *output], drafts)
    assert list(kept) == drafts[: len(kept)]
    for end in range(len(kept)):
        assert not contains([*output, *drafts[: end + 1]], sequences)
    if len(kept) < len(drafts):
        assert contains([*output, *drafts[: len(kept) + 1]], sequences)
