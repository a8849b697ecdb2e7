"""`outrider demo` and `outrider bench wire`, which start their own systems."""

from __future__ import annotations

import json
import re

import pytest

from tests.cli.processes import here, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_demo_outputs_are_identical_with_and_without_drafts() -> None:
    """Exit status 0, and a table with both rates."""
    ended = run("demo", "--inflate=0", "--max-tokens=24", "--rounds=1", "--temperature=1")
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"plain, T = 1\W+[\d.]+ ", ended.stdout)
    assert "2 outputs each way, identical token for token" in ended.stdout


def test_wire_reports_bytes_by_verification_method() -> None:
    """tests/e2e/test_wire.py tests that they do not grow with the vocabulary."""
    ended = run("bench", "wire", "--vocab-sizes=512", "--runs=1", "--max-tokens=32", "--json")
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert not document["is_cut"]
    rows = document["results"]
    assert [row["vocab_size"] for row in rows] == [512] * 6
    assert len({(row["method"], row["temperature"]) for row in rows}) == 6
    for row in rows:
        assert row["acceptance_rate"] is not None
        assert row["draft_bytes_per_token"] > 0
        assert row["target_bytes_per_token"] > 0
    coupled, rejection = (
        next(x for x in rows if (x["method"], x["temperature"]) == (method, 1.0))
        for method in ("coupled", "rejection")
    )
    assert coupled["draft_bytes_per_token"] < rejection["draft_bytes_per_token"]


def test_wire_rejects_vocabulary_sizes_with_an_endpoint() -> None:
    ended = here("bench", "wire", "--endpoint=127.0.0.1:1", "--vocab-sizes=2048")
    assert ended.returncode == 2
    assert "--vocab-sizes: cannot be combined with --endpoint" in ended.stderr
