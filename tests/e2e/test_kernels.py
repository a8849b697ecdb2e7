"""Outputs on weights held in 16 bits are those of float32 arithmetic on the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.engine.loading.linear_kernels import FbgemmFloat16
from outrider.v1 import target_pb2
from tests.e2e.pairs import TinyPair
from tests.e2e.reference import Reference, assert_greedy, assert_seeded
from tests.e2e.traffic import COUPLED, assert_speculated, generate_all, prompt_of
from tests.engine.cpu import cpu_has
from tests.stack import running_stack
from tests.tiny_models import rounded

pytestmark = pytest.mark.slow

_NUM_TOKENS = 20
_SEED = 11


async def test_greedy_and_coupled_outputs_of_a_bfloat16_checkpoint(
    tiny_pair: TinyPair, tmp_path: Path, redis: str
) -> None:
    """Speculated together, and alone without drafts."""
    target = rounded(tiny_pair.target, tmp_path / "target", torch.bfloat16)
    draft = rounded(tiny_pair.draft, tmp_path / "draft", torch.bfloat16)
    reference = Reference(target)
    prompts = [prompt_of(3 + 7 * i) for i in range(4)]
    greedy = {"temperature": 0.0, "max_tokens": _NUM_TOKENS, "ignore_eos": True}
    coupled = {**greedy, "temperature": 0.8, "seed": _SEED}

    def calls(sampling: dict[str, Any], *gammas: int) -> list[dict[str, Any]]:
        return [
            {"prompt": prompt, "sampling": sampling, "verification": COUPLED, "gamma": gamma}
            for prompt in prompts
            for gamma in gammas
        ]

    async with running_stack(target, draft, redis) as stack:
        asked = target_pb2.TargetServiceGetModelInfoRequest()
        kernels = (await stack.target.GetModelInfo(asked)).model.linear_kernels
        speculated = await generate_all(stack, calls(greedy, 3, 5) + calls(coupled, 3, 5))
        plain = [await stack.generate(**call) for call in calls(greedy, 0) + calls(coupled, 0)]
    if cpu_has(FbgemmFloat16):
        assert set(kernels) == {"fbgemm_float16"}
    assert_speculated(speculated)
    assert [o.token_ids for o in speculated] == [o.token_ids for o in plain for _ in range(2)]
    for index, prompt in enumerate(prompts):
        token_ids = plain[index].token_ids
        assert_greedy(reference, prompt, reference.greedy(prompt, _NUM_TOKENS), token_ids)
        assert_seeded(reference, prompt, plain[len(prompts) + index].token_ids, coupled)
