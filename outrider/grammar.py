"""Grammars of structured outputs: compiled with llguidance, and a generation's position in one.

A grammar says which tokens may follow an output. Compilation runs in threads of its own, with
limits, and is cached. `outrider.model_server.grammar_masks` computes masks for forward passes.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
from llguidance import LLMatcher

from outrider.errors import CapacityExceeded, InvalidRequest
from outrider.grammar_tokens import GrammarTokens
from outrider.grammar_trial import LIMITS, FormatTrials
from outrider.sampling.structured_outputs import StructuredOutputs
from outrider.structural_tags import JSON_WHITESPACE, lark_grammar, structural_grammar
from outrider.tokenizer import Tokenizer

log = structlog.get_logger()

# A format that takes longer, with the wait for others, is refused. A trial ends it earlier.
COMPILE_TIMEOUT_S = 10.0
# Compilations at a time; each holds one core.
MAX_COMPILING = 2
# Formats being compiled or waiting for it; more are refused.
MAX_PENDING = 64
# Compiled formats, and errors of formats that cannot be compiled.
MAX_CACHED = 128
_MAX_ERROR_CHARS = 300
_WHITESPACE: Any = {"whitespace_pattern": JSON_WHITESPACE}
# The tokenizer may lack tokens for forced text: turns forcing off, and every token is masked.
_UNFORCED = '%llguidance {"no_forcing": true}\n'

Ids = npt.NDArray[Any]


class Grammar:
    """A compiled format. `field`: path of the request's field, for errors. Any thread may use it.

    `num_words`: 32-bit words of a mask. `has_forced`: the matcher's forced tokens can be used.
    """

    def __init__(self, matcher: LLMatcher, field: str, num_words: int, has_forced: bool) -> None:
        self._matcher = matcher
        self.field = field
        self.num_words = num_words
        self.has_forced = has_forced

    def matcher(self) -> LLMatcher:
        """A new matcher at the beginning of an output."""
        return self._matcher.deep_copy()


class GrammarState:
    """Position of a generation in its grammar; a function of the output's tokens alone.

    For one thread at a time. `eos_token_ids` end the output where the grammar is complete.
    """

    def __init__(self, grammar: Grammar, eos_token_ids: Collection[int]) -> None:
        self.grammar = grammar
        self.matcher = grammar.matcher()
        self._eos_token_ids = np.array(sorted(eos_token_ids), np.int64)
        self._token_ids: Ids = np.zeros(0, np.int64)

    def seek(self, output_ids: Ids) -> int:
        """Moves behind the longest beginning of the output that the grammar allows, without EOS.

        Returns the number of its tokens. Rolls back and consumes no more tokens than differ.
        """
        stops = np.flatnonzero(np.isin(output_ids, self._eos_token_ids))
        wanted = output_ids[: stops[0]] if len(stops) else output_ids
        size = min(len(wanted), len(self._token_ids))
        differing = np.flatnonzero(self._token_ids[:size] != wanted[:size])
        num_same = int(differing[0]) if len(differing) else size
        if num_same < len(self._token_ids) and not self.matcher.rollback(
            len(self._token_ids) - num_same
        ):
            self.matcher, num_same = self.grammar.matcher(), 0
        num_new = self.matcher.try_consume_tokens(wanted[num_same:].tolist())
        self._token_ids = np.array(wanted[: num_same + num_new], np.int64)
        return num_same + num_new

    def reset(self) -> None:
        """Back to the beginning, with a new matcher: an error of a matcher is final."""
        self.matcher, self._token_ids = self.grammar.matcher(), np.zeros(0, np.int64)


def grammar_compiler(
    tokenizer: Tokenizer | None,
    vocab_size: int = 0,
    eos_token_ids: Collection[int] = (),
    *,
    tries_first: bool = False,
) -> GrammarCompiler | None:
    """A compiler; None without tokenizer, or if its tokens cannot be mapped to bytes.

    `tries_first`: for formats of clients; see `outrider.grammar_trial`.
    """
    if tokenizer is None:
        return None
    try:
        return GrammarCompiler(tokenizer, vocab_size, eos_token_ids, tries_first=tries_first)
    except ValueError as error:
        log.warning("no_structured_outputs", why=str(error))
        return None


class GrammarCompiler:
    """Compiles formats for one tokenizer and caches the grammars. Any thread may use it.

    `vocab_size`: the model's, which may exceed the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Collection[int],
        *,
        tries_first: bool = False,
    ) -> None:
        """Takes a second for a vocabulary of 131,000 tokens, with the GIL held.

        Raises ValueError as GrammarTokens does.
        """
        self._tokens = GrammarTokens(tokenizer, vocab_size, eos_token_ids)
        self._tokenizer = self._tokens.ll_tokenizer()
        self._trials: FormatTrials | None = None
        if tries_first:
            tokens = self._tokens
            self._trials = FormatTrials(len(tokens.tokens), tokens.special, tokens.eos_token_id)
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_COMPILING)
        self._num_pending = 0
        self._futures: OrderedDict[StructuredOutputs, Future[Grammar]] = OrderedDict()

    def submit(self, structured: StructuredOutputs) -> Future[Grammar]:
        """The grammar, from the cache or compiled in a thread.

        The future raises InvalidRequest, or CapacityExceeded if too many formats wait.
        """
        with self._lock:
            if (future := self._futures.get(structured)) is not None:
                self._futures.move_to_end(structured)
                return future
            future = Future()
            if self._num_pending >= MAX_PENDING:
                future.set_exception(
                    CapacityExceeded(f"{MAX_PENDING} formats of structured outputs are compiled")
                )
                return future
            self._num_pending += 1
            self._futures[structured] = future
            while len(self._futures) > MAX_CACHED:
                self._futures.popitem(last=False)
        # A daemon: a compilation cannot be interrupted and must not delay the program's end.
        threading.Thread(
            target=self._run, args=(structured, future), name="grammar", daemon=True
        ).start()
        return future

    async def compile(self, structured: StructuredOutputs) -> Grammar:
        """The grammar. Raises InvalidRequest, also if it takes too long, and CapacityExceeded."""
        future = asyncio.wrap_future(self.submit(structured))
        try:
            async with asyncio.timeout(COMPILE_TIMEOUT_S):
                return await asyncio.shield(future)
        except TimeoutError:
            why = f"is not compiled after {COMPILE_TIMEOUT_S:g} s; simplify it"
            raise InvalidRequest(structured.field, why) from None

    def close(self) -> None:
        """Ends the processes of trials."""
        if self._trials is not None:
            self._trials.close()

    def _run(self, structured: StructuredOutputs, future: Future[Grammar]) -> None:
        try:
            with self._slots:
                grammar = self._compiled(structured)
        except Exception as error:
            if not isinstance(error, InvalidRequest):  # it is not the format's
                with self._lock:
                    self._futures.pop(structured, None)
            future.set_exception(error)
        else:
            future.set_result(grammar)
        finally:
            with self._lock:
                self._num_pending -= 1

    def _compiled(self, structured: StructuredOutputs) -> Grammar:
        try:
            source = _source(structured)
        except (ValueError, TypeError, KeyError, AssertionError, RecursionError) as error:
            raise InvalidRequest(structured.field, f"is malformed: {error}") from None
        is_forced = self._tokens.covers_all_bytes
        if not is_forced:
            source = _unforced(source)
        if self._trials is not None and (why := self._trials.run(source)) is not None:
            raise InvalidRequest(structured.field, why)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some errors show here only
        if matcher.is_error():
            raise InvalidRequest(structured.field, f"cannot be compiled: {error_of(matcher)}")
        num_words = (self._tokenizer.vocab_size + 31) // 32
        return Grammar(matcher, structured.field, num_words, is_forced)


