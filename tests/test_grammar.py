"""Grammars over real tokenizers: what they allow is a function of the output's tokens alone."""

from __future__ import annotations

import functools
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import outrider.grammar
from orchestrator.generation.output_format import OutputFormat
from outrider.errors import CapacityExceeded, InternalError, InvalidRequest
from outrider.grammar import Grammar, GrammarCompiler, GrammarState, grammar_compiler
from outrider.model_server.grammar_masks import MaskRequest, Masks, MaskThread
from outrider.sampling.structured_outputs import StructuredOutputs
from outrider.tokenizer import Tokenizer
from tests import vocabularies
from tests.cli.conftest import write_tokenizer
from tests.e2e.byte_tokenizer import load_byte_tokenizer

_SCHEMA = json.dumps({
    "type": "object",
    "properties": {"é": {"type": "string", "maxLength": 3}, "n": {"enum": [1, "two", None]}},
    "required": ["é", "n"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
})  # fmt: skip
_KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "byte-level": load_byte_tokenizer,
    "byte fallback": lambda path: Tokenizer(vocabularies.byte_fallback(), {}),
    "SentencePiece": lambda path: _loaded(vocabularies.write_sentencepiece(path / "model")),
    "Metaspace": lambda path: Tokenizer(vocabularies.unigram(), {}),
    "no byte tokens": lambda path: Tokenizer(_without_byte_tokens(), {}),
}


def _without_byte_tokens() -> tokenizers.Tokenizer:
    """Decoded as Llama 2, which has them."""
    backend = vocabularies.unigram()
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _loaded(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(str(directory))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module", params=_KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return _KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


def _eos(tokenizer: Tokenizer) -> int:
    return max(tokenizer.special_ids.values())


@functools.cache
def _compiler(tokenizer: Tokenizer, vocab_size: int) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size, [_eos(tokenizer)])


def _grammar(tokenizer: Tokenizer, num_more: int = 0, **fields: Any) -> Grammar:
    compiler = _compiler(tokenizer, tokenizer.vocab_size + num_more)
    return compiler.submit(StructuredOutputs(**(fields or {"json": _SCHEMA}))).result(60)


def _is_allowed(grammar: Grammar, eos: int, token_ids: list[int]) -> bool:
    """Whether the orchestrator's check allows the output."""
    output_format = OutputFormat(grammar, [eos], token_ids, 0, has_supports=False)
    try:
        output_format.check()
    except InternalError:
        return False
    return True


def _allowed(masks: Masks, row: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.flatnonzero(~masks.forbidden[row])


def _masks(thread: MaskThread, state: GrammarState, ids: list[int], num_committed: int) -> Masks:
    num_rows = len(ids) - num_committed + 1
    request = MaskRequest(state, np.array(ids, np.int64), num_committed, num_rows)
    (masks,) = thread.start([request]).result(60)
    assert isinstance(masks, Masks)
    return masks


@pytest.mark.parametrize("seed", range(3))
def test_masks_depend_on_the_tokens_only(tokenizer: Tokenizer, seed: int) -> None:
    """Whatever the path: token by token, in blocks with wrong drafts, or all at once.

    The vocabulary of the model is larger than the tokenizer's: no token beyond it is allowed.
    """
    grammar, eos, rng = _grammar(tokenizer, 77), _eos(tokenizer), random.Random(seed)
    thread, state, output = MaskThread(), GrammarState(grammar, [eos]), list[int]()
    text = tokenizer.detokenizer([])
    written = ""
    for _ in range(200):
        drafts = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 2))]
        masks = _masks(thread, state, [*output, *drafts], len(output))
        fresh = _masks(thread, GrammarState(grammar, [eos]), output, len(output))
        allowed = _allowed(masks, 0)
        assert allowed.tolist() == _allowed(fresh, 0).tolist()
        assert allowed.max() < tokenizer.vocab_size
        token_id = int(rng.choice(allowed))
        if token_id == eos:
            break
        output.append(token_id)
        written += text.push(token_id)
    value = json.loads(written + text.finish())
    assert set(value) == {"é", "n"}
    assert value["n"] in (1, "two", None)


