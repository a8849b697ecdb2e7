"""How many bytes travel between the tiers for a token: those of the vocabulary do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.traffic import BLOCK, COUPLED, REJECTION, assert_speculated, generate_all, prompt_of
from tests.stack import running_stack
from tests.tiny_models import make_tiny_draft, make_tiny_model

pytestmark = pytest.mark.slow

_GAMMA = 4
_NUM_TOKENS = 40
_METHODS = {"rejection": REJECTION, "block": BLOCK, "coupled": COUPLED}


async def _bytes_per_token(directory: Path, vocab_size: int, redis: str) -> dict[str, float]:
    """On both links, both ways, everything included; per method.

    The laws are so flat that the draft's support is full (32 tokens) for either vocabulary, and
    nothing is drafted ahead for an outcome that does not come.
    """
    target = make_tiny_model(
        "llama",
        directory / f"target{vocab_size}",
        vocab_size=vocab_size,
        scale=0.15,
        hidden_size=32,
    )
    draft = make_tiny_draft(target, directory / f"draft{vocab_size}", noise=0.02)
    found = {}
    async with running_stack(target, draft, redis) as stack:
        for name, verification in _METHODS.items():
            calls = [
                {
                    "prompt": prompt_of(8, seed=seed),
                    "sampling": {"max_tokens": _NUM_TOKENS, "ignore_eos": True, "seed": seed},
                    "gamma": _GAMMA,
                    "lookahead": 0,
                    "verification": verification,
                }
                for seed in range(3)
            ]
            outputs = await generate_all(stack, calls)
            assert_speculated(outputs)
            stats = [output.speculation for output in outputs]
            num_bytes = sum(s.draft_wire_bytes + s.target_wire_bytes for s in stats)
            num_verified = sum(s.num_draft_tokens + s.num_rounds for s in stats)
            found[name] = num_bytes / num_verified
            num_emitted = sum(len(output.token_ids) for output in outputs)
            print(
                f"vocabulary {vocab_size}, {name}: {num_bytes / num_emitted:.0f} bytes per emitted "
                f"token, {num_bytes / num_verified:.0f} per verified position"
            )
    return found


async def test_bytes_do_not_grow_with_the_vocabulary(tmp_path: Path, redis: str) -> None:
    """128 times the vocabulary. Per verified position, for acceptance differs between the pairs."""
    small = await _bytes_per_token(tmp_path, 256, redis)
    large = await _bytes_per_token(tmp_path, 32_768, redis)
    for name in _METHODS:
        assert large[name] < 1.3 * small[name], f"{name}: {small[name]:.0f} to {large[name]:.0f}"
    for found in (small, large):
        assert found["coupled"] < 0.25 * found["rejection"]
        assert found["block"] == pytest.approx(found["rejection"], rel=0.3)
    # A full row of float32 would be 131,072.
    assert large["rejection"] < 1000
