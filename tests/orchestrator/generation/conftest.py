"""Fixtures of the tests of generations."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.tokenizer import Tokenizer
from tests.services.tokenizer_files import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    tokenizer = Tokenizer.load(str(directory))
    assert tokenizer is not None
    return tokenizer
