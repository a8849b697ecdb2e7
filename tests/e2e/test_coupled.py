"""With `coupled`, the output is the target's own seeded sample: a function of the seed alone.

The same tokens whatever γ, look-ahead, company and fate of the draft, and the same as Gumbel-max by
hand on Hugging Face's logits.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import draft_service.app
from orchestrator.replicas import draft_client as draft_link
from orchestrator.replicas.target_client import TargetHandle
from orchestrator.speculation.verification import Proposal, VerifyResult
from outrider.cli.relay import Relay
from outrider.settings.services import DraftConfig
from outrider.v1 import orchestrator_pb2
from tests.e2e.pairs import CASES, PROMPT, SpreadPair, TinyPair
from tests.e2e.reference import Reference, Sampling, assert_seeded
from tests.e2e.traffic import (
    ACCEPTED,
    BLOCK,
    COUPLED,
    PLAIN,
    REJECTION,
    SETTINGS,
    assert_speculated,
    check_setting,
    far_target,
    generate_all,
    prompt_of,
)
from tests.stack import KV_TOKENS, Output, Stack, eventually, request, running_stack
from tests.tiny_models import make_tiny_draft, make_tiny_model

pytestmark = pytest.mark.slow

_NUM_TOKENS = 20

_SAMPLINGS: list[Sampling] = [
    {"temperature": 0.7, "seed": 11},
    {"temperature": 1.0, "seed": 2**63 + 12},
    {"temperature": 0.7, "top_p": 0.8, "seed": 13},
    {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.7, "repetition_penalty": 1.2}
    | {"frequency_penalty": 0.2, "seed": 14},
]


def _call(
    prompt: list[int], sampling: Sampling, num_tokens: int = _NUM_TOKENS, **fields: Any
) -> dict[str, Any]:
    given = {"ignore_eos": True, **sampling, "max_tokens": num_tokens}
    return {"prompt": prompt, "sampling": given, "verification": COUPLED, **fields}


@pytest.mark.timeout(600)
async def test_no_setting_changes_a_token(
    tiny_pair: TinyPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every γ, look-ahead and fan-out; alone, and with 15 others of other settings."""
    far_target(monkeypatch, 0.003)
    prompts = [prompt_of(3 + 5 * i) for i in range(len(_SAMPLINGS))]
    asked = list(zip(prompts, _SAMPLINGS, strict=True))
    outputs: list[list[Output]] = [[] for _ in asked]
    async with running_stack(tiny_pair.target, tiny_pair.draft, redis) as stack:
        for start in range(0, len(SETTINGS), 12):
            calls = []
            for i in range(16):  # each asked for four times at once
                prompt, sampling = asked[i % len(asked)]
                how = SETTINGS[(start + i + i // len(asked)) % len(SETTINGS)]
                calls.append(_call(prompt, sampling, **how))
            for i, output in enumerate(await generate_all(stack, calls)):
                outputs[i % len(asked)].append(output)
        for number, how in enumerate(SETTINGS):
            prompt, sampling = asked[number % len(asked)]
            output = await stack.generate(**_call(prompt, sampling, **how))
            check_setting(how, output)
            outputs[number % len(asked)].append(output)
    for (prompt, sampling), theirs in zip(asked, outputs, strict=True):
        assert {tuple(output.token_ids) for output in theirs} == {tuple(theirs[0].token_ids)}
        assert_seeded(tiny_pair.reference, prompt, theirs[0].token_ids, sampling)
        assert_speculated(theirs)


@pytest.mark.parametrize("case", CASES)
async def test_every_processor_by_hand(case: str, spread_pair: SpreadPair, redis: str) -> None:
    """The draft is far off, so that most blocks end early; EOS and stop tokens end outputs."""
    sampling = {"ignore_eos": True, **CASES[case]}
    calls = [
        _call(PROMPT, {**sampling, "seed": seed}, gamma=1 + seed % 6, lookahead=seed % 2)
        for seed in range(24)
    ]
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await generate_all(stack, calls)
    for seed, output in enumerate(outputs):
        assert_seeded(spread_pair.reference, PROMPT, output.token_ids, {**sampling, "seed": seed})
        assert len(output.token_ids) == _NUM_TOKENS or case in ("stops", "all")
    assert_speculated(outputs)


@pytest.mark.parametrize("verification", [REJECTION, BLOCK, COUPLED])
async def test_a_draft_that_knows_none_of_the_allowed_tokens(
    verification: int, tmp_path: Path, redis: str
) -> None:
    """Its distribution is empty. It may propose what it will; it costs speed, not the output."""
    target = make_tiny_model("llama", tmp_path / "target", vocab_size=300, scale=0.5)
    draft = make_tiny_draft(target, tmp_path / "draft", vocab_size=256)
    allowed = list(range(256, 299))
    calls = [
        _call([1, 280, 3], {"seed": seed, "allowed_token_ids": allowed}, gamma=3)
        | {"verification": verification}
        for seed in range(6)
    ]
    async with running_stack(target, draft, redis) as stack:
        outputs = await generate_all(stack, calls)
        assert (await stack.generate([1, 2], gamma=3)).speculation.num_drafts > 0
    reference = Reference(target)
    for call, output in zip(calls, outputs, strict=True):
        assert len(output.token_ids) == _NUM_TOKENS
        assert set(output.token_ids) <= set(allowed)
        if verification == COUPLED:
            assert_seeded(reference, call["prompt"], output.token_ids, call["sampling"])


class DraftProcess:
    """`python -m draft_service` on a free port, ended by SIGKILL."""

    def __init__(self, model: Path) -> None:
        self.port = 0
        flags = {"model": model, "port": 0, "kv-cache-tokens": KV_TOKENS, "num-threads": 1}
        self._command = [sys.executable, "-m", "draft_service"]
        self._command += [f"--{name}={value}" for name, value in flags.items()]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(200):
            while not (line := await self._process.stdout.readline()).startswith(b"listening"):
                assert line, "the draft ended"
        self.port = int(line.rpartition(b":")[2])

    async def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGKILL)
            await process.wait()


class Rounds:
    """Every generation makes as many as are allowed, and waits for its next verdict till more are.

    Each brings one token at least.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_allowed: int) -> None:
        self._num_allowed = num_allowed
        self._more = asyncio.Event()
        num_made: Counter[TargetHandle] = Counter()
        reply = TargetHandle.reply

        async def held_reply(
            handle: TargetHandle, proposal: Proposal | None, timeout_s: float
        ) -> VerifyResult:
            while num_made[handle] >= self._num_allowed:
                await self._more.wait()
            num_made[handle] += 1
            return await reply(handle, proposal, timeout_s)

        monkeypatch.setattr(TargetHandle, "reply", held_reply)

    def allow(self, num: int) -> None:
        """Allows `num` rounds in all to each generation."""
        self._num_allowed = num
        self._more.set()
        self._more = asyncio.Event()


class Running:
    """A call under way."""

    def __init__(self, stack: Stack, call: dict[str, Any]) -> None:
        self.output = Output()
        self._chunks = stack.client.Generate(request(**call), timeout=200)

    async def until(self, is_enough: Callable[[Output], bool]) -> Output:
        """Reads till then, or to the end."""
        async for chunk in self._chunks:
            self.output.add(chunk)
            if self.output.result is None and is_enough(self.output):
                break
        return self.output


def _has_begun(output: Output) -> bool:
    return len(output.token_ids) >= 20


def _goes_without(output: Output) -> bool:
    return output.origins[-3:] == [PLAIN] * 3


def _never(output: Output) -> bool:
    return False


async def test_a_draft_that_is_killed_and_comes_back_changes_no_token(
    tiny_pair: TinyPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes while outputs are half-way, and is back, elsewhere, before the long one ends."""
    monkeypatch.setattr(draft_link, "RETRY_S", 0.0)  # after that the long one would have ended
    rounds = Rounds(monkeypatch, 20)
    sampling = {"temperature": 1.0, "top_p": 0.95, "presence_penalty": 0.3}
    prompts = [prompt_of(4 + 3 * i) for i in range(5)]
    num_tokens = [300, 60, 100, 150, 200]
    calls = [
        _call(prompts[i], {**sampling, "seed": i}, num_tokens[i], gamma=4, lookahead=i % 2)
        for i in range(len(prompts))
    ]
    draft = DraftProcess(tiny_pair.draft)
    config = DraftConfig(model=str(tiny_pair.draft), port=0, kv_cache_tokens=KV_TOKENS)
    async with contextlib.AsyncExitStack() as drafts:
        drafts.push_async_callback(draft.kill)
        await draft.start()
        way = await drafts.enter_async_context(
            Relay("127.0.0.1", 0, "127.0.0.1", draft.port, delay_s=0.0)
        )
        async with running_stack(
            tiny_pair.target, None, redis, draft_endpoint=way.address
        ) as stack:

            async def has_draft() -> bool:
                info = await stack.client.GetModelInfo(orchestrator_pb2.GetModelInfoRequest())
                return bool(info.HasField("draft"))

            async def has_none() -> bool:
                return not await has_draft()

            running = [Running(stack, call) for call in calls]
            await asyncio.gather(*(generation.until(_has_begun) for generation in running))
            await draft.kill()
            await eventually(has_none)
            rounds.allow(30)
            await running[0].until(_goes_without)
            successor = await drafts.enter_async_context(draft_service.app.serving(config))
            way.retarget("127.0.0.1", successor.port)
            await eventually(has_draft)
            rounds.allow(1000)
            outputs = await asyncio.gather(*(generation.until(_never) for generation in running))
    for i, output in enumerate(outputs):
        assert len(output.token_ids) == num_tokens[i]
        assert_seeded(tiny_pair.reference, prompts[i], output.token_ids, {**sampling, "seed": i})
    assert_was_without_a_draft(outputs[0])


def assert_was_without_a_draft(output: Output) -> None:
    """Speculated, then not for a while, then again."""
    origins = "".join("p" if origin == PLAIN else "." for origin in output.origins)
    start = origins.find("ppp")
    assert start > 0, "killed too late"
    back = origins.find(".", start)
    assert ACCEPTED in output.origins[:start]
    assert back > 0, "never came back"
    assert ACCEPTED in output.origins[back:]
