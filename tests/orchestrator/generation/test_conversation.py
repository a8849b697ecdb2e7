"""The prompt of a turn. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer

from orchestrator.generation.conversation import PromptTooLong, build_turn, num_chars
from orchestrator.generation.request import GenerationRequest
from orchestrator.sessions import Counters, SessionRecord
from outrider.errors import InvalidRequest
from outrider.sampling.params import SamplingParams, Verification
from outrider.tokenizer import Tokenizer
from tests import vocabularies

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


def _request(**given: Any) -> GenerationRequest:
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


@given(committed=st.lists(st.integers(0, 255)), added=st.lists(st.integers(0, 255), min_size=1))
def test_new_input_is_appended_to_the_session(
    committed: list[int], added: list[int], tokenizer: Tokenizer
) -> None:
    turn = build_turn(_request(token_ids=tuple(added)), _record(committed), None, CONTEXT_LEN)
    assert turn.token_ids == committed + added
    assert (turn.keep_len, turn.messages) == (len(committed), ())
    text = build_turn(_request(text="the fox"), _record(committed), tokenizer, CONTEXT_LEN)
    assert text.token_ids == committed + tokenizer.encode("the fox", add_special_tokens=False)


@given(
    contents=st.lists(st.text("abc xyz", max_size=9), min_size=1, max_size=5),
    cut=st.integers(0, 200),
    wrong=st.booleans(),
)
@settings(deadline=None)
def test_chat_is_rendered_whole_and_keeps_the_common_prefix(
    contents: list[str], cut: int, wrong: bool, tokenizer: Tokenizer
) -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    whole = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
    committed = [*whole[:cut], *([299] if wrong else [])]
    before = (
        messages[:-1] if committed and len(messages) > 1 else [{"role": "user", "content": "x"}]
    )
    turn = build_turn(
        _request(messages=tuple(messages[len(before) :] or messages[-1:])),
        _record(committed, before if committed else ()),
        tokenizer,
        CONTEXT_LEN,
    )
    assert turn.token_ids == tokenizer.encode(
        tokenizer.render_chat(turn.messages), add_special_tokens=False
    )
    assert turn.token_ids[: turn.keep_len] == committed[: turn.keep_len]
    if turn.keep_len < min(len(committed), len(turn.token_ids)):
        assert turn.token_ids[turn.keep_len] != committed[turn.keep_len], (
            "the longest common prefix"
        )


@pytest.mark.parametrize("content", ["two", [{"type": "text", "text": "two"}]])
def test_a_continued_message_is_the_start_of_the_answer(content: Any, tokenizer: Tokenizer) -> None:
    """It is not among the turn's messages, so that the session gets one message of both parts."""
    ask, last = {"role": "user", "content": "count"}, {"role": "assistant", "content": content}
    request = replace(_request(messages=(ask, last)), continue_final_message=True)
    turn = build_turn(request, _record([]), tokenizer, CONTEXT_LEN)
    assert tokenizer.decode(turn.token_ids) == "[user]count\n[assistant]two"
    assert (turn.messages, turn.is_chat) == ((ask,), True)
    assert turn.answer(" three") == {"role": "assistant", "content": "two three"}
    alone = replace(_request(messages=(last,)), continue_final_message=True)
    turn = build_turn(alone, _record([]), tokenizer, CONTEXT_LEN)
    assert (turn.messages, turn.is_chat) == ((), True)
    without_prompt = replace(_request(messages=(ask,)), add_generation_prompt=False)
    turn = build_turn(without_prompt, _record([]), tokenizer, CONTEXT_LEN)
    assert tokenizer.decode(turn.token_ids) == "[user]count\n"
    assert turn.answer("x") == {"role": "assistant", "content": "x"}


def test_size_of_a_chat_has_its_tools() -> None:
    """Texts count whole, other values as one; of very long tools not all are counted."""
    request = _request(messages=({"role": "user", "content": "abc"},))
    assert num_chars(request, _record([])) == 3 + 3
    tool = {"type": "function", "function": {"name": "f" * 50, "parameters": {"a": [1, None]}}}
    size = num_chars(replace(request, tools=(tool,)), _record([]))
    assert size == 3 + 9 + len("typefunctionfunctionname" + "f" * 50 + "parametersa")
    long = replace(request, tools=(tool,) * 100_000)
    assert 65_536 <= num_chars(long, _record([])) < 70_000


