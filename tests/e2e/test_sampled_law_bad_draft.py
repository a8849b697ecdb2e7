"""A token after which the draft's own logits are NaN: the output follows the target's distribution.

The draft proposes the token often. Blocks with it must reach the target like all others: to drop
them would bias the output. Each check has three p-values and fails if one of them is below 1e-6: a
false-alarm probability of 3e-6 at most.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch

from draft_service.tree.draft_session import DraftRow
from tests.e2e.pairs import SpreadPair, sharpened
from tests.e2e.sampled import FALSE_ALARM, METHODS, drawn
from tests.e2e.test_sampled_law_bad_token import SAMPLING, p_values
from tests.e2e.traffic import assert_speculated
from tests.stack import Output, running_stack
from tests.tiny_models import make_tiny_draft

pytestmark = pytest.mark.slow

# The draft is in use up to the first bad token: short outputs, many of them.
OUTPUT_LEN, NUM_OUTPUTS = 4, 1000


@pytest.fixture(scope="module")
def bad_draft(spread_pair: SpreadPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NaN embedding of EOS, which a flat draft proposes with a probability of about 0.25."""
    directory = tmp_path_factory.mktemp("bad_draft") / "draft"
    sharpened(make_tiny_draft(spread_pair.target, directory, noise=0.1), 0.25)
    path = directory / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.embed_tokens.weight"][spread_pair.reference.eos_token_id] = float("nan")
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    return directory


async def outputs_of(
    spread_pair: SpreadPair, bad_draft: Path, redis: str, how: dict[str, int], method: str
) -> list[Output]:
    async with running_stack(spread_pair.target, bad_draft, redis) as stack:
        return await drawn(stack, SAMPLING, METHODS[method], OUTPUT_LEN, NUM_OUTPUTS, how)


@pytest.mark.parametrize(
    ("method", "how"),
    [("rejection", {"gamma": 3}), ("block", {"gamma": 3, "lookahead": 2, "fan_out": 4})],
    ids=str,
)
async def test_the_distribution(
    method: str, how: dict[str, int], bad_draft: Path, spread_pair: SpreadPair, redis: str
) -> None:
    outputs = await outputs_of(spread_pair, bad_draft, redis, how, method)
    assert_speculated(outputs)
    found = p_values(spread_pair, outputs)
    assert min(found.values()) > FALSE_ALARM, str(found)


async def test_dropping_such_blocks_is_caught(
    bad_draft: Path,
    spread_pair: SpreadPair,
    redis: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check above, at its own size, has the power to see it."""
    # As if all were committed: NaN logits then fail the generation.
    monkeypatch.setattr(DraftRow, "is_committed", True)
    outputs = await outputs_of(spread_pair, bad_draft, redis, {"gamma": 3}, "rejection")
    found = p_values(spread_pair, outputs)
    assert min(found.values()) < FALSE_ALARM, f"not caught: {found}"
