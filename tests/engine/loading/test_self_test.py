"""Long self-test: errors planted in the engine are found at load and the model is refused.

None of them affects the first tokens, which the short self-test covers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import outrider.engine.loading.long_self_test
from outrider.engine import Engine, EngineOptions, load_engine
from outrider.engine.attention.interface import QueryBlock
from outrider.engine.attention.segments import Segment
from outrider.engine.kv.store import PAGE_SIZE, KVStore
from outrider.errors import ModelError
from tests.tiny_models import make_tiny_model

WINDOW = 200
WRONG = "not served correctly"


def load(path: Path) -> Engine:
    return load_engine(EngineOptions(str(path), kv_cache_tokens=256))


@pytest.fixture(scope="module")
def window_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("window") / "m"
    return make_tiny_model("mistral_window", path, sliding_window=WINDOW)


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_window_off_by_one_is_found(
    off_by: int, window_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(window_dir).info.self_test_max_difference < 1e-3
    of = QueryBlock.of

    def wrong(first: int, last: int, window: int | None) -> QueryBlock:
        return of(first, last, None if window is None else window + off_by)

    monkeypatch.setattr(QueryBlock, "of", wrong)
    with pytest.raises(ModelError, match=WRONG):
        load(window_dir)


def test_a_missing_window_is_found(window_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = QueryBlock.of
    monkeypatch.setattr(QueryBlock, "of", lambda first, last, window: of(first, last, None))
    with pytest.raises(ModelError, match=WRONG):
        load(window_dir)


def test_a_wrong_page_is_found(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the later pages of a sequence whose pages are not consecutive."""
    page_ids = KVStore.page_ids

    def wrong(store: KVStore, sequence: Any, num_tokens: int) -> np.ndarray:
        pages = page_ids(store, sequence, num_tokens).copy()
        if len(pages) > 10:
            pages[8] = pages[0]
        return pages

    monkeypatch.setattr(KVStore, "page_ids", wrong)
    monkeypatch.setattr(
        "outrider.engine.attention.shared_prefix._MIN_PREFIX", 10**9
    )  # gathers all pages
    with pytest.raises(ModelError, match=WRONG):
        load(model_dir("llama"))


def test_keys_in_a_wrong_row_are_found(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys and values of the last token of a page are written to the next page."""
    slots = KVStore.slots

    def wrong(store: KVStore, sequence: Any, start: int, stop: int) -> np.ndarray:
        found = slots(store, sequence, start, stop).copy()
        late = np.arange(start, stop)
        found[(late % PAGE_SIZE == PAGE_SIZE - 1) & (late > 100)] += 1
        return found

    monkeypatch.setattr(KVStore, "slots", wrong)
    with pytest.raises(ModelError, match=WRONG):
        load(model_dir("llama"))


def test_a_wrong_query_block_is_found(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions from 256 on miss one key."""
    blocks = Segment.blocks

    def wrong(segment: Segment, window: int | None) -> list[QueryBlock]:
        return [
            block if block.last < 256 else QueryBlock(block.first, block.last, 1, block.window)
            for block in blocks(segment, window)
        ]

    monkeypatch.setattr(Segment, "blocks", wrong)
    with pytest.raises(ModelError, match=WRONG):
        load(model_dir("llama"))


def test_a_missing_mask_at_late_positions_is_found(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = QueryBlock.mask

    def wrong(block: QueryBlock, group: int, dtype: Any, device: Any) -> torch.Tensor | None:
        made = mask(block, group, dtype, device)
        return None if block.first > 250 else made

    monkeypatch.setattr(QueryBlock, "mask", wrong)
    with pytest.raises(ModelError, match=WRONG):
        load(model_dir("llama"))


def test_a_window_too_long_to_test_is_logged(
    window_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outrider.engine.loading.long_self_test, "_BUDGET_S", 1e-6)
    with caplog.at_level(logging.WARNING):
        assert load(window_dir).info.max_context_len == 512
    assert f"sliding window of {WINDOW} tokens is not checked" in caplog.text


@pytest.mark.parametrize("length", [2, 3, 16, 17, 24, 25, 41, 42, 65, 100])
def test_contexts_of_any_length(length: int, tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path / "m", max_position_embeddings=512)
    options = EngineOptions(str(path), kv_cache_tokens=256, max_model_len=length)
    assert load_engine(options).info.max_context_len == length


def test_tokens_with_nan_embeddings_are_not_used(tmp_path: Path) -> None:
    """Half of the embeddings are NaN: the others are served and tested."""
    path = make_tiny_model("llama", tmp_path / "m")
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[::2] = torch.nan
    model.save_pretrained(path)
    assert load(path).info.self_test_max_difference < 1e-3
