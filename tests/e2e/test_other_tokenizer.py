"""A draft with another tokenizer re-encodes the text: the output is the target's own, as ever.

Its proposals are deterministic: with rejection and block verification their support is the token
itself. Each check of a distribution has two p-values and fails if one of them is below 1e-6: a
false-alarm probability of 2e-6 at most.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import draft_service.tree.text_tree
from draft_service.messages import SupportWeights
from outrider.quickstart_pair import DRAFT_PATH, TARGET_PATH
from tests.e2e.law_tests import p_values, places
from tests.e2e.pairs import CASES, PROMPT, OtherTokenizerPair
from tests.e2e.reference import Sampling, assert_greedy, assert_seeded
from tests.e2e.sampled import FALSE_ALARM, METHODS, drawn
from tests.e2e.traffic import assert_speculated, generate_all
from tests.stack import Output, Stack, running_stack

pytestmark = pytest.mark.slow

NUM_TOKENS = 24
# Outputs of a check, and how many of all their tokens are judged.
NUM_OUTPUTS, NUM_PLACES = 200, 4000
HOWS: list[dict[str, int]] = [{"gamma": 3, "lookahead": 0}, {"gamma": 3, "lookahead": 2}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> OtherTokenizerPair:
    return OtherTokenizerPair(tmp_path_factory.mktemp("other_tokenizer"))


@contextlib.asynccontextmanager
async def serving(pair: OtherTokenizerPair, redis: str, **settings: Any) -> AsyncIterator[Stack]:
    reencoding = {"target_tokenizer": str(pair.target)}
    async with running_stack(
        pair.target,
        pair.draft,
        redis,
        draft_settings=reencoding,
        assume_same_vocabulary=False,
        **settings,
    ) as stack:
        yield stack


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(7, size=1 + i % 9).tolist() for i in range(24)]


async def test_greedy_output_is_the_targets_own(pair: OtherTokenizerPair, redis: str) -> None:
    async with serving(pair, redis) as stack:
        for how in (*HOWS, {"gamma": 1, "lookahead": 1}, {"gamma": 8, "lookahead": 4}):
            sampling = {"temperature": 0.0, "max_tokens": NUM_TOKENS}
            calls = [{"prompt": prompt, "sampling": sampling, **how} for prompt in prompts()]
            outputs = await generate_all(stack, calls)
            for prompt, output in zip(prompts(), outputs, strict=True):
                expected = pair.reference.greedy(prompt, NUM_TOKENS)
                assert_greedy(pair.reference, prompt, expected, output.token_ids)
            assert_speculated(outputs)


async def test_a_conversation_goes_on_from_its_text(pair: OtherTokenizerPair, redis: str) -> None:
    """The draft's own tokens of the turns before are cached, and found by their common prefix."""
    context: list[int] = []
    async with serving(pair, redis) as stack:
        for turn in range(4):
            fields = {"session_id": "other-tokenizer", "create_session": turn == 0, "gamma": 3}
            sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
            context += PROMPT
            output = await stack.generate(PROMPT, sampling=sampling, **fields)
            for index, token_id in enumerate(output.token_ids):
                row = pair.reference.logits([*context, *output.token_ids[:index]])[-1]
                assert row[token_id] > row.max() - 1e-4
            context += output.token_ids
        load = await stack.draft_load()
    assert load.num_prefill_tokens_total < len(context) * 2


@pytest.mark.parametrize("case", ["all", "stops"])
async def test_coupled_output_is_that_of_the_seed(
    case: str, pair: OtherTokenizerPair, redis: str
) -> None:
    sampling = {"ignore_eos": True, **CASES[case]}
    calls: list[dict[str, Any]] = [
        {
            "prompt": PROMPT,
            "sampling": {**sampling, "seed": seed, "max_tokens": NUM_TOKENS},
            "verification": METHODS["coupled"],
            "gamma": 1 + seed % 6,
            "lookahead": seed % 3,
        }
        for seed in range(24)
    ]
    async with serving(pair, redis) as stack:
        outputs = await generate_all(stack, calls)
    for seed, output in enumerate(outputs):
        assert_seeded(pair.reference, PROMPT, output.token_ids, {**sampling, "seed": seed})
    assert_speculated(outputs)


