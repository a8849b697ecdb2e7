"""Comparison of vocabularies id by id."""

from __future__ import annotations

import pytest

from outrider.errors import InvalidRequest
from outrider.tokenizer import Tokenizer
from outrider.vocabulary import Difference, Vocabulary
from tests.vocabularies import byte_fallback, tekken

ORDINARY = {f"token {i}": i for i in range(500)}
ADDED = {"<s>": 500, "</s>": 501}


def difference(ours: dict[str, int], theirs: dict[str, int], *added: str) -> Difference:
    marked = {*ADDED, *added}
    return Vocabulary.of(ours, marked).difference(Vocabulary.of(theirs, marked))


@pytest.mark.parametrize(
    ("theirs", "num_ids", "num_renamed", "is_related"),
    [
        (ORDINARY | ADDED, 0, 0, True),
        (ORDINARY | ADDED | {"<think>": 502}, 1, 0, True),
        (ORDINARY | ADDED | {"<think>": 900}, 1, 0, True),
        (ORDINARY, 2, 0, True),
        (ORDINARY | {"<s>": 500, "<|im_end|>": 501}, 1, 1, True),
        (ORDINARY | ADDED | {f"<unused{i}>": 600 + i for i in range(300)}, 300, 0, True),
        ({token: 499 - i for token, i in ORDINARY.items()} | ADDED, 500, 500, False),
        ({token: i for token, i in ORDINARY.items() if i < 450} | ADDED, 50, 0, False),
        ({token: i for token, i in ORDINARY.items() if i < 496} | ADDED, 4, 0, True),
        ({}, 502, 0, False),
    ],
)  # fmt: skip
def test_different_ids_are_counted(
    theirs: dict[str, int], num_ids: int, num_renamed: int, is_related: bool
) -> None:
    added = [token for token in theirs if token.startswith("<")]
    for found in (
        difference(ORDINARY | ADDED, theirs, *added),
        difference(theirs, ORDINARY | ADDED, *added),
    ):
        assert (found.num_ids, found.num_renamed) == (num_ids, num_renamed)
        assert found.is_related is is_related


def test_an_added_and_an_ordinary_token_with_the_same_text_are_equal() -> None:
    ours = Vocabulary.of(ORDINARY | ADDED, [])
    assert ours.difference(Vocabulary.of(ORDINARY | ADDED, ADDED)).num_ids == 0


def test_real_vocabularies_survive_serialization() -> None:
    large = Tokenizer(tekken(), {}).vocabulary
    small = Tokenizer(byte_fallback(), {}).vocabulary
    sent = large.to_bytes()
    assert len(sent) == 4 * 131_072
    assert large.difference(Vocabulary.from_bytes(sent)).num_ids == 0
    assert not large.difference(small).is_related
    with pytest.raises(InvalidRequest, match="token_hashes"):
        Vocabulary.from_bytes(sent[:-1])
