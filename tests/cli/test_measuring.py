"""The commands that start a system of their own, measure, and stop it again."""

from __future__ import annotations

import json
import re

import pytest

from tests.cli.processes import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_the_demo_finds_identical_outputs() -> None:
    """Exit 0; both ways of the quickstart pair in one table."""
    ended = run("demo", "--inflate=0", "--max-tokens=24", "--rounds=1", "--temperature=1")
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"plain decoding\W+[\d.]+ ", ended.stdout)
    assert "2 outputs each way, identical token for token" in ended.stdout


def test_wire_bytes_do_not_grow_with_the_vocabulary() -> None:
    """Sixteen times the vocabulary, not twice the bytes.

    Without look-ahead: how many proposals are drafted ahead in vain depends on timing.
    """
    sizes = ("--vocab-sizes=512,8192", "--lookahead=0")
    ended = run("bench", "wire", *sizes, "--runs=2", "--max-tokens=64", "--json")
    assert ended.returncode == 0, ended.stderr
    lines = json.loads(ended.stdout)
    assert [line["vocab_size"] for line in lines] == [512] * 6 + [8192] * 6
    for small, large in zip(lines[:6], lines[6:], strict=True):
        assert large["acceptance_rate"] is not None
        for link in ("draft_bytes_per_token", "target_bytes_per_token"):
            assert large[link] < 2 * small[link], (small, large)


def test_vocabulary_sizes_are_for_own_systems() -> None:
    """A running one has the vocabulary it has."""
    ended = run("bench", "wire", "--endpoint=127.0.0.1:1", "--vocab-sizes=2048")
    assert ended.returncode == 2
    assert "--vocab-sizes: not with --endpoint" in ended.stderr
