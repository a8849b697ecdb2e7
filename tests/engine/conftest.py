"""Fixtures of the engine tests: one tiny engine per model family for the whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from outrider.engine import Engine, EngineOptions, load_engine
from tests.tiny_models import make_tiny_model

# Three layers, so that a family with windows has both kinds of layers.
NUM_LAYERS = 3


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a family's tiny model, created on first use."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp("models") / family
            made[family] = make_tiny_model(family, path, num_layers=NUM_LAYERS)
        return made[family]

    return get


@pytest.fixture(scope="session")
def engine_of(model_dir: Callable[[str], Path]) -> Callable[..., Engine]:
    """Loaded engine of a family, created on first use."""
    made: dict[str, Engine] = {}

    def get(family: str) -> Engine:
        if family not in made:
            options = EngineOptions(str(model_dir(family)), kv_cache_tokens=1024)
            made[family] = load_engine(options)
        return made[family]

    return get
