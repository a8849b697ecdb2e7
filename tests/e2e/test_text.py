"""Streamed text is the text of all tokens, cut at stop strings, never through a character."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.generation.stop_strings import OutputText
from outrider.tokenizer import Tokenizer
from tests.e2e.byte_tokenizer import EOS, LONGER, certain_text_of, load_byte_tokenizer, text_of

_NUM_EXAMPLES = 400
_C_AND_A_HALF = 256 + LONGER.index(b"c\xe4")

# Bytes of a, b, c, space, of 你 and é, one that is never valid, all longer tokens, and EOS.
_token_ids = st.sampled_from([*b"abc th", *"你é".encode(), 0xFF, *range(256, EOS + 1)])
_outputs = st.lists(_token_ids, max_size=30)
_characters = st.sampled_from("abc th你é")
_stops = st.lists(st.text(_characters, min_size=1, max_size=4), max_size=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@settings(max_examples=_NUM_EXAMPLES, deadline=None)
@given(prompt=_outputs, output=_outputs)
def test_chunks_are_the_text(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> None:
    """The prompt ends with a whole character; what follows may be any bytes."""
    stream = OutputText(tokenizer, [*prompt, ord("a")], [])
    chunks = []
    for token_id in output:
        assert stream.push(token_id) is None
        chunks.append(stream.take())
    stream.finish()
    chunks.append(stream.take())
    assert "".join(chunks) == text_of(output)


@settings(max_examples=_NUM_EXAMPLES, deadline=None)
@given(output=_outputs)
def test_what_is_certain_is_shown_at_once(tokenizer: Tokenizer, output: list[int]) -> None:
    """Without stop strings only the bytes of an unfinished character are held back."""
    stream = OutputText(tokenizer, [ord("a")], [])
    shown = ""
    for i, token_id in enumerate(output):
        stream.push(token_id)
        shown += stream.take()
        assert shown == certain_text_of(output[: i + 1])


@settings(max_examples=_NUM_EXAMPLES, deadline=None)
@given(output=_outputs, stops=_stops)
# A token that completes a stop string and begins a character.
@example(output=[ord("b"), _C_AND_A_HALF], stops=["bc"])
def test_stop_strings_end_the_text_where_they_first_stand(
    tokenizer: Tokenizer, output: list[int], stops: list[str]
) -> None:
    """The token that completes a stop string ends the output; no shown text has part of one."""
    stream = OutputText(tokenizer, [ord("a")], stops)
    shown, stopped = "", None
    for i, token_id in enumerate(output):
        stopped = stream.push(token_id)
        shown += stream.take()
        text = certain_text_of(output[: i + 1])
        if any(stop in text for stop in stops):
            assert stopped in stops, f"{stops} not found in {text!r}"
            ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
            assert text.index(stopped) + len(stopped) == min(ends)
            assert shown == text[: text.index(stopped)]
            assert not any(stop in shown for stop in stops)
            return
        assert stopped is None
        assert text.startswith(shown)
        held = len(text) - len(shown)
        begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        assert held >= max(begun, default=0), "part of a stop string is shown"
    stream.finish()
    assert shown + stream.take() == text_of(output)
