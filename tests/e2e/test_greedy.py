"""Greedy output is transformers' own, token for token, whatever is drafted and how."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.reference import Reference, assert_greedy
from tests.e2e.traffic import (
    LENGTH,
    SETTINGS,
    STOP,
    assert_speculated,
    check_setting,
    far_target,
    generate_all,
    prompt_of,
)
from tests.stack import Output, eventually, running_stack
from tests.tiny_models import FAMILIES, make_tiny_draft, make_tiny_model

pytestmark = pytest.mark.slow

_GAMMAS = (0, 1, 3, 5, 8)
_NUM_TOKENS = 20
# Prompts beyond it go in chunks; shorter than the packed rows of a few sessions.
_CHUNK = 24
# From a single token over every border of a chunk to several chunks.
_LENGTHS = (1, 2, 3, 7, 12, 16, 17, 18, 23, 24, 25, 33, 48, 49, 90, 130)
_NOISE = 0.05


def _call(prompt: list[int], gamma: int, lookahead: int, num_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_tokens": num_tokens}
    return {"prompt": prompt, "sampling": sampling, "gamma": gamma, "lookahead": lookahead}


def _how(prompt: list[int], how: dict[str, int], num_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "sampling": {"temperature": 0.0, "max_tokens": num_tokens}, **how}


def _check(
    reference: Reference, prompt: list[int], output: Output, num_tokens: int = _NUM_TOKENS
) -> None:
    expected = reference.greedy(prompt, num_tokens)
    assert_greedy(reference, prompt, expected, output.token_ids)
    assert output.result is not None
    ended = expected[-1] == reference.eos_token_id
    assert output.result.finish_reason == (STOP if ended else LENGTH)
    assert output.result.eos_token_id == (expected[-1] if ended else 0)


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family_alone_and_in_a_crowd(family: str, tmp_path: Path, redis: str) -> None:
    """16 ragged prompts together, half of them with look-ahead, then one alone.

    Plain and with two γ, other ones for the next family; every γ with a family: see below.
    """
    index = FAMILIES.index(family)
    gammas = (0, *(_GAMMAS[1 + (index + i) % 4] for i in (0, 2)))
    target = make_tiny_model(family, tmp_path / "target")
    draft = make_tiny_draft(target, tmp_path / "draft", noise=_NOISE)
    reference = Reference(target)
    prompts = [prompt_of(length) for length in _LENGTHS]
    async with running_stack(
        target, draft, redis, target_settings={"max_step_tokens": _CHUNK}
    ) as stack:
        for gamma in gammas:
            crowd = [_call(prompt, gamma, i % 2, _NUM_TOKENS) for i, prompt in enumerate(prompts)]
            outputs = await generate_all(stack, crowd)
            outputs.append(await stack.generate(**crowd[7]))
            for prompt, output in zip([*prompts, prompts[7]], outputs, strict=True):
                _check(reference, prompt, output)
            if gamma:
                assert_speculated(outputs)


@pytest.mark.timeout(600)
async def test_every_gamma_lookahead_and_fan_out(
    tmp_path: Path, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 sessions of ragged prompts at a time, each with a setting of its own; then each alone."""
    far_target(monkeypatch, 0.005)
    target = make_tiny_model("llama", tmp_path / "target")
    draft = make_tiny_draft(target, tmp_path / "draft", noise=_NOISE)
    reference = Reference(target)
    prompts = [prompt_of(length, seed=1) for length in _LENGTHS]
    async with running_stack(
        target, draft, redis, target_settings={"max_step_tokens": _CHUNK}
    ) as stack:
        num_hits = 0
        # Ever another setting meets a prompt: 16 and their number have no common factor.
        for start in range(0, len(SETTINGS), 8):
            crowd = [SETTINGS[(start + i) % len(SETTINGS)] for i in range(len(prompts))]
            calls = [
                _how(prompt, how, _NUM_TOKENS) for prompt, how in zip(prompts, crowd, strict=True)
            ]
            outputs = await generate_all(stack, calls)
            for prompt, how, output in zip(prompts, crowd, outputs, strict=True):
                _check(reference, prompt, output)
                check_setting(how, output)
            assert_speculated(outputs)
            num_hits += sum(output.speculation.num_lookahead_hits for output in outputs)
        for i, how in enumerate(SETTINGS):
            prompt = prompts[i % len(prompts)]
            output = await stack.generate(**_how(prompt, how, _NUM_TOKENS // 2))
            _check(reference, prompt, output, _NUM_TOKENS // 2)
            check_setting(how, output)
            num_hits += output.speculation.num_lookahead_hits

        one_ahead = {"gamma": 1, "lookahead": 1, "fan_out": 1}

        async def has_hits() -> bool:
            """A draft that has to share its processor may need more tries to be in time."""
            nonlocal num_hits
            if num_hits <= 3:
                output = await stack.generate(**_how(prompts[4], one_ahead, _NUM_TOKENS))
                _check(reference, prompts[4], output)
                num_hits += output.speculation.num_lookahead_hits
            return num_hits > 3

        await eventually(has_hits)


@pytest.mark.parametrize(("vocab_size", "draft_vocab_size"), [(300, 256), (256, 300)])
async def test_padded_vocabularies(
    vocab_size: int, draft_vocab_size: int, tmp_path: Path, redis: str
) -> None:
    """Prompts and outputs have tokens that the draft has no row for, or the reverse."""
    target = make_tiny_model("llama", tmp_path / "target", vocab_size=vocab_size)
    draft = make_tiny_draft(target, tmp_path / "draft", noise=_NOISE, vocab_size=draft_vocab_size)
    reference = Reference(target)
    prompts = [prompt_of(length, vocab_size=vocab_size) for length in _LENGTHS]
    async with running_stack(target, draft, redis) as stack:
        for lookahead in (0, 1):
            calls = [_call(prompt, 4, lookahead, _NUM_TOKENS) for prompt in prompts]
            outputs = await generate_all(stack, calls)
            for prompt, output in zip(prompts, outputs, strict=True):
                _check(reference, prompt, output)
            assert_speculated(outputs)
    if vocab_size > draft_vocab_size:
        emitted = itertools.chain.from_iterable(output.token_ids for output in outputs)
        assert max(emitted) >= draft_vocab_size


@pytest.mark.parametrize("lookahead", [0, 1])
async def test_eos_ends_the_output_wherever_in_a_block_it_falls(
    lookahead: int, tmp_path: Path, redis: str
) -> None:
    """With few tokens EOS comes often: accepted, recovered, as bonus, and as the first token."""
    target = make_tiny_model("llama", tmp_path / "target", vocab_size=12)
    draft = make_tiny_draft(target, tmp_path / "draft", noise=_NOISE)
    reference = Reference(target)
    prompts = [prompt_of(2 + i % 9, vocab_size=12, seed=i) for i in range(48)]
    calls = [_call(prompt, 4, lookahead, 30) for prompt in prompts]
    async with running_stack(target, draft, redis) as stack:
        outputs = await generate_all(stack, calls)
    for prompt, output in zip(prompts, outputs, strict=True):
        _check(reference, prompt, output, 30)
        assert reference.eos_token_id not in output.token_ids[:-1]
    ends = {output.origins[-1] for output in outputs if output.token_ids[-1] == 11}
    assert len(ends) >= 3, "EOS came in too few ways"


async def test_to_the_last_token_of_the_context(tmp_path: Path, redis: str) -> None:
    """Prompts that leave 1 to 12 tokens of a context of 128, all of which are asked for."""
    target = make_tiny_model("llama", tmp_path / "target", max_position_embeddings=128)
    draft = make_tiny_draft(target, tmp_path / "draft", noise=_NOISE)
    reference = Reference(target)
    rooms = [1, 2, 3, 4, 5, 9, 12]
    prompts = [prompt_of(128 - room) for room in rooms]
    calls = [
        _call(prompt, gamma, lookahead, room)
        for gamma, lookahead in ((3, 0), (3, 1), (8, 1))
        for prompt, room in zip(prompts, rooms, strict=True)
    ]
    async with running_stack(
        target, draft, redis, target_settings={"max_step_tokens": _CHUNK}
    ) as stack:
        outputs = await generate_all(stack, calls)
    for call, output in zip(calls, outputs, strict=True):
        _check(reference, call["prompt"], output, call["sampling"]["max_tokens"])
    assert_speculated(outputs)


async def test_a_single_token(tmp_path: Path, redis: str) -> None:
    """max_tokens 1: no draft token could be emitted, so none is verified."""
    target = make_tiny_model("llama", tmp_path / "target")
    draft = make_tiny_draft(target, tmp_path / "draft", noise=_NOISE)
    reference = Reference(target)
    prompts = [prompt_of(length) for length in (1, 30, 200)]
    calls = [_call(prompt, 5, 1, 1) for prompt in prompts]
    async with running_stack(target, draft, redis) as stack:
        outputs = await generate_all(stack, calls)
    for prompt, output in zip(prompts, outputs, strict=True):
        _check(reference, prompt, output, 1)
        assert output.speculation.num_drafts == 0


@pytest.mark.parametrize("lookahead", [0, 1])
async def test_a_conversation_continued(lookahead: int, tmp_path: Path, redis: str) -> None:
    """Each turn goes on from keys and values that both tiers kept of the turns before."""
    target = make_tiny_model("llama", tmp_path / "target")
    draft = make_tiny_draft(target, tmp_path / "draft", noise=_NOISE)
    reference = Reference(target)
    sessions: dict[str, list[int]] = {f"greedy-{lookahead}-{i}": [] for i in range(6)}
    async with running_stack(target, draft, redis) as stack:
        for turn in range(4):
            calls = [
                _call(prompt_of(1 + 5 * turn, seed=i), 1 + i, lookahead, 7 + i)
                | {"session_id": name, "create_session": turn == 0}
                for i, name in enumerate(sessions)
            ]
            outputs = await generate_all(stack, calls)
            for call, output in zip(calls, outputs, strict=True):
                context = sessions[call["session_id"]]
                context += call["prompt"]
                _check(reference, context, output, call["sampling"]["max_tokens"])
                context += output.token_ids
                assert output.result is not None
                assert turn == 0 or output.result.usage.cached_tokens > 0
            assert_speculated(outputs)