def test_only_eos_follows_a_complete_output(tokenizer: Tokenizer) -> None:
    grammar, eos = _grammar(tokenizer, regex="ab"), _eos(tokenizer)
    ids = tokenizer.encode("ab", add_special_tokens=False)
    state = GrammarState(grammar, [eos])
    if state.seek(np.array(ids)) != len(ids):  # the tokenizer writes a space first
        ids = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "ab"][:1]
    masks = _masks(MaskThread(), GrammarState(grammar, [eos]), [*ids, eos, ids[0]], 0)
    assert _allowed(masks, len(ids)).tolist() == [eos]
    assert eos not in _allowed(masks, 0)
    assert masks.num_live == len(masks.forbidden)
    assert _is_allowed(grammar, eos, [*ids, eos])
    assert not _is_allowed(grammar, eos, [*ids, eos, eos])
    assert not _is_allowed(grammar, eos, [eos])


def test_a_grammar_may_be_ebnf(tmp_path: Path) -> None:
    """As vLLM's examples are; what does not parse is refused by name."""
    tokenizer = load_byte_tokenizer(tmp_path)
    grammar = _grammar(tokenizer, grammar='root ::= "ab" [0-9]+')
    assert GrammarState(grammar, []).seek(np.array([*b"ab12c"])) == 4
    with pytest.raises(
        InvalidRequest, match=r"structured_outputs\.grammar: is malformed: Expected"
    ):
        _grammar(tokenizer, grammar='root ::= ("ab"')
    assert (
        GrammarState(_grammar(tokenizer, grammar='start: "::="'), []).seek(np.array([*b"::="])) == 3
    )


def test_whitespace_of_json_is_bounded(tmp_path: Path) -> None:
    """Unless the schema says otherwise."""
    tokenizer = load_byte_tokenizer(tmp_path)
    output = np.array([*b"[", *b"\n" * 60])
    for schema, num in (('{"type": "array"}', 41), ('{"type": "array", "x-guidance": {}}', 61)):
        assert GrammarState(_grammar(tokenizer, json=schema), []).seek(output) == num


def test_a_position_without_allowed_tokens_is_reported(tmp_path: Path) -> None:
    """The tokenizer has no token for it; the rows before it live."""
    tokenizer = Tokenizer(_letters(), {})
    grammar = _grammar(tokenizer, regex="ab?é")
    masks = _masks(MaskThread(), GrammarState(grammar, [3]), [0, 1], 0)
    assert (masks.num_live, len(masks.forbidden)) == (2, 3)
    assert "no token of the model" in masks.why


def _letters() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return backend


def test_tokens_that_are_not_bytes_give_no_grammars() -> None:
    """The services then refuse formats by name."""
    assert grammar_compiler(Tokenizer(vocabularies.word_piece(), {})) is None


def test_added_tokens_are_text_and_special_ones_are_not() -> None:
    """A format's text may be an added token in angle brackets: models write calls of tools so."""
    tokenizer = Tokenizer(vocabularies.byte_fallback(), {})
    (tool,) = tokenizer.encode("<tool>", add_special_tokens=False)
    for text, expected in (("<tool>", [tool]), ("<s>", tokenizer.encode("<")[:1])):
        grammar = _grammar(tokenizer, regex=text)
        assert grammar.matcher().compute_ff_tokens()[:1] == expected
    free = _grammar(tokenizer, regex="(?s:.*)")
    allowed = _allowed(_masks(MaskThread(), GrammarState(free, [_eos(tokenizer)]), [], 0), 0)
    assert tool in allowed
    assert set(allowed) & set(tokenizer.special_ids.values()) == {_eos(tokenizer)}