def test_input_of_another_kind_than_the_sessions_is_refused(tokenizer: Tokenizer) -> None:
    hello = [{"role": "user", "content": "hello"}]
    for request, record in (
        (_request(messages=tuple(hello)), _record([1, 2])),
        (_request(text="hello"), _record([1, 2], hello)),
        (_request(token_ids=(1,)), _record([1, 2], hello)),
    ):
        with pytest.raises(InvalidRequest) as caught:
            build_turn(request, record, tokenizer, CONTEXT_LEN)
        assert caught.value.field == "session_id"


def test_prompt_far_too_long_is_refused_after_a_prefix_is_encoded(tokenizer: Tokenizer) -> None:
    """The error has the number of encoded tokens, which are charged to the API key."""
    with pytest.raises(PromptTooLong, match="text: more than 1000 tokens") as caught:
        build_turn(_request(text="fox " * 100_000), _record([]), tokenizer, CONTEXT_LEN)
    assert 1_000 < caught.value.num_tokens < 20_000


@pytest.mark.parametrize("num", [1, 2, 5, 40])
@pytest.mark.parametrize("adds", [None, False, True])
def test_text_is_truncated_as_transformers_does(
    num: int, adds: bool | None, tmp_path: Path
) -> None:
    """Its start is dropped, not the special tokens that are added."""
    backend = vocabularies.byte_fallback()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    vocabularies.save(backend, tmp_path, truncation_side="left", bos_token="<s>")
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer is not None
    reference = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("abc", "a b c ab abc", "é" * 50):
        request = replace(_request(text=text), add_special_tokens=adds, truncate_prompt_tokens=num)
        turn = build_turn(request, _record([]), tokenizer, CONTEXT_LEN)
        adds_special = adds is not False
        assert turn.token_ids == reference.encode(
            text, add_special_tokens=adds_special, truncation=True, max_length=num
        )
        later = build_turn(request, _record([7, 8]), tokenizer, CONTEXT_LEN)
        whole = [7, 8, *reference.encode(text, add_special_tokens=bool(adds))]
        if not adds:
            assert later.token_ids == whole[-num:]
            assert later.keep_len == (2 if len(whole) <= num else 0)


def test_truncation_of_token_ids_and_of_chats(tokenizer: Tokenizer) -> None:
    """The last tokens of the whole context; -1: as many as leave room for the output."""
    ids = tuple(range(100, 200))
    request = replace(_request(token_ids=ids), truncate_prompt_tokens=3)
    assert build_turn(request, _record([]), None, CONTEXT_LEN).token_ids == [197, 198, 199]
    request = replace(request, truncate_prompt_tokens=-1, max_tokens=20)
    assert build_turn(request, _record([1] * 80), None, 110).token_ids == list(ids[-90:])
    request = replace(request, max_tokens=None, params=SamplingParams(min_tokens=5, max_tokens=9))
    assert build_turn(request, _record([]), None, 15).token_ids == list(ids[-10:])
    chat = replace(_request(messages=({"role": "user", "content": "the fox"},)))
    whole = build_turn(chat, _record([]), tokenizer, CONTEXT_LEN)
    turn = build_turn(replace(chat, truncate_prompt_tokens=4), _record([]), tokenizer, CONTEXT_LEN)
    assert (turn.token_ids, turn.messages) == (whole.token_ids[-4:], whole.messages)


def test_of_a_text_far_too_long_only_the_end_is_encoded(tokenizer: Tokenizer) -> None:
    """And its tokens are those of the whole text."""
    text = "the quick fox, " * 40_000
    request = replace(_request(text=text), truncate_prompt_tokens=700)
    turn = build_turn(request, _record([]), tokenizer, CONTEXT_LEN)
    assert turn.token_ids == tokenizer.encode(text)[-700:]


def test_long_text_of_few_tokens_is_encoded_whole(tmp_path: Path) -> None:
    """A prefix that may fit does not decide."""
    backend = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "x" * 64: 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    long_words = Tokenizer(backend, {})
    turn = build_turn(_request(text=f"{'x' * 64} " * 900), _record([]), long_words, CONTEXT_LEN)
    assert turn.token_ids == [1] * 900
