"""The examples run against a running system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.processes import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EXPECTED_OUTPUT = {
    "generate.py": "acceptance rate: ",
    "session.py": "tokens, 0 of them cached",
    "resume.py": "equal to the uninterrupted output: True",
}


def test_each_example_is_tested_and_listed() -> None:
    assert {path.name for path in EXAMPLES} == set(EXPECTED_OUTPUT)
    listed = (ROOT / "examples/README.md").read_text("utf-8")
    assert all(f"({path.name})" in listed for path in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path, endpoint: str) -> None:
    done = subprocess.run(
        [sys.executable, str(example), endpoint],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert EXPECTED_OUTPUT[example.name] in done.stdout
