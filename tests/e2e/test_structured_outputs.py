"""Structured outputs through the real services: an output that ends by itself is in its format."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import numpy as np
import pytest
import pytest_asyncio

from outrider.grammar import GrammarState, grammar_compiler
from outrider.sampling.structured_outputs import StructuredOutputs
from outrider.tokenizer import Tokenizer
from outrider.v1 import orchestrator_pb2, sampling_pb2
from outrider_bench.structured.schemas import random_schema
from tests.e2e.byte_tokenizer import EOS
from tests.e2e.pairs import OtherTokenizerPair, TextPair
from tests.e2e.traffic import BLOCK, COUPLED, LENGTH, REJECTION, STOP
from tests.stack import Output, Stack, request, running_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

_TAG = {
    "structures": [
        {
            "begin": "<add>",
            "schema": {
                "type": "object",
                "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["a"],
                "additionalProperties": False,
                "x-guidance": {"whitespace_flexible": False},
            },
            "end": "</f>",
        }
    ],
    "triggers": ["<"],
}
# Format, and what the whole output must match.
_FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "json": (
        {"json": '{"type": "array", "items": {"enum": ["x", 1]}, "minItems": 2, "maxItems": 3}'},
        r'(?s)\s*\[\s*("x"|1)(\s*,\s*("x"|1)){1,2}\s*\]\s*',
    ),
    "regex": ({"regex": "(yes|no|你好{1,3})[!?]{2}"}, r"(yes|no|你好{1,3})[!?]{2}"),
    "empty regex": ({"regex": ""}, ""),
    "choice": ({"choice": ["left", "right", 'a "quoted" é', "righteous"]}, ""),
    "grammar": ({"grammar": 'start: "(" start ")" | /[ab]/'}, r"\(*[ab]\)*"),
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def stack(text_pair: TextPair, redis: str) -> AsyncIterator[Stack]:
    async with running_stack(
        text_pair.target, text_pair.draft, redis, tokenizer=str(text_pair.target)
    ) as running:
        yield running


async def generate(stack: Stack, structured: dict[str, Any], **fields: Any) -> Output:
    sampling = {"temperature": 0.0, "max_tokens": 90, **fields.pop("sampling", {})}
    sampling["structured_outputs"] = sampling_pb2.StructuredOutputs(**structured)
    return await stack.generate("The answer: ", sampling=sampling, **fields)


@pytest.mark.parametrize("name", _FORMATS)
async def test_output_is_in_its_format_and_the_same_with_drafts(stack: Stack, name: str) -> None:
    structured, pattern = _FORMATS[name]
    ways = [(0.0, REJECTION), (0.9, COUPLED)]
    outputs = await asyncio.gather(
        *(
            generate(
                stack,
                structured,
                gamma=gamma,
                verification=verification,
                sampling={"temperature": temperature, "seed": 5},
            )
            for temperature, verification in ways
            for gamma in (0, 3)
        )
    )
    for plain, drafted in (outputs[:2], outputs[2:]):
        assert drafted.token_ids == plain.token_ids
        assert plain.result is not None
        assert plain.result.finish_reason == STOP
        assert plain.token_ids[-1] == EOS
        if name == "choice":
            assert plain.text in structured["choice"]
        else:
            assert re.fullmatch(pattern, plain.text)


async def test_any_json_object(stack: Stack) -> None:
    """Up to its end by length, it is the beginning of an object."""
    output = await generate(stack, {"json_object": True}, sampling={"max_tokens": 20})
    assert output.text.startswith("{")
    if output.result is not None and output.result.finish_reason == STOP:
        assert isinstance(json.loads(output.text), dict)


async def test_tagged_parts_of_free_text(stack: Stack) -> None:
    """A bias towards the trigger makes the model write it; what follows is the tagged part."""
    output = await generate(
        stack,
        {"structural_tag": json.dumps(_TAG)},
        sampling={"temperature": 1.0, "seed": 3, "logit_bias": {ord("<"): 60.0}},
        gamma=3,
    )
    parts = output.text.split("<add>")
    assert len(parts) > 3
    assert all(re.match(r'\{"a":[0-9]\}</f>', part) for part in parts[1:-1])


async def test_random_schemas(stack: Stack, text_pair: TextPair) -> None:
    """Ended by EOS: it validates. Ended by length: the format allows every token of it.

    Greedy and coupled outputs equal those without drafts.
    """
    rng = random.Random(11)
    tokenizer = Tokenizer.load(str(text_pair.target))
    compiler = grammar_compiler(tokenizer, eos_token_ids=[EOS])
    assert compiler is not None
    num_stopped = 0
    for _ in range(4):
        cases = [_case(rng) for _ in range(9)]
        outputs = await asyncio.gather(*(generate(stack, *case[:1], **case[1]) for case in cases))
        plain = await asyncio.gather(
            *(generate(stack, structured, **fields | {"gamma": 0}) for structured, fields in cases)
        )
        for (structured, fields), output, base in zip(cases, outputs, plain, strict=True):
            if fields["verification"] == COUPLED or not fields["sampling"]["temperature"]:
                assert output.token_ids == base.token_ids
            num_stopped += _checked(structured["json"], output, compiler)
            _checked(structured["json"], base, compiler)
    assert num_stopped > 20, "most end by themselves"


def _case(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"json": json.dumps(random_schema(rng))}, {
        "gamma": rng.choice([1, 2, 4, 8]),
        "verification": rng.choice([REJECTION, BLOCK, COUPLED]),
        "sampling": {"temperature": rng.choice([0.0, 0.7, 1.5]), "seed": rng.randrange(1 << 30)},
    }


def _checked(schema: str, output: Output, compiler: Any) -> bool:
    """Whether the output ended by itself."""
    assert output.result is not None
    if output.result.finish_reason == STOP:
        jsonschema.Draft202012Validator(json.loads(schema)).validate(json.loads(output.text))
        return True
    assert output.result.finish_reason == LENGTH
    state = GrammarState(compiler.submit(StructuredOutputs(json=schema)).result(60), [EOS])
    assert state.seek(np.array(output.token_ids)) == len(output.token_ids)
    return False


async def test_drafts_are_masked(stack: Stack) -> None:
    """Draft tokens that the format forbids are not proposed, so most are accepted."""
    structured = {"json": json.dumps({"enum": ["a long constant text, " * 3]})}
    output = await generate(stack, structured, gamma=4, verification=COUPLED)
    stats = output.speculation
    assert stats.num_accepted_tokens > 0.8 * stats.num_draft_tokens > 0


@pytest.mark.parametrize("verification", [REJECTION, BLOCK, COUPLED])
async def test_forced_tokens_are_draft_tokens_without_a_draft_tier(
    text_pair: TextPair, redis: str, verification: int
) -> None:
    """All of them are accepted; with gamma 0 or another source there are none."""
    structured = {"json": json.dumps({"enum": ["first constant text", "second constant text"]})}
    sampling = {"temperature": 0.8, "seed": 4}
    async with running_stack(
        text_pair.target, None, redis, tokenizer=str(text_pair.target)
    ) as alone:
        forced, plain = [
            await generate(
                alone, structured, sampling=sampling, verification=verification, **fields
            )
            for fields in ({}, {"gamma": 0})
        ]
    (source,) = [s for s in forced.speculation.sources if s.num_drafts]
    assert source.source == orchestrator_pb2.DRAFT_SOURCE_GRAMMAR
    assert source.num_accepted_tokens == source.num_draft_tokens > 10
    assert plain.speculation.num_draft_tokens == 0
    assert forced.text in ('"first constant text"', '"second constant text"')
    if verification == COUPLED:
        assert forced.token_ids == plain.token_ids


async def test_a_dead_end_is_reached_with_drafts_as_without(tmp_path: Path, redis: str) -> None:
    """No token continues the output: an error by name after all tokens before it, whatever γ.

    The format goes on with a character that no token has.
    """
    pair = OtherTokenizerPair(tmp_path)
    structured = sampling_pb2.StructuredOutputs(regex="[abcd]{9}é")
    texts = []
    async with running_stack(
        pair.target, pair.target, redis, tokenizer=str(pair.target), lookahead=0
    ) as stack:
        for gamma, temperature in ((0, 0.0), (4, 0.0), (0, 1.0), (4, 1.0)):
            sampling = {"temperature": temperature, "seed": 1, "structured_outputs": structured}
            output = Output()
            asked = request("abcd", sampling, gamma=gamma, verification=COUPLED)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _receive(stack, asked, output)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            details = str(caught.value.details())
            assert details.startswith("sampling.structured_outputs.regex: no token of the model")
            assert re.fullmatch("[abcd]{9}", output.text)
            texts.append(output.text)
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]


async def _receive(stack: Stack, asked: orchestrator_pb2.GenerateRequest, output: Output) -> None:
    async for chunk in stack.client.Generate(asked, timeout=100):
        output.add(chunk)


_REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no format": ({}, {}, ""),
    "two formats": ({"regex": "a", "json_object": True}, {}, ""),
    "not JSON": ({"json": "{"}, {}, ".json"),
    "not a schema": ({"json": "[1]"}, {}, ".json"),
    "unknown type": ({"json": '{"type": "colour"}'}, {}, ".json"),
    "unsupported keyword": ({"json": '{"not": {}}'}, {}, ".json"),
    "contradiction": ({"json": '{"type": "string", "enum": [1]}'}, {}, ".json"),
    "too deep": ({"json": '{"items":' * 4000 + "{}" + "}" * 4000}, {}, ".json"),
    "too large": ({"regex": "a" * 300_000}, {}, ".regex"),
    "look-ahead": ({"regex": "(?=a)b"}, {}, ".regex"),
    "too complex": (
        {"regex": "|".join(f"(a{i}.*b|[^x]{{{i}}})" for i in range(2000))},
        {},
        ".regex",
    ),
    "unknown rule": ({"grammar": "start: nothing"}, {}, ".grammar"),
    "no structures": ({"structural_tag": '{"triggers": []}'}, {}, ".structural_tag"),
    "ignore_eos": ({"regex": "a"}, {"ignore_eos": True}, ""),
    "min_tokens": ({"regex": "a"}, {"min_tokens": 2}, ""),
    "allowed_token_ids": ({"regex": "a"}, {"allowed_token_ids": [5]}, ""),
}


@pytest.mark.parametrize("name", _REFUSED)
async def test_refused_by_name(stack: Stack, name: str) -> None:
    structured, sampling, field = _REFUSED[name]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stack, structured, sampling=sampling)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = caught.value.details()
    assert details is not None
    assert details.startswith(f"sampling.structured_outputs{field}: ")


async def test_refused_without_a_tokenizer(tiny_pair: Any, redis: str, text_pair: TextPair) -> None:
    """By the orchestrator if it has none, by the target if only that has none."""
    for target, settings, why in (
        (tiny_pair.target, {}, "the model has no tokenizer"),
        (tiny_pair.target, {"tokenizer": str(text_pair.target)}, "the model has no tokenizer that"),
    ):
        async with running_stack(target, None, redis, **settings) as stack:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stack.generate(
                    [1, 2],
                    sampling={"structured_outputs": sampling_pb2.StructuredOutputs(regex="a")},
                )
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert str(caught.value.details()).startswith(
                f"sampling.structured_outputs.regex: {why}"
            )
