"""Incremental detokenizer compared with `decode` of the tokenizers, on real vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from outrider.tokenizer import Tokenizer
from tests import vocabularies

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.text(st.sampled_from("ab xyzthecats.'\n\t é你龘€🇫🇷") | st.characters(codec="utf-8"))


def load(backend: tokenizers.Tokenizer, directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(str(vocabularies.save(backend, directory)))
    assert tokenizer is not None
    return tokenizer


def converted(directory: Path) -> Tokenizer:
    """The tokenizer as converted by transformers."""
    fast = directory / "fast"
    AutoTokenizer.from_pretrained(directory).save_pretrained(fast)
    tokenizer = Tokenizer.load(str(fast))
    assert tokenizer is not None
    return tokenizer


MAKERS = {
    "sentencepiece": lambda path: converted(vocabularies.write_sentencepiece(path)),
    "tekken": lambda path: load(vocabularies.tekken(), path),
    "byte_fallback": lambda path: load(vocabularies.byte_fallback(), path),
    "metaspace": lambda path: load(vocabularies.metaspace(), path),
    "word_piece": lambda path: load(vocabularies.word_piece(), path),
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(vocabularies.byte_fallback(), tmp_path_factory.mktemp("fallback"))


def chunks_of(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [*(detokenizer.push(token_id) for token_id in output), detokenizer.finish()]


def test_text_is_the_whole_minus_the_prompt(tokenizer: Tokenizer) -> None:
    """For any text, split between any two tokens."""

    @settings(max_examples=300, deadline=None)
    @given(text=TEXTS, share=st.floats(0, 1))
    def check(text: str, share: float) -> None:
        token_ids = tokenizer.encode(text)
        num_prompt = round(share * len(token_ids))
        prompt, output = token_ids[:num_prompt], token_ids[num_prompt:]
        whole = tokenizer.decode(token_ids)
        # A character that ends in the output belongs to the output.
        while (before := tokenizer.decode(prompt)).endswith(INCOMPLETE) and INCOMPLETE not in text:
            prompt = prompt[:-1]
        if INCOMPLETE not in whole and whole.startswith(before):
            chunks = chunks_of(tokenizer, token_ids[:num_prompt], output)
            assert "".join(chunks) == whole[len(before) :]

    check()


def test_any_tokens_stream_as_they_decode(tokenizer: Tokenizer) -> None:
    """Random ids, special and unknown ones included."""

    @settings(max_examples=200, deadline=None)
    @given(token_ids=st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    def check(token_ids: list[int]) -> None:
        whole = tokenizer.decode(token_ids)
        if INCOMPLETE not in whole:
            assert "".join(chunks_of(tokenizer, [], token_ids)) == whole

    check()


def byte_ids(text: str | bytes) -> list[int]:
    """Byte tokens of the byte-fallback vocabulary."""
    return [1 + byte for byte in (text.encode() if isinstance(text, str) else text)]


def test_an_output_after_a_prompt_of_emoji(fallback: Tokenizer) -> None:
    """Each character is emitted with its last byte."""
    prompt = fallback.encode("ab 🇫🇷")
    flag = byte_ids("🇫🇷")
    chunks = chunks_of(fallback, prompt, [*flag, *fallback.encode("x")])
    assert chunks == ["", "", "", "🇫", "", "", "", "🇷", "x", ""]


def test_a_character_that_starts_in_the_prompt_is_completed(fallback: Tokenizer) -> None:
    prompt = [*fallback.encode("A"), *byte_ids(b"\xe9\xbe")]
    output = [*byte_ids(b"\x98"), *fallback.encode("B"), *fallback.encode("C")]
    assert chunks_of(fallback, prompt, output) == ["龘", "B", "C", ""]


def test_an_incomplete_character_is_one_replacement_character(fallback: Tokenizer) -> None:
    output = [*byte_ids("😀"), *byte_ids("😀")[:2]]
    assert "".join(chunks_of(fallback, [], output)) == "😀" + INCOMPLETE


@pytest.mark.parametrize("bad", [b"\x80", b"\xff"])
def test_invalid_bytes_are_emitted_at_once(fallback: Tokenizer, bad: bytes) -> None:
    assert chunks_of(fallback, [], byte_ids(bad) * 3) == [INCOMPLETE] * 3 + [""]


def test_a_leading_space_is_stripped_once(tmp_path: Path) -> None:
    """At the start of the text, not of the output."""
    sentencepiece = converted(vocabularies.write_sentencepiece(tmp_path / "model"))
    hello = sentencepiece.encode("hello", add_special_tokens=False)
    bos = sentencepiece.encode("")
    assert "".join(chunks_of(sentencepiece, bos, hello)) == "hello"
    assert "".join(chunks_of(sentencepiece, [*bos, *hello], hello)) == " hello"


class CountingTokenizer(Tokenizer):
    """Counts the tokens passed to `decode`."""

    num_decoded = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


def test_special_tokens_that_are_kept_are_text(tokenizer: Tokenizer) -> None:
    """Anywhere in the output; as `decode` of the whole has them."""
    special = list(tokenizer.special_ids.values())[:3]

    @settings(max_examples=100, deadline=None)
    @given(parts=st.lists(st.text("ab é你'", max_size=4), min_size=2, max_size=5), data=st.data())
    def check(parts: list[str], data: st.DataObject) -> None:
        prompt = tokenizer.encode(parts[0]) or special[:1]
        output: list[int] = []
        for part in parts[1:]:
            output += [*tokenizer.encode(part), data.draw(st.sampled_from(special))]
        detokenizer = tokenizer.detokenizer(prompt, skip_special_tokens=False)
        text = "".join(map(detokenizer.push, output)) + detokenizer.finish()
        before, whole = (
            tokenizer.decode(ids, skip_special_tokens=False) for ids in (prompt, prompt + output)
        )
        assert text == whole[len(before) :]

    check()


@pytest.mark.parametrize("name", ["byte_fallback", "word_piece"])
@pytest.mark.parametrize("kind", ["special", "unknown", "bad byte", "ordinary"])
def test_cost_of_a_token_does_not_grow(name: str, kind: str, tmp_path: Path) -> None:
    """Cost in decoded tokens, not in seconds."""
    backend = getattr(vocabularies, name)()
    tokenizer = CountingTokenizer(backend, {})
    special = next(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
    token_id = {
        "special": special, "unknown": 10**6, "bad byte": 0x81, "ordinary": 5
    }[kind]  # fmt: skip
    detokenizer = tokenizer.detokenizer([5, 6] * 50)
    before = tokenizer.num_decoded
    for _ in range(5_000):
        detokenizer.push(token_id)
    assert tokenizer.num_decoded - before <= 5_000 * 15
