"""The commands that start a system of their own, measure, and stop it again."""

from __future__ import annotations

import json
import re

import pytest

from tests.cli.processes import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_demo_finds_identical_outputs() -> None:
    """Exit 0; both ways of the quickstart pair in one table."""
    ended = run("demo", "--inflate=0", "--max-tokens=24", "--rounds=1", "--temperature=1")
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"plain decoding\W+[\d.]+ ", ended.stdout)
    assert "2 outputs each way, identical token for token" in ended.stdout


def test_wire_bytes_by_method() -> None:
    """That they do not grow with the vocabulary: tests/e2e/test_wire.py."""
    ended = run("bench", "wire", "--vocab-sizes=512", "--runs=1", "--max-tokens=32", "--json")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert not told["is_cut"]
    lines = told["results"]
    assert [line["vocab_size"] for line in lines] == [512] * 6
    assert len({(line["method"], line["temperature"]) for line in lines}) == 6
    for line in lines:
        assert line["acceptance_rate"] is not None
        assert line["draft_bytes_per_token"] > 0
        assert line["target_bytes_per_token"] > 0
    coupled, rejection = (
        next(x for x in lines if (x["method"], x["temperature"]) == (method, 1.0))
        for method in ("coupled", "rejection")
    )
    assert coupled["draft_bytes_per_token"] < rejection["draft_bytes_per_token"]


def test_vocabulary_sizes_are_for_own_systems() -> None:
    """A running one has the vocabulary it has."""
    ended = run("bench", "wire", "--endpoint=127.0.0.1:1", "--vocab-sizes=2048")
    assert ended.returncode == 2
    assert "--vocab-sizes: not with --endpoint" in ended.stderr
