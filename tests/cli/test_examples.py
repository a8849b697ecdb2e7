"""The examples run against a running system, and the how-to page shows them as they are."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.cli.processes import ROOT, Up
from tests.deploy.sources import script

pytestmark = pytest.mark.slow

FOLDER = ROOT / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
EXPECTED_OUTPUT = {
    "agent.py": "last call: {'tool': ",
    "grpc_python.py": "acceptance rate: ",
    "logprobs.py": "perplexity of the output: ",
    "many_at_once.py": "'",
    "openai_client.py": "model: ",
    "resume.py": "equal to the uninterrupted output: True",
    "session.py": "turns: 2",
    "stream.py": "acceptance rate: ",
    "structured.py": "ended by stop\nfields: name, age",
}


def test_each_example_is_tested_and_listed() -> None:
    assert {path.name for path in EXAMPLES} == set(EXPECTED_OUTPUT)
    listed = (FOLDER / "README.md").read_text("utf-8")
    assert all(f"({path.name})" in listed for path in EXAMPLES)


@pytest.mark.parametrize(
    "example", [*EXAMPLES, FOLDER / "grpc_node/generate.mjs"], ids=lambda path: path.name
)
def test_the_how_to_page_shows_the_example(example: Path) -> None:
    """Its code without the description in front of it."""
    code = example.read_text("utf-8")
    code = code.split('"""\n\n', 1)[1] if example.suffix == ".py" else code.split("\n", 1)[1]
    page = (ROOT / "docs/how-to/use-the-client.md").read_text("utf-8")
    assert f"```{'python' if example.suffix == '.py' else 'js'}\n{code}```\n" in page


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(
    example: Path,
    running: Up,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [str(example), running.endpoint])
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://{running.http}/v1")
    runpy.run_path(str(example), run_name="__main__")
    assert EXPECTED_OUTPUT[example.name] in capsys.readouterr().out


def test_the_notebook_runs(running: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tokens of a smoke test; the stored outputs are of a whole run of the same cells."""
    monkeypatch.setenv("OUTRIDER_ENDPOINT", running.endpoint)
    monkeypatch.setenv("NOTEBOOK_TOKENS", "24")
    path = FOLDER / "speculative_decoding.ipynb"
    stored = json.loads(path.read_text("utf-8"))
    printed = script("notebook").run_cells(json.loads(path.read_text("utf-8")))
    codes = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [bool(cell["outputs"]) for cell in codes] == [bool(text) for text in printed]
    assert any("with identical tokens" in text for text in printed)
    assert any("adaptive" in text for text in printed)
