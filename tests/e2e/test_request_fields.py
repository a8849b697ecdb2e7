"""Every sampling field means the same with speculation and without, down to the text.

Expected tokens are of tests/e2e/reference.py; where an output must end, and with what text, is
written out here once more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from orchestrator.api.grpc_request import parse_request
from orchestrator.replicas.models import Limits
from outrider.errors import InvalidRequest
from outrider.v1 import orchestrator_pb2
from tests.e2e.byte_tokenizer import EOS, LONGER, text_of
from tests.e2e.pairs import TextPair
from tests.e2e.reference import Sampling, assert_seeded
from tests.e2e.traffic import (
    ACCEPTED,
    BLOCK,
    BONUS,
    COUPLED,
    LENGTH,
    PLAIN,
    RECOVERED,
    REJECTION,
    STOP,
    assert_speculated,
    generate_all,
    num_drafted,
)
from tests.stack import Output, request, running_stack

_NUM_TOKENS = 40
# The services' own limit where nothing else is set.
MAX_GAMMA = 16
# 你 and é in bytes and in pieces, what stop strings are made of, and EOS.
_ALLOWED = [*b"abc th", *"你é".encode(), *range(256, 256 + len(LONGER)), EOS]
_ab, _half = 256 + LONGER.index(b"ab"), 256 + LONGER.index(b"c\xe4")

_CASES: dict[str, Sampling] = {
    "plain": {},
    "characters": {"allowed_token_ids": _ALLOWED},
    "presence_penalty": {"allowed_token_ids": _ALLOWED, "presence_penalty": 1.5},
    "frequency_penalty": {"allowed_token_ids": _ALLOWED, "frequency_penalty": -0.5},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "logit_bias": {"logit_bias": {ord("a"): 6.0, ord("b"): 6.0, _half: 5.0, EOS: -100.0}},
    "allowed_token_ids": {"allowed_token_ids": [*b"abc"]},
    "bad_words": {
        "allowed_token_ids": [*b"abc", _ab],
        "bad_words": ["ca", " bb"],
        "bad_words_token_ids": [{"ids": [*b"ab"]}, {"ids": [*b"acc"]}, {"ids": [_ab, _ab]}],
    },
    "max_tokens": {"max_tokens": 3},
    "min_tokens": {"allowed_token_ids": [*b"abc", EOS], "min_tokens": 17},
    "min_tokens at once": {"allowed_token_ids": [*b"a", EOS], "min_tokens": _NUM_TOKENS},
    "ignore_eos": {"allowed_token_ids": [*b"abc", EOS], "ignore_eos": True},
    "stop_token_ids": {"allowed_token_ids": _ALLOWED, "stop_token_ids": [ord("b"), _half]},
    "stop_token_ids late": {
        "allowed_token_ids": _ALLOWED,
        "stop_token_ids": [ord("b"), ord("a"), _ab],
        "min_tokens": 9,
    },
    "stop": {"allowed_token_ids": _ALLOWED, "stop": ["th", "ca", "你"]},
    "stop over tokens": {"allowed_token_ids": [*b"abc"], "stop": ["abca", "ccc", "bacb", "aab"]},
    "stop over halves": {
        "allowed_token_ids": [*b"a", *"你".encode(), _half],
        "stop": ["你a", "ac"],
    },
    "stop late": {"allowed_token_ids": [*b"ab"], "stop": ["ab", "ba"], "min_tokens": 11},
    "stop included": {
        "allowed_token_ids": _ALLOWED,
        "stop": ["th", "ca", "你"],
        "include_stop_str_in_output": True,
    },
    "stop token included": {
        "allowed_token_ids": _ALLOWED,
        "stop_token_ids": [ord("b"), _half],
        "include_stop_str_in_output": True,
    },
    "special tokens kept": {
        "allowed_token_ids": [*b"abc", EOS],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "stop": ["a</s>b", "s>cc"],
    },
    "EOS kept and included": {
        "allowed_token_ids": [*b"abc", EOS],
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "min_tokens": 3,
    },
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.1},
}
_PROMPTS = [[*b"the a"], [*"你 th".encode()], [5, 99, *b"abcabcab"], [*b"a"] * 30]


def _text_of(token_ids: list[int], sampling: Sampling) -> str:
    return text_of(token_ids, b"" if sampling.get("skip_special_tokens", True) else b"</s>")


def _in_tokens(sampling: Sampling) -> Sampling:
    """Bad words as tokens: they are spelled by single bytes here."""
    words = [{"ids": [*word.strip().encode()]} for word in sampling.get("bad_words", ())]
    return sampling | {"bad_words_token_ids": [*sampling.get("bad_words_token_ids", ()), *words]}


def _end_of(token_ids: list[int], sampling: Sampling) -> dict[str, Any]:
    """Where and how the output ends, and its text; {} if it does not end there."""
    seen: list[int] = []
    includes = sampling.get("include_stop_str_in_output", False)
    for i, token_id in enumerate(token_ids):
        may_stop = i >= sampling.get("min_tokens", 0)
        text = _text_of([*seen, token_id] if includes else seen, sampling)
        if may_stop and token_id == EOS and not sampling.get("ignore_eos"):
            return {"num": i + 1, "reason": STOP, "eos_token_id": EOS, "text": text}
        if may_stop and token_id in sampling.get("stop_token_ids", ()):
            return {"num": i + 1, "reason": STOP, "stop_token_id": token_id, "text": text}
        seen.append(token_id)
        text = _text_of(seen, sampling)
        searched_len = len(_text_of(seen[: sampling.get("min_tokens", 0)], sampling))
        # A stop string counts where it is complete after min_tokens; the first complete one.
        found = [
            (at + len(stop), -len(stop), stop)
            for stop in sampling.get("stop", ())
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > searched_len
        ]
        if may_stop and found:
            end, negative_len, stop = min(found)
            text = text[: end if includes else end + negative_len]
            return {"num": i + 1, "reason": STOP, "stop_text": stop, "text": text}
        if i + 1 == sampling["max_tokens"]:
            return {"num": i + 1, "reason": LENGTH, "text": text}
    return {}


def _said(output: Output) -> dict[str, Any]:
    assert output.result is not None
    which = output.result.WhichOneof("stop")
    said = {"num": len(output.token_ids), "reason": output.result.finish_reason}
    return said | {"text": output.text} | ({which: getattr(output.result, which)} if which else {})


def _assert_statistics_agree(output: Output) -> None:
    """What is counted is what was emitted, and rates are of these counts."""
    assert output.result is not None
    stats, usage = output.speculation, output.result.usage
    count = {origin: output.origins.count(origin) for origin in (ACCEPTED, RECOVERED, BONUS, PLAIN)}
    assert sum(count.values()) == len(output.origins) == len(output.token_ids)
    assert usage.completion_tokens == len(output.token_ids)
    assert count[ACCEPTED] == stats.num_accepted_tokens
    assert sum(stats.num_accepted_tokens_per_pos) == stats.num_accepted_tokens
    per_pos = list(stats.num_accepted_tokens_per_pos)
    assert per_pos == sorted(per_pos, reverse=True)
    most = stats.gamma if stats.HasField("gamma") else MAX_GAMMA
    assert len(per_pos) <= most
    assert stats.num_accepted_tokens <= stats.num_draft_tokens <= most * stats.num_drafts
    rounds = list(enumerate(stats.num_rounds_per_gamma))
    assert sum(count for _, count in rounds) == stats.num_rounds - 1
    assert sum(count for gamma, count in rounds if gamma) == stats.num_drafts
    assert sum(gamma * count for gamma, count in rounds) == stats.num_draft_tokens
    # A decision where a draft may be used.
    assert stats.HasField("decision") == (not stats.HasField("gamma") or stats.gamma > 0)
    assert stats.decision.is_fixed == (stats.gamma > 0)
    assert 0 <= stats.target_step_s <= stats.verify_s
    assert 0 <= stats.draft_wait_s <= stats.duration_s
    # A round emits at most one token that is not accepted; only a stop leaves it out.
    last_was_accepted = output.origins[-1] == ACCEPTED
    assert count[RECOVERED] + count[BONUS] == stats.num_drafts - last_was_accepted
    assert count[PLAIN] == stats.num_rounds - stats.num_drafts
    assert stats.HasField("acceptance_rate") == (stats.num_drafts > 0)
    assert stats.HasField("mean_acceptance_length") == (stats.num_drafts > 0)
    if stats.num_drafts:
        assert stats.num_rejected_tokens == count[RECOVERED]
        rate = count[ACCEPTED] / (count[ACCEPTED] + count[RECOVERED])
        assert stats.acceptance_rate == pytest.approx(rate)
        length = 1 + stats.num_accepted_tokens / stats.num_drafts
        assert stats.mean_acceptance_length == pytest.approx(length)
    assert stats.num_lookahead_hits <= stats.num_drafts
    assert stats.target_wire_bytes > 0


def _assert_text_ends(output: Output, sampling: Sampling) -> None:
    """After each token so much of the text is certain, and no less is shown at the end."""
    assert len(output.text_ends) == len(output.token_ids)
    assert output.text_ends == sorted(output.text_ends)
    assert output.text_ends[-1] == len(output.text)
    for i, end in enumerate(output.text_ends[:-1]):
        assert _text_of(output.token_ids[: i + 1], sampling).startswith(output.text[:end])


@pytest.mark.slow
@pytest.mark.parametrize("case", _CASES)
async def test_a_field_means_the_same(case: str, text_pair: TextPair, redis: str) -> None:
    """Greedy, and sampled by `coupled`: speculated in three ways, and plain."""
    base = {"max_tokens": _NUM_TOKENS, **_CASES[case]}
    stops = any("stop" in field for field in _CASES[case])
    asked = [
        (prompt, base | {"temperature": temperature, "seed": seed})
        for prompt in (_PROMPTS if stops else _PROMPTS[list(_CASES).index(case) % 2 :: 2])
        for temperature, seed in ((0.0, 0), (1.0, 1), (0.8, 2))
    ]
    ways: tuple[dict[str, int], ...] = (
        {"gamma": 0},
        {"gamma": 4, "lookahead": 1, "fan_out": 1},
        {"gamma": 6, "lookahead": 0},
        {"lookahead": 2, "fan_out": 16},
    )
    calls = [
        {"prompt": prompt, "sampling": sampling, "verification": COUPLED, **way}
        for prompt, sampling in asked
        for way in ways
    ]
    async with running_stack(
        text_pair.target, text_pair.draft, redis, tokenizer=str(text_pair.target)
    ) as stack:
        outputs = await generate_all(stack, calls)
    for i, (prompt, given) in enumerate(asked):
        sampling = _in_tokens(given)
        theirs = outputs[len(ways) * i :][: len(ways)]
        plain = theirs[0]
        if sampling["temperature"] == 0:
            laws = text_pair.reference.laws(prompt, plain.token_ids, sampling)
            assert plain.token_ids == np.argmax(laws, -1).tolist()
        else:
            assert_seeded(text_pair.reference, prompt, plain.token_ids, sampling)
        assert _said(plain) == _end_of(plain.token_ids, sampling)
        for output in theirs:
            assert output.token_ids == plain.token_ids
            assert _said(output) == _said(plain)
            assert output.text_ends == plain.text_ends
            assert output.result is not None
            assert output.result.usage.prompt_tokens == len(prompt)
            _assert_statistics_agree(output)
            _assert_text_ends(output, sampling)
    reasons = {_said(output)["reason"] for output in outputs}
    assert STOP in reasons or not stops
    assert num_drafted(outputs)[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("verification", [REJECTION, BLOCK, COUPLED])
async def test_origins_and_statistics_agree(
    verification: int, text_pair: TextPair, redis: str
) -> None:
    """Of outputs by every method, ended in the middle of blocks by all kinds of stops."""
    stops: Sampling = {"stop_token_ids": [_ab], "stop": ["th", "a你", "cc"]}
    calls = [
        {
            "prompt": _PROMPTS[seed % 4],
            "sampling": {"seed": seed, "max_tokens": 6 + seed, "allowed_token_ids": _ALLOWED}
            | (stops if seed % 3 else {}),
            "gamma": 1 + seed % 7,
            "lookahead": seed % 2,
            "verification": verification,
        }
        for seed in range(60)
    ]
    async with running_stack(
        text_pair.target, text_pair.draft, redis, tokenizer=str(text_pair.target)
    ) as stack:
        outputs = await generate_all(stack, calls)
    for call, output in zip(calls, outputs, strict=True):
        assert _said(output) == _end_of(output.token_ids, call["sampling"])
        assert output.speculation.verification == verification
        assert output.speculation.gamma == call["gamma"]
        _assert_statistics_agree(output)
        _assert_text_ends(output, call["sampling"])
    assert_speculated(outputs)
    assert len({_said(output)["reason"] for output in outputs}) == 2


async def test_only_the_last_chunk_has_the_result(text_pair: TextPair, redis: str) -> None:
    async with running_stack(text_pair.target, text_pair.draft, redis) as stack:
        request = orchestrator_pb2.GenerateRequest()
        request.token_ids.ids.extend([1, 2, 3])
        request.sampling.max_tokens = 30
        request.sampling.ignore_eos = True
        chunks = [chunk async for chunk in stack.client.Generate(request)]
    assert len(chunks) > 1
    assert [chunk.HasField("result") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(chunk.session_id == chunks[0].session_id != "" for chunk in chunks)
    assert all(len(chunk.token_ids) == len(chunk.origins) > 0 for chunk in chunks)


async def test_an_unset_seed_is_drawn_and_reported(text_pair: TextPair, redis: str) -> None:
    """Fresh each time; with it given, `coupled` repeats the output, but for ties: the seed's."""
    sampling = {"max_tokens": 20, "ignore_eos": True}
    async with running_stack(text_pair.target, text_pair.draft, redis) as stack:
        drawn = [
            await stack.generate([1, 2, 3], sampling=sampling, verification=COUPLED)
            for _ in range(3)
        ]
        seeds = [output.result.seed for output in drawn if output.result is not None]
        again = [
            await stack.generate(
                [1, 2, 3], sampling=sampling | {"seed": seed}, verification=COUPLED, gamma=2
            )
            for seed in seeds
        ]
    assert len(set(seeds)) == 3
    assert len({tuple(output.token_ids) for output in drawn}) == 3
    for seed, *both in zip(seeds, drawn, again, strict=True):
        for output in both:
            assert len(output.token_ids) == 20
            given = {**sampling, "seed": seed}
            assert_seeded(text_pair.reference, [1, 2, 3], output.token_ids, given)


