"""A token that the target cannot run, and that the draft proposes often: the law is the target's.

EOS has an embedding of NaN, so an output is right until it ends. The law of an output is that of
the same model without the fault. Each check has three p-values and fails where one of them is below
1e-6: a false-alarm probability of 3e-6 at most.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
from scipy import stats

import target_service.verifier
from orchestrator.speculation.verification import Proposal
from target_service.messages import DraftSearch, Verify
from tests.e2e.pairs import PROMPT, SpreadPair, sharpened
from tests.e2e.sampled import FALSE_ALARM, METHODS, drawn, law_p_values
from tests.e2e.traffic import assert_speculated
from tests.stack import Output, running_stack
from tests.tiny_models import make_tiny_draft

pytestmark = pytest.mark.slow

# Few tokens, so that the flat draft proposes the bad one with a chance of about 0.25 everywhere.
SAMPLING = {"ignore_eos": False, "allowed_token_ids": [0, 2, 4, 7]}
OUTPUT_LEN = 12
# As in sampled.py; an output has three or four tokens in the mean.
NUM_OUTPUTS, NUM_PLACES = 280, 700


@pytest.fixture(scope="module")
def bad_target(spread_pair: SpreadPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad") / "target"
    shutil.copytree(spread_pair.target, directory)
    path = directory / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.embed_tokens.weight"][spread_pair.reference.eos_token_id] = float("nan")
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def flat_draft(spread_pair: SpreadPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("flat") / "draft"
    return sharpened(make_tiny_draft(spread_pair.target, directory, noise=0.1), 0.25)


async def outputs_of(
    bad_target: Path, flat_draft: Path, redis: str, how: dict[str, int], method: str
) -> list[Output]:
    async with running_stack(bad_target, flat_draft, redis) as stack:
        return await drawn(stack, SAMPLING, METHODS[method], OUTPUT_LEN, NUM_OUTPUTS, how)


def p_values(spread_pair: SpreadPair, outputs: list[Output]) -> dict[str, float]:
    """Of the whole law, and of how often the bad token comes: what was dropped would show there.

    Less its chance at each token this is a martingale, and close to normal after thousands.
    """
    reference, excess, variance = spread_pair.reference, 0.0, 0.0
    for output in outputs:
        chances = reference.laws(PROMPT, output.token_ids, SAMPLING)[:, reference.eos_token_id]
        excess += output.token_ids.count(reference.eos_token_id) - chances.sum()
        variance += (chances * (1 - chances)).sum()
    found = law_p_values(spread_pair, outputs, SAMPLING, NUM_PLACES)
    return {**found, "bad": float(2 * stats.norm.sf(abs(excess) / math.sqrt(variance)))}


@pytest.mark.parametrize(
    ("method", "how"),
    [("rejection", {"gamma": 3}), ("block", {"gamma": 3, "lookahead": 2, "fan_out": 4})],
    ids=str,
)
async def test_the_law(
    method: str,
    how: dict[str, int],
    bad_target: Path,
    flat_draft: Path,
    spread_pair: SpreadPair,
    redis: str,
) -> None:
    outputs = await outputs_of(bad_target, flat_draft, redis, how, method)
    assert_speculated(outputs)
    found = p_values(spread_pair, outputs)
    assert min(found.values()) > FALSE_ALARM, str(found)


class _WithoutDrafts(DraftSearch):
    """No draft token of such a row is judged: they are dropped for what one of them is."""

    def observe(self, num_drafts: int, *, is_finite: bool) -> bool:
        self.num_good = 0
        return is_finite

    def next_request(self) -> Verify:
        nothing = self.request.draft_token_ids[:0]
        return replace(self.request, draft_token_ids=nothing, supports=None)


@pytest.mark.parametrize("method", ["rejection", "block"])
async def test_dropping_the_draft_tokens_is_caught(
    method: str,
    bad_target: Path,
    flat_draft: Path,
    spread_pair: SpreadPair,
    redis: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check above, at its own size, has the power to see it."""
    monkeypatch.setattr(target_service.verifier, "DraftSearch", _WithoutDrafts)
    monkeypatch.setattr(Proposal, "run_without", lambda self, num: None if num else self)
    outputs = await outputs_of(bad_target, flat_draft, redis, {"gamma": 3}, method)
    found = p_values(spread_pair, outputs)
    assert min(found.values()) < FALSE_ALARM, f"not caught: {found}"
