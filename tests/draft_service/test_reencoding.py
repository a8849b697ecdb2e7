"""Re-encoding between real tokenizers: text, special tokens, and what cannot be re-encoded."""

from __future__ import annotations

from pathlib import Path

import pytest

from draft_service.reencoding import Reencoder, load_reencoders
from outrider.errors import ConfigError
from outrider.tokenizer import Tokenizer
from tests.services.tokenizer_files import write_tokenizer
from tests.vocabularies import byte_fallback, save, tekken, word_piece, write_sentencepiece

TEXT = "def f(x):\n    return  x + 1  # naïve 你好 🙂\n\nThe end — really.\n"
CORPUS = "the quick brown fox returns the end of a function, really: def return x"


def loaded(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(str(directory))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers_by_name(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Byte-level (trained here, and Mistral's Tekken), SentencePiece (Mistral's), Gemma-like."""
    root = tmp_path_factory.mktemp("tokenizers")
    (root / "trained").mkdir()
    write_tokenizer(root / "trained", corpus=CORPUS)
    return {
        "trained": loaded(root / "trained"),
        "tekken": loaded(save(tekken(), root / "tekken")),
        "sentencepiece": loaded(write_sentencepiece(root / "sentencepiece")),
        "byte_fallback": loaded(save(byte_fallback(), root / "byte_fallback")),
    }


PAIRS = [
    ("trained", "sentencepiece"),
    ("sentencepiece", "trained"),
    ("sentencepiece", "tekken"),
    ("tekken", "sentencepiece"),
    ("byte_fallback", "trained"),
    ("trained", "byte_fallback"),
]


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_a_context_has_the_drafts_own_tokens(
    target: str, draft: str, tokenizers_by_name: dict[str, Tokenizer]
) -> None:
    ours, theirs = tokenizers_by_name[target], tokenizers_by_name[draft]
    target_ids = ours.encode(TEXT)
    token_ids, rest = Reencoder(ours, theirs).draft_context(target_ids)
    assert token_ids == theirs.encode(ours.decode(target_ids))
    assert rest == b""


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_text_after_any_token_has_the_targets_own_tokens(
    target: str, draft: str, tokenizers_by_name: dict[str, Tokenizer]
) -> None:
    """Wherever a proposal begins between two characters: as the target's tokenizer has it."""
    ours, theirs = tokenizers_by_name[target], tokenizers_by_name[draft]
    reencoder = Reencoder(ours, theirs)
    target_ids = ours.encode(TEXT)
    num_compared = 0
    for start in range(2, len(target_ids)):
        before, after = target_ids[:start], target_ids[start:]
        text = reencoder.target_text(after)
        assert reencoder.target_tokens(before[-16:], text) == after
        num_compared += 1
    assert num_compared > 20


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_text_is_added_to_the_drafts_tokens(
    target: str, draft: str, tokenizers_by_name: dict[str, Tokenizer]
) -> None:
    """In pieces of any length: the tokens are always those of the whole text."""
    ours, theirs = tokenizers_by_name[target], tokenizers_by_name[draft]
    reencoder = Reencoder(ours, theirs)
    for size in (1, 2, 5):
        token_ids, _ = reencoder.draft_context(ours.encode(TEXT[:7]))
        for start in range(7, len(TEXT), size):
            window = token_ids[-16:]
            text = TEXT[start : start + size].encode()
            num_kept, new, rest = reencoder.extended_draft(window, text)
            assert rest == b""
            token_ids = [*token_ids[: len(token_ids) - len(window) + num_kept], *new]
        assert theirs.decode(token_ids) == TEXT


def test_special_tokens_with_the_same_text_or_role_are_counterparts(tmp_path: Path) -> None:
    ours = save(byte_fallback(), tmp_path / "ours", bos_token="<s>", eos_token="<|im_end|>")
    theirs = write_sentencepiece(tmp_path / "theirs")
    target, draft = loaded(ours), loaded(theirs)
    reencoder = Reencoder(target, draft)
    start, end = target.special_ids["<|im_start|>"], target.special_ids["<|im_end|>"]
    bos = target.special_ids["<s>"]
    token_ids, _ = reencoder.draft_context([bos, start, *target.encode("abc"), end])
    # <|im_start|> has no counterpart. EOS has another text there.
    assert draft.decode(token_ids) == "abc"
    assert (token_ids[0], token_ids[-1]) == (draft.special_ids["<s>"], draft.eos_token_id)
    eos = draft.eos_token_id
    assert eos is not None
    assert reencoder.is_last(eos)
    assert reencoder.target_tokens(target.encode("abc"), reencoder.draft_text(eos)) == [end]


def test_a_context_that_ends_inside_a_character(tokenizers_by_name: dict[str, Tokenizer]) -> None:
    ours, theirs = tokenizers_by_name["trained"], tokenizers_by_name["sentencepiece"]
    reencoder = Reencoder(ours, theirs)
    target_ids = ours.encode("ab 你")
    token_ids, rest = reencoder.draft_context(target_ids[:-1])
    assert theirs.decode(token_ids) == "ab "
    assert rest == "你".encode()[:-1]


def test_what_the_targets_tokenizer_cannot_write_is_not_proposed(tmp_path: Path) -> None:
    ours = loaded(save(byte_fallback(), tmp_path / "ours"))
    theirs = loaded(write_sentencepiece(tmp_path / "theirs"))
    assert Reencoder(theirs, ours).target_tokens([], "\ufb01".encode())
    words = Tokenizer(tekken(), {})  # without merges: single bytes
    assert Reencoder(words, theirs).target_tokens([], b"ab")


def test_what_cannot_be_reencoded_is_refused_by_name(tmp_path: Path) -> None:
    words = save(word_piece(), tmp_path / "words")
    pieces = write_sentencepiece(tmp_path / "pieces")
    empty = tmp_path / "empty"
    empty.mkdir()
    for draft, target, match in (
        (pieces, words, "the target's tokens are no bytes"),
        (words, pieces, "the draft's tokens are no bytes"),
        (pieces, empty, "empty has no tokenizer"),
        (empty, pieces, "has no tokenizer itself"),
    ):
        with pytest.raises(ConfigError, match=f"target_tokenizer: .*{match}"):
            load_reencoders(str(draft), [str(target)])


def test_the_drafts_own_tokenizer_needs_no_reencoding(tmp_path: Path) -> None:
    pieces = write_sentencepiece(tmp_path / "pieces")
    assert load_reencoders(str(pieces), [str(pieces)]) == {}
