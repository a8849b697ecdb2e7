"""What a turn's prompt is made of. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from orchestrator.conversation import build_turn
from orchestrator.request import GenerationRequest
from orchestrator.store import Counters, SessionRecord
from outrider.errors import InvalidRequest
from outrider.sampling.params import SamplingParams, Verification
from outrider.tokenizer import Tokenizer
from tests.services.tokenizer_files import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    tokenizer = Tokenizer.load(str(directory))
    assert tokenizer is not None
    return tokenizer


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
    turn = build_turn(_asked(token_ids=tuple(added)), _record(held), None)
    assert turn.token_ids == held + added
    assert (turn.keep_len, turn.messages) == (len(held), ())
    text = build_turn(_asked(text="the fox"), _record(held), tokenizer)
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
    whole = tokenizer.render_chat(messages)
    held = [*whole[:cut], *([299] if wrong else [])]
    before = messages[:-1] if held and len(messages) > 1 else [{"role": "user", "content": "x"}]
    turn = build_turn(
        _asked(messages=tuple(messages[len(before) :] or messages[-1:])),
        _record(held, before if held else ()),
        tokenizer,
    )
    assert turn.token_ids == tokenizer.render_chat(turn.messages)
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
            build_turn(asked, record, tokenizer)
        assert caught.value.field == "session_id"
