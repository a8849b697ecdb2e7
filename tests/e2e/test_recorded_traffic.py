"""Recorded traffic: what the services generated, with the target's own probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from orchestrator.traffic.record import FORMAT, read_records
from tests.e2e.pairs import TinyPair
from tests.e2e.traffic import BLOCK, COUPLED, REJECTION, generate_all, prompt_of
from tests.stack import eventually, running_stack

_NUM_TOKENS = 24
_TOP = 5
_CALLS: list[dict[str, Any]] = [
    {
        "prompt": prompt_of(length),
        "sampling": {"ignore_eos": True, "max_tokens": _NUM_TOKENS, "seed": 5, **sampling},
        "verification": verification,
        "gamma": gamma,
    }
    for length, gamma, verification, sampling in (
        (4, 3, REJECTION, {"temperature": 0.0}),
        (9, 3, REJECTION, {"temperature": 0.8, "logprobs": 2}),
        (14, 4, BLOCK, {"top_p": 0.9, "logprobs": 0}),
        (19, 2, COUPLED, {"temperature": 1.2, "presence_penalty": 0.5}),
        (24, 0, REJECTION, {"temperature": 0.0}),
    )
]


async def test_records_have_the_targets_probabilities_at_each_position(
    tiny_pair: TinyPair, redis: str, tmp_path: Path
) -> None:
    """Of every generation, whatever its verification, and nothing of it reaches the client."""

    async def are_written() -> bool:
        return len(list(read_records(tmp_path))) == len(_CALLS)

    async with running_stack(
        tiny_pair.target, tiny_pair.draft, redis,
        traffic_dir=str(tmp_path), traffic_share=1.0, traffic_top_tokens=_TOP,
    ) as stack:  # fmt: skip
        outputs = await generate_all(stack, _CALLS)
        await eventually(are_written)
    records = {len(record["prompt_token_ids"]): record for record in read_records(tmp_path)}
    num_drafts = 0
    for call, output in zip(_CALLS, outputs, strict=True):
        record = records[len(call["prompt"])]
        assert record["format"] == FORMAT
        assert record["prompt_token_ids"] == call["prompt"]
        assert record["output_token_ids"] == output.token_ids
        assert (record["finish"], record["num_cut"]) == ("length", 0)
        assert record["model"]
        logits = tiny_pair.reference.output_logits(call["prompt"], output.token_ids)
        rows = log_softmax(logits, axis=-1)
        top_ids = np.array(record["top_token_ids"])
        assert top_ids.shape == (_NUM_TOKENS, _TOP)
        top_logprobs = np.take_along_axis(rows, top_ids, axis=-1)
        np.testing.assert_allclose(record["top_logprobs"], top_logprobs, atol=2e-4)
        np.testing.assert_allclose(top_logprobs[:, 0], rows.max(axis=-1), atol=2e-4)
        assert len(record["draft_token_ids"]) == _NUM_TOKENS
        num_drafts += sum(token_id is not None for token_id in record["draft_token_ids"])
        num_logprobs = call["sampling"].get("logprobs")
        assert [len(given.top_ids) for given in output.logprobs] == (
            [] if num_logprobs is None else [num_logprobs] * _NUM_TOKENS
        )
    assert num_drafts > 0
    assert all(token_id is None for token_id in records[24]["draft_token_ids"])


@pytest.mark.parametrize("share", [None, 1e-9])
async def test_nothing_is_recorded_unless_asked_for(
    share: float | None, tiny_pair: TinyPair, redis: str, tmp_path: Path
) -> None:
    """Off by default, and only of the share of generations that is sampled."""
    settings = {} if share is None else {"traffic_dir": str(tmp_path), "traffic_share": share}
    async with running_stack(tiny_pair.target, None, redis, **settings) as stack:
        await stack.generate([1, 2, 3], sampling={"max_tokens": 2})
    assert list(read_records(tmp_path)) == []