def error_of(matcher: LLMatcher) -> str:
    """First line of a matcher's error, shortened."""
    return matcher.get_error().strip().partition("\n")[0][:_MAX_ERROR_CHARS]


def _source(structured: StructuredOutputs) -> str:
    """llguidance's source of a format. Raises ValueError and the errors of malformed JSON."""
    match structured.kind:
        case "json":
            assert structured.json is not None
            schema = json.loads(structured.json)
            if not isinstance(schema, dict | bool):
                raise ValueError("a JSON schema is an object")
            has_own = isinstance(schema, dict) and "x-guidance" in schema
            whitespace = None if has_own else _WHITESPACE
            return LLMatcher.grammar_from_json_schema(structured.json, defaults=whitespace)
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=_WHITESPACE)
        case "regex":
            assert structured.regex is not None
            return LLMatcher.grammar_from_regex(structured.regex)
        case "choice":
            # One terminal: as alternatives of a rule, 2,000 choices would exceed the parser's row.
            texts = " | ".join(json.dumps(text) for text in structured.choice)
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
        case "grammar":
            assert structured.grammar is not None
            return lark_grammar(structured.grammar)
    assert structured.structural_tag is not None
    return structural_grammar(json.loads(structured.structural_tag))


def _unforced(source: str) -> str:
    """The source, all grammars as Lark, without forced tokens."""
    grammars = [{"lark_grammar": source}]
    if source.startswith("{"):
        grammars = json.loads(source)["grammars"]
    written = []
    for grammar in grammars:
        lark = grammar.get("lark_grammar")
        if lark is None:
            lark = f"start: %json {json.dumps(grammar['json_schema'])}"
        written.append({"name": grammar.get("name"), "lark_grammar": _UNFORCED + lark})
    return json.dumps({"grammars": written})
