"""Trial compilations: formats that would crash or block a program are refused, in time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from outrider.errors import InternalError, InvalidRequest
from outrider.grammar import GrammarCompiler
from outrider.grammar_trial import FormatTrials
from outrider.sampling.structured_outputs import StructuredOutputs
from tests.e2e.byte_tokenizer import EOS, load_byte_tokenizer

# Overflows llguidance's stack.
_LINKS = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(4_000)}
DEEP = json.dumps({"$ref": "#/$defs/d0", "$defs": {**_LINKS, "d4000": {"type": "integer"}}})
# Takes minutes.
SLOW = "start: T\nT: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(20, 80))


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrammarCompiler]:
    """As an orchestrator's."""
    tokenizer = load_byte_tokenizer(tmp_path_factory.mktemp("bytes"))
    compiler = GrammarCompiler(tokenizer, 0, [], tries_first=True)
    yield compiler
    compiler.close()


def test_a_format_that_overflows_the_stack_is_refused(compiler: GrammarCompiler) -> None:
    """The next one compiles; errors are reported as without a trial."""
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"outputs\.json: is too deep or too large"):
            compiler.submit(StructuredOutputs(json=DEEP)).result(60)
    assert compiler.submit(StructuredOutputs(json='{"type": "integer"}')).result(60) is not None
    with pytest.raises(InvalidRequest, match="cannot be compiled"):
        compiler.submit(StructuredOutputs(regex="(")).result(60)


def test_special_tokens_are_known_to_trials() -> None:
    """Otherwise a format that names one would never be tried as a whole."""
    special = {EOS: "</s>", 3: "<|x|>"}
    trials = FormatTrials(EOS + 1, special, EOS, cpu_s=0.2)
    try:
        for name in ("<|x|>", f"<[{EOS}]>"):
            assert trials.run(f"start: {name} T\nT: /a+/") is None
            why = trials.run(SLOW.replace("start: T", f"start: {name} T"))
            assert why == "takes more than 0.2 s to compile; simplify it"
    finally:
        trials.close()


def test_processes_end_with_their_program() -> None:
    trials = FormatTrials(300, {}, 299)
    assert trials.run("start: /a/") is None
    (process,) = trials._idle
    trials.close()
    assert process.returncode is not None


def test_a_process_that_does_not_start_is_an_error_of_ours(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the client, whose format was not tried; the next request tries it."""
    compiler.close()
    structured, executable = StructuredOutputs(regex="never compiled before"), sys.executable
    for other, why in (("/nowhere/python", "No such file"), ("/bin/false", "code 1")):
        monkeypatch.setattr(sys, "executable", other)
        with pytest.raises(InternalError, match=f"cannot be started: .*{why}"):
            compiler.submit(structured).result(60)
    monkeypatch.setattr(sys, "executable", executable)
    assert compiler.submit(structured).result(60) is not None
