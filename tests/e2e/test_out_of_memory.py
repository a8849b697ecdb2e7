"""Passes that do not fit into memory: their requests run again in smaller ones, with the same text.

Errors of the allocator, raised inside the models, limit the tokens that a pass can take.
"""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from structlog.testing import capture_logs

from tests.e2e.reference import Reference, assert_greedy
from tests.e2e.traffic import generate_all, prompt_of
from tests.engine.test_step_memory import ERRORS, failing_above
from tests.stack import running_stack
from tests.tiny_models import make_tiny_draft, make_tiny_model

pytestmark = pytest.mark.slow

_NUM_TOKENS = 12
_SETTINGS = {"max_step_tokens": 64}


async def test_requests_are_served_in_smaller_passes(tmp_path: Path, redis: str) -> None:
    """Target and draft lower their limits until passes fit; no client notices."""
    target = make_tiny_model("llama", tmp_path / "target")
    draft = make_tiny_draft(target, tmp_path / "draft")
    reference = Reference(target)
    prompts = [prompt_of(length) for length in (130, 7, 90, 60)]
    expected = [reference.greedy(prompt, _NUM_TOKENS) for prompt in prompts]
    sampling = {"temperature": 0.0, "max_tokens": _NUM_TOKENS}
    async with running_stack(
        target, draft, redis, target_settings=_SETTINGS, draft_settings=_SETTINGS
    ) as stack:
        with capture_logs() as logs, failing_above(24, ERRORS["cuda"]):
            calls = [{"prompt": prompt, "sampling": sampling, "gamma": 3} for prompt in prompts]
            outputs = await generate_all(stack, calls)
        for prompt, tokens, output in zip(prompts, expected, outputs, strict=True):
            assert_greedy(reference, prompt, tokens, output.token_ids)
    lowered = [entry for entry in logs if entry["event"] == "step_out_of_memory"]
    assert lowered
    assert all("CUDA out of memory" in entry["why"] for entry in lowered)
    assert min(entry["max_step_tokens"] for entry in lowered) >= 16


async def test_a_device_without_memory_for_any_pass_is_reported(tmp_path: Path, redis: str) -> None:
    target = make_tiny_model("llama", tmp_path / "target")
    async with running_stack(target, None, redis, target_settings=_SETTINGS) as stack:
        sampling = {"temperature": 0.0, "max_tokens": 2}
        with failing_above(0, ERRORS["cpu"]), pytest.raises(grpc.aio.AioRpcError) as failed:
            await stack.generate(prompt_of(5), sampling=sampling)
        assert failed.value.code() is grpc.StatusCode.INTERNAL
