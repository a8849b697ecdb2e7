"""What a turn's prompt is made of. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from tokenizers import models, pre_tokenizers

from orchestrator.generation.conversation import PromptTooLong, build_turn
from orchestrator.generation.request import GenerationRequest
from orchestrator.sessions import Counters, SessionRecord
from outrider.errors import InvalidRequest
from outrider.sampling.params import SamplingParams, Verification
from outrider.tokenizer import Tokenizer

CONTEXT_LEN = 1_000


def _record(token_ids: Sequence[int], messages: Sequence[dict[str, str]] = ()) -> SessionRecord:
    return SessionRecord(
        session_id="s",
        epoch=1,
        in_use=False,
        token_ids=np.array(token_ids, np.uint32),
        num_turns=1,
        counters=Counters(),
        target_kv=None,
        draft_kv=None,
        messages=tuple(messages),
        model="m",
        expires_in_s=1.0,
    )


def _asked(**given: Any) -> GenerationRequest:
    fields: dict[str, Any] = {"text": None, "token_ids": None, "messages": None, **given}
    return GenerationRequest(
        params=SamplingParams(),
        max_tokens=None,
        verification=Verification.REJECTION,
        gamma=4,
        max_gamma=16,
        lookahead=1,
        fan_out=4,
        session_id="s",
        create_session=True,
        **fields,
    )


@given(held=st.lists(st.integers(0, 255)), added=st.lists(st.integers(0, 255), min_size=1))
def test_turns_append(held: list[int], added: list[int], tokenizer: Tokenizer) -> None:
    turn = build_turn(_asked(token_ids=tuple(added)), _record(held), None, CONTEXT_LEN)
    assert turn.token_ids == held + added
    assert (turn.keep_len, turn.messages) == (len(held), ())
    text = build_turn(_asked(text="the fox"), _record(held), tokenizer, CONTEXT_LEN)
    assert text.token_ids == held + tokenizer.encode("the fox", add_special_tokens=False)


@given(
    said=st.lists(st.text("abc xyz", max_size=9), min_size=1, max_size=5),
    cut=st.integers(0, 200),
    wrong=st.booleans(),
)
@settings(deadline=None)
def test_chats_are_rendered_whole_and_keep_what_is_the_same(
    said: list[str], cut: int, wrong: bool, tokenizer: Tokenizer
) -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    whole = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
    held = [*whole[:cut], *([299] if wrong else [])]
    before = messages[:-1] if held and len(messages) > 1 else [{"role": "user", "content": "x"}]
    turn = build_turn(
        _asked(messages=tuple(messages[len(before) :] or messages[-1:])),
        _record(held, before if held else ()),
        tokenizer,
        CONTEXT_LEN,
    )
    assert turn.token_ids == tokenizer.encode(
        tokenizer.render_chat(turn.messages), add_special_tokens=False
    )
    assert turn.token_ids[: turn.keep_len] == held[: turn.keep_len]
    if turn.keep_len < min(len(held), len(turn.token_ids)):
        assert turn.token_ids[turn.keep_len] != held[turn.keep_len], "the longest common part"


def test_turns_that_do_not_fit_the_session_are_refused(tokenizer: Tokenizer) -> None:
    hello = [{"role": "user", "content": "hello"}]
    for asked, record in (
        (_asked(messages=tuple(hello)), _record([1, 2])),
        (_asked(text="hello"), _record([1, 2], hello)),
        (_asked(token_ids=(1,)), _record([1, 2], hello)),
    ):
        with pytest.raises(InvalidRequest) as caught:
            build_turn(asked, record, tokenizer, CONTEXT_LEN)
        assert caught.value.field == "session_id"


def test_a_prompt_far_too_long_is_refused_by_its_beginning(tokenizer: Tokenizer) -> None:
    """Not encoded to its end; what is encoded is told, to be charged for."""
    with pytest.raises(PromptTooLong, match="text: more than 1000 tokens") as caught:
        build_turn(_asked(text="fox " * 100_000), _record([]), tokenizer, CONTEXT_LEN)
    assert 1_000 < caught.value.num_tokens < 20_000


def test_a_long_text_of_few_tokens_is_encoded_whole(tmp_path: Path) -> None:
    """Where the beginning may fit, the whole is looked at."""
    backend = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "x" * 64: 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    long_words = Tokenizer(backend, {})
    turn = build_turn(_asked(text=f"{'x' * 64} " * 900), _record([]), long_words, CONTEXT_LEN)
    assert turn.token_ids == [1] * 900