@pytest.mark.parametrize("kind", ["SentencePiece", "Metaspace"])
def test_forced_text_is_written_exactly(kind: str, tmp_path: Path) -> None:
    """Although the tokenizer would normalize it, or put a space before it."""
    tokenizer = _KINDS[kind](tmp_path)
    wanted, eos = "the e\u0301 ", _eos(tokenizer)
    grammar, prompt = _grammar(tokenizer, choice=(wanted,)), tokenizer.encode("a")
    text, written, output = tokenizer.detokenizer(prompt), "", list[int]()
    while eos not in (
        allowed := _allowed(
            _masks(MaskThread(), GrammarState(grammar, [eos]), output, len(output)), 0
        )
    ):
        output.append(int(allowed[-1]))
        written += text.push(output[-1])
        assert len(output) < 20
    assert written + text.finish() == wanted


def test_eos_beyond_the_tokenizer() -> None:
    """Ignored beside one that the tokenizer has; alone it gives no grammars."""
    tokenizer = Tokenizer(vocabularies.byte_fallback(), {})
    assert grammar_compiler(tokenizer, 400, [269, 399]) is not None
    assert grammar_compiler(tokenizer, 400, [399]) is None


def test_without_eos_tokens_every_token_is_text(tmp_path: Path) -> None:
    """Orchestrators compile so; of itself, llguidance takes token 0 as the end of an output."""
    write_tokenizer(tmp_path, ["the quick brown fox"])
    tokenizer = _loaded(tmp_path)
    eos = _eos(tokenizer)
    formats = [_grammar(tokenizer, regex=r"(.|\n){1,2}")]
    compiler = GrammarCompiler(tokenizer, 0, [])
    formats.append(compiler.submit(StructuredOutputs(regex=r"(.|\n){1,2}")).result(60))
    with_eos, without = (
        [_is_allowed(each, eos, [i]) for i in range(tokenizer.vocab_size)] for each in formats
    )
    assert with_eos == without
    assert sum(without) > 100


def test_formats_are_compiled_once_and_the_cache_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are cached, too."""
    monkeypatch.setattr(outrider.grammar, "MAX_CACHED", 2)
    compiler = GrammarCompiler(load_byte_tokenizer(tmp_path), 0, [])
    first, bad = StructuredOutputs(regex="a"), StructuredOutputs(regex="(")
    grammar = compiler.submit(first).result(60)
    assert compiler.submit(StructuredOutputs(regex="a")).result(60) is grammar
    with pytest.raises(InvalidRequest, match=r"structured_outputs\.regex: cannot be compiled"):
        compiler.submit(bad).result(60)
    assert compiler.submit(bad) is compiler.submit(bad)
    compiler.submit(StructuredOutputs(regex="b")).result(60)
    assert compiler.submit(first).result(60) is not grammar


async def test_a_slow_compilation_is_refused_in_time_and_others_wait_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many at a time are refused with a retry hint; a cached format needs no slot."""
    compiler, go_on = GrammarCompiler(load_byte_tokenizer(tmp_path), 0, []), threading.Event()
    ready = StructuredOutputs(regex="a")
    grammar = await compiler.compile(ready)
    compile_now = compiler._compiled

    def slowly(structured: StructuredOutputs) -> Grammar:
        assert go_on.wait(60)
        return compile_now(structured)

    monkeypatch.setattr(compiler, "_compiled", slowly)
    monkeypatch.setattr(outrider.grammar, "COMPILE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(outrider.grammar, "MAX_PENDING", 2)
    slow = [StructuredOutputs(regex=letter) for letter in "xyz"]
    with pytest.raises(InvalidRequest, match=r"regex: is not compiled after 0\.05 s"):
        await compiler.compile(slow[0])
    with pytest.raises(InvalidRequest):
        await compiler.compile(slow[1])
    with pytest.raises(CapacityExceeded):
        await compiler.compile(slow[2])
    assert await compiler.compile(ready) is grammar
    go_on.set()
    assert compiler.submit(slow[0]).result(60) is not None
