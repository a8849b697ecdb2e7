"""Random cases of `outrider bench structured`: their schemas can be served; what is a problem."""

from __future__ import annotations

from dataclasses import replace

import jsonschema

from outrider.grammar import grammar_compiler
from outrider.quickstart_pair import TARGET_PATH
from outrider.tokenizer import Tokenizer
from outrider_bench.structured.cases import CaseResult, problem_of, random_cases
from outrider_bench.structured.masks import replayed


def test_schemas_are_valid_and_can_be_served() -> None:
    compiler = grammar_compiler(Tokenizer.load(str(TARGET_PATH)))
    assert compiler is not None
    for case in random_cases(40, seed=3):
        jsonschema.Draft202012Validator.check_schema(case.schema)
        compiler.submit(case.structured).result(60)


def test_cases_of_a_seed_are_the_same() -> None:
    assert list(random_cases(20, seed=1)) == list(random_cases(20, seed=1))
    assert {case.num_streams for case in random_cases(100, seed=1)} == {1, 4, 16, 32}


def test_outputs_that_break_the_format_are_problems() -> None:
    """By their text if they ended by themselves, otherwise by their tokens."""
    case = replace(next(random_cases(1, seed=0)), schema={"type": "array", "maxItems": 1})
    assert not problem_of(case, "stop", "[1]")
    assert problem_of(case, "stop", "[1, 2]").startswith("ValidationError")
    assert problem_of(case, "stop", "[1").startswith("JSONDecodeError")
    assert not problem_of(case, "length", "[1")
    tokenizer = Tokenizer.load(str(TARGET_PATH))
    assert tokenizer is not None
    results = [
        CaseResult(case, "length", text, tokenizer.encode(text), 0, 0) for text in ("[1", "[1,")
    ]
    checked, _ = replayed(None, results)
    assert [bool(result.problem) for result in checked] == [False, True]