@pytest.mark.slow
@pytest.mark.parametrize("has_draft", [False, True])
async def test_who_chooses_gamma(has_draft: bool, text_pair: TextPair, redis: str) -> None:
    """The request, else the server's setting, else the policy; said in result and model info."""
    sampling: Sampling = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
    draft = text_pair.draft if has_draft else None
    for own in (None, 3):
        async with running_stack(text_pair.target, draft, redis, gamma=own) as stack:
            info = await stack.client.GetModelInfo(orchestrator_pb2.GetModelInfoRequest())
            assert (info.default_gamma if info.HasField("default_gamma") else None) == own
            for asked in (None, 0, 2, MAX_GAMMA):
                fields = {} if asked is None else {"gamma": asked}
                stats = (await stack.generate([1, 2, 3], sampling=sampling, **fields)).speculation
                fixed = own if asked is None else asked
                assert stats.HasField("gamma") == (fixed is not None)
                assert stats.gamma == (fixed or 0)
                assert stats.HasField("decision") == (has_draft and fixed != 0)
                assert stats.decision.is_fixed == (has_draft and bool(fixed))
                if stats.HasField("decision"):
                    assert len(stats.decision.survival) == MAX_GAMMA
                    assert len(stats.decision.tokens_per_s) == MAX_GAMMA + 1
                    assert stats.decision.gamma >= stats.decision.waiting_gamma
                if fixed and has_draft:
                    assert stats.decision.gamma == fixed
                    assert max(g for g, n in enumerate(stats.num_rounds_per_gamma) if n) <= fixed


@pytest.mark.parametrize(
    ("field", "value"),
    [("gamma", 17), ("lookahead", 5), ("fan_out", 0), ("fan_out", 65), ("fan_out", 2**32 - 1)],
)
async def test_drafting_out_of_range_is_refused_by_name(field: str, value: int) -> None:
    limits = Limits(
        vocab_size=256,
        max_context_len=512,
        eos_token_ids=(),
        gamma=None,
        max_gamma=MAX_GAMMA,
        lookahead=2,
        fan_out=16,
        default_max_tokens=16,
    )
    with pytest.raises(InvalidRequest) as refused:
        parse_request(request([1, 2], **{field: value}), limits, None)
    assert refused.value.field == field
    largest = {"gamma": 16, "lookahead": 4, "fan_out": 64}
    asked = parse_request(request([1, 2], **largest), limits, None)
    assert (asked.gamma, asked.lookahead, asked.fan_out) == (16, 4, 64)
    unset = parse_request(request([1, 2]), limits, None)
    assert (unset.gamma, unset.lookahead, unset.fan_out) == (None, 2, 16)