def law_p_values(
    pair: OtherTokenizerPair, outputs: Sequence[Output], sampling: Sampling
) -> dict[str, float]:
    """Likely tokens first: they are what a deterministic draft proposes."""
    ids = [output.token_ids for output in outputs]
    laws = pair.reference.laws_of(PROMPT, ids, {"ignore_eos": True, **sampling})
    found = [places(law, ids[seed], law, seed) for seed, law in enumerate(laws)]
    return p_values(found, NUM_PLACES)


@pytest.mark.parametrize(
    ("case", "method", "how"),
    [
        ("plain", "rejection", HOWS[0]),
        ("penalties", "block", HOWS[1]),
    ],
    ids=str,
)
async def test_sampled_output_follows_the_targets_distribution(
    case: str, method: str, how: dict[str, int], pair: OtherTokenizerPair, redis: str
) -> None:
    async with serving(pair, redis) as stack:
        outputs = await drawn(stack, CASES[case], METHODS[method], NUM_TOKENS, NUM_OUTPUTS, how)
    assert_speculated(outputs)
    found = law_p_values(pair, outputs, CASES[case])
    assert min(found.values()) > FALSE_ALARM, str(found)


@pytest.mark.parametrize("method", ["rejection", "block"])
async def test_a_wrong_support_is_caught(
    method: str, pair: OtherTokenizerPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above, at its own size, has the power to see it."""

    def quarter(token_id: int) -> SupportWeights:
        """As if the token had been sampled with probability 1/4."""
        ids = (token_id + np.arange(4)) % 8
        return SupportWeights(ids, np.full(4, 0.25, np.float32))

    monkeypatch.setattr(draft_service.tree.text_tree, "_certain", quarter)
    async with serving(pair, redis) as stack:
        outputs = await drawn(stack, {}, METHODS[method], NUM_TOKENS, NUM_OUTPUTS, HOWS[0])
    found = law_p_values(pair, outputs, {})
    assert min(found.values()) < FALSE_ALARM, f"not caught: {found}"


def with_permuted_ids(draft: Path, directory: Path) -> Path:
    """The draft with other ids for its ordinary tokens: another tokenizer, the same text."""
    shutil.copytree(draft, directory)
    path = directory / "tokenizer.json"
    told = json.loads(path.read_text("utf-8"))
    vocab = told["model"]["vocab"]
    added = {token["id"] for token in told["added_tokens"]}
    ids = np.arange(max(vocab.values()) + 1)
    ordinary = [i for i in ids if i not in added]
    ids[ordinary] = np.random.default_rng(0).permutation(ordinary)
    told["model"]["vocab"] = {token: int(ids[i]) for token, i in vocab.items()}
    path.write_text(json.dumps(told), "utf-8")
    rows = torch.from_numpy(np.argsort(ids))
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & weights.keys():
        weights[name] = weights[name][rows].clone()
    safetensors.torch.save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.timeout(600)
async def test_the_quickstart_draft_is_as_good_with_other_ids(tmp_path: Path, redis: str) -> None:
    """Greedy: re-encoding costs no acceptance on real text. Coupled: the same tokens."""
    target, draft = Path(TARGET_PATH), Path(DRAFT_PATH)
    permuted = with_permuted_ids(draft, tmp_path / "permuted")
    kinds = {"greedy": {"temperature": 0.0}, "coupled": {"temperature": 1.0, "seed": 7}}
    found: list[dict[str, Output]] = []
    for model, settings in ((draft, {}), (permuted, {"target_tokenizer": str(target)})):
        async with running_stack(
            target,
            model,
            redis,
            draft_settings=settings,
            tokenizer=str(target),
            assume_same_vocabulary=False,
            draft_wait="always",
            draft_wait_ms=None,
        ) as stack:
            outputs = await generate_all(
                stack,
                [
                    {
                        "prompt": "class Stack:\n    def __init__(self):",
                        "sampling": {**sampling, "max_tokens": 32, "ignore_eos": True},
                        "verification": METHODS["coupled"],
                        "gamma": 4,
                        "lookahead": 0,
                    }
                    for sampling in kinds.values()
                ],
            )
        found.append(dict(zip(kinds, outputs, strict=True)))
    shared, reencoded = found
    for kind in kinds:
        assert reencoded[kind].token_ids == shared[kind].token_ids
    rates = [each["greedy"].speculation.acceptance_rate for each in (shared, reencoded)]
    assert rates[1] > rates[0] - 0.1 > 0.3, rates
