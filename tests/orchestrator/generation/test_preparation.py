"""Preparation of a turn: bad words as tokens, and answers whose last write is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from orchestrator.generation.preparation import Preparation
from outrider.errors import InvalidRequest
from outrider.sampling.params import SamplingParams
from outrider.tokenizer import Tokenizer
from tests import vocabularies
from tests.orchestrator.generation.test_conversation import _record, _request
from tests.orchestrator.generation.test_validation import LIMITS

WORDS = ("hello", " hello", "Hello, world", "é你", "a", "the cat")
ASK = {"role": "user", "content": "the fox"}


def banned_by_vllm(tokenizer: Any, words: tuple[str, ...]) -> list[list[int]]:
    """`SamplingParams.update_from_tokenizer` of vLLM."""
    found: list[list[int]] = []
    for word in words:
        for prefix in ("", " "):
            ids = tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)
            if not prefix or (ids[0] != found[-1][0] and len(ids) == len(found[-1])):
                found.append(ids)
    return found


@pytest.mark.parametrize("name", ["sentencepiece", "byte_fallback", "word_piece"])
def test_bad_words_are_the_tokens_that_vllm_bans(name: str, tmp_path: Path) -> None:
    """With a real vocabulary, and with others; where a space changes the first token."""
    if name == "sentencepiece":
        AutoTokenizer.from_pretrained(
            vocabularies.write_sentencepiece(tmp_path / "source")
        ).save_pretrained(tmp_path / "model")
    else:
        vocabularies.save(getattr(vocabularies, name)(), tmp_path / "model")
    directory = str(tmp_path / "model")
    tokenizer = Tokenizer.load(directory)
    assert tokenizer is not None
    words = ("the", "cats") if name == "word_piece" else WORDS
    params = SamplingParams(bad_words=words, bad_words_token_ids=((1, 2),), max_tokens=4)
    request = replace(_request(token_ids=(1,)), params=params)
    limits = replace(LIMITS, vocab_size=tokenizer.vocab_size)
    prepared = Preparation(request, _record([]), limits, tokenizer).run().request.params
    expected = banned_by_vllm(AutoTokenizer.from_pretrained(directory), words)
    assert prepared.bad_words == ()
    assert [list(ids) for ids in prepared.bad_words_token_ids] == [[1, 2], *expected]


def test_a_bad_word_without_tokens_is_refused(tokenizer: Tokenizer) -> None:
    request = replace(_request(token_ids=(1,)), params=SamplingParams(bad_words=(" ",)))
    with pytest.raises(InvalidRequest) as refused:
        Preparation(request, _record([]), LIMITS, tokenizer).run()
    assert refused.value.field == "sampling.bad_words"


@pytest.mark.parametrize("includes", [False, True])
def test_an_answer_of_a_chat_is_without_the_stop_that_its_client_saw(
    includes: bool, tokenizer: Tokenizer
) -> None:
    """The template writes the end of a message itself."""
    params = SamplingParams(max_tokens=9, stop=("k",), include_stop_str_in_output=includes)
    request = replace(_request(messages=(ASK,)), params=params)
    first = Preparation(request, _record([]), LIMITS, tokenizer).run()
    output = tokenizer.encode("quick", add_special_tokens=False)
    record = replace(
        _record([*first.turn.token_ids, *output], [ASK]), turn_json=first.turn_json, turn_epoch=1
    )
    turn = Preparation(request, record, LIMITS, tokenizer).run().turn
    assert turn.messages == (ASK, {"role": "assistant", "content": "quic"}, ASK)
