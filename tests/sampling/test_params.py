"""Validation of sampling parameters: invalid values are refused by field name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from outrider.errors import InvalidRequest
from outrider.sampling.params import (
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_TEXT_CHARS,
    MAX_STOP_TEXTS,
    MAX_TOKEN_LIST,
    SamplingParams,
)
from outrider.sampling.structured_outputs import MAX_CHOICES, MAX_FORMAT_CHARS, StructuredOutputs

_VOCAB = 5000

_BAD: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", 100.5),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", -1.0),
    ("top_k", -2),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("min_tokens", -1),
    ("min_tokens", 11),
    ("presence_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", 10.5),
    ("logprobs", -1),
    ("logprobs", MAX_LOGPROBS + 1),
    ("stop", ("",)),
    ("stop", ("ok", "x" * (MAX_STOP_TEXT_CHARS + 1))),
    ("stop", ("x",) * (MAX_STOP_TEXTS + 1)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (0, _VOCAB)),
    ("stop_token_ids", (0,) * (MAX_TOKEN_LIST + 1)),
    ("logit_bias", {-1: 0.0}),
    ("logit_bias", {_VOCAB: 0.0}),
    ("logit_bias", {0: 100.5}),
    ("logit_bias", {0: -100.5}),
    ("logit_bias", {0: math.nan}),
    ("logit_bias", {0: math.inf}),
    ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.0)),
    ("allowed_token_ids", (-1,)),
    ("allowed_token_ids", (3, _VOCAB)),
    ("allowed_token_ids", (0,) * (_VOCAB + 1)),
]
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_BAD += [(name, value) for name in _FLOATS for value in (math.nan, math.inf, -math.inf)]


@pytest.mark.parametrize(("name", "value"), _BAD)
def test_an_invalid_value_is_refused_by_field_name(name: str, value: Any) -> None:
    """InvalidRequest has the field's path and the reason."""
    given: dict[str, Any] = {"max_tokens": 10, name: value}
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**given).validate(_VOCAB)
    assert caught.value.field == f"sampling.{name}"
    assert str(caught.value).startswith(f"sampling.{name}: ")
    assert caught.value.why


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 100.0),
        ("top_p", 1e-9),
        ("top_p", 1.0),
        ("top_k", -1),
        ("top_k", 0),
        ("top_k", 10**9),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("max_tokens", 1),
        ("min_tokens", 0),
        ("presence_penalty", -2.0),
        ("presence_penalty", 2.0),
        ("frequency_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("repetition_penalty", 1e-6),
        ("repetition_penalty", 10.0),
        ("logprobs", None),
        ("logprobs", 0),
        ("logprobs", MAX_LOGPROBS),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("stop", ()),
        ("stop", ("x",) * MAX_STOP_TEXTS),
        ("stop", ("x" * MAX_STOP_TEXT_CHARS,)),
        ("stop_token_ids", (0, _VOCAB - 1)),
        ("stop_token_ids", (0,) * MAX_TOKEN_LIST),
        ("logit_bias", {0: -100.0, _VOCAB - 1: 100.0}),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIASES), 1.0)),
        ("allowed_token_ids", (0, _VOCAB - 1)),
        ("ignore_eos", True),
    ],
)
def test_boundary_values_pass(name: str, value: Any) -> None:
    """The ends of every range are valid."""
    given: dict[str, Any] = {name: value}
    SamplingParams(**given).validate(_VOCAB)


def test_min_tokens_may_equal_max_tokens() -> None:
    """The output then has exactly that many tokens."""
    SamplingParams(max_tokens=8, min_tokens=8).validate(_VOCAB)


def test_the_defaults_pass() -> None:
    """vLLM's defaults: plain sampling at temperature 1."""
    params = SamplingParams()
    params.validate(1)
    assert not params.greedy
    assert not params.penalises


def test_greedy_is_temperature_zero() -> None:
    """Only exactly zero is greedy."""
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=1e-6).greedy


@pytest.mark.parametrize(
    "given", [{"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"repetition_penalty": 0.9}]
)
def test_penalises(given: dict[str, float]) -> None:
    """Each of the three, on its own."""
    assert SamplingParams(**given).penalises  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("structured", "field"),
    [
        (StructuredOutputs(), ""),
        (StructuredOutputs(regex="a", json_object=True), ""),
        (StructuredOutputs(json="x" * (MAX_FORMAT_CHARS + 1)), ".json"),
        (StructuredOutputs(choice=("a",) * (MAX_CHOICES + 1)), ".choice"),
    ],
)
def test_a_format_has_one_field_of_bounded_size(structured: StructuredOutputs, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(structured_outputs=structured).validate(_VOCAB)
    assert caught.value.field == f"sampling.structured_outputs{field}"


@pytest.mark.parametrize("name", ["ignore_eos", "min_tokens", "allowed_token_ids"])
def test_a_format_alone_decides_where_the_output_ends(name: str) -> None:
    values: dict[str, Any] = {"ignore_eos": True, "min_tokens": 1, "allowed_token_ids": (3,)}
    params = SamplingParams(
        max_tokens=5, structured_outputs=StructuredOutputs(regex=""), **{name: values[name]}
    )
    with pytest.raises(InvalidRequest, match=f"structured_outputs: not allowed with {name}"):
        params.validate(_VOCAB)
