"""Full self-test on request: a sound engine passes, errors that loading cannot see are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.engine import EngineOptions, load_engine
from outrider.engine.attention.interface import QueryBlock
from outrider.engine.attention.segments import Segment
from outrider_bench.check.engine_cases import SelfTestCase, full_self_test
from tests.tiny_models import make_tiny_model

# The test at each load ends at 320 tokens.
_LATE = 400


def cases(path: Path, **more: Any) -> dict[str, SelfTestCase]:
    return {case.name: case for case in full_self_test(EngineOptions(str(path), **more))}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_engine_passes_every_case(family: str, dtype: str, tmp_path: Path) -> None:
    found = cases(make_tiny_model(family, tmp_path), dtype=dtype)
    assert all(case.is_passed for case in found.values())
    names = list(found)
    assert names[0] == "at load"
    assert sum("tokens: chunks, roll-back, shared pages" in name for name in names) >= 3
    assert [n for n in names if n.startswith("single-token")] == [
        f"single-token steps, batch of {num}" for num in (1, 3, 8)
    ]


def test_a_window_is_crossed(tmp_path: Path) -> None:
    path = make_tiny_model("mistral_window", tmp_path, sliding_window=100)
    assert any(name.startswith("117 tokens:") for name in cases(path))


def test_a_short_context_is_tested_as_far_as_it_goes(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path, max_position_embeddings=60)
    found = cases(path)
    assert all(case.is_passed for case in found.values())
    assert any(name.startswith("60 tokens:") for name in found)


def test_an_error_beyond_the_test_at_load_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mask = make_tiny_model("llama", tmp_path), QueryBlock.mask

    def wrong(block: QueryBlock, group: int, dtype: Any, device: Any) -> torch.Tensor | None:
        return None if block.first > _LATE else mask(block, group, dtype, device)

    monkeypatch.setattr(QueryBlock, "mask", wrong)
    load_engine(EngineOptions(str(path), kv_cache_tokens=256))
    failed = [name for name, case in cases(path).items() if not case.is_passed]
    assert failed == ["512 tokens: chunks, roll-back, shared pages"]


def test_an_error_of_large_batches_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences after the fifth of a step are computed without their first token."""
    path, blocks = make_tiny_model("llama", tmp_path), Segment.blocks

    def wrong(segment: Segment, window: int | None) -> list[QueryBlock]:
        is_late_step = segment.stop - segment.start == 1 and segment.start >= 5
        return [
            replace(block, first_key=block.first_key + 1) if is_late_step else block
            for block in blocks(segment, window)
        ]

    monkeypatch.setattr(Segment, "blocks", wrong)
    load_engine(EngineOptions(str(path), kv_cache_tokens=256))
    failed = [name for name, case in cases(path).items() if not case.is_passed]
    assert failed == ["single-token steps, batch of 8"]
