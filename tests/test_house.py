"""Rules of the house that no linter knows: where the environment is read, how long files may be."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("outrider", "outrider_bench", "draft_service", "target_service", "orchestrator")


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "_pb2" not in path.name:
                yield path


def test_every_module_says_what_it_owns() -> None:
    """Each module begins with a docstring."""
    silent = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_the_environment_is_read_by_the_loader_only() -> None:
    """`os.environ` and `os.getenv` stand in outrider/settings/loader.py and nowhere else.

    But for the package itself, which must quiet gRPC's core before that is imported, and for ranks,
    whose interface gloo reads there.
    """
    readers = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(word in path.read_text() for word in ("os.environ", "os.getenv", "getenv("))
        and "os.environ" in _code_without_strings(path)
    }
    ranks = "outrider/engine/parallel/replica.py"
    assert readers == {"outrider/__init__.py", "outrider/settings/loader.py", ranks}


def _code_without_strings(path: Path) -> str:
    tree = ast.parse(path.read_text())
    return " ".join(ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute))


def test_files_stay_readable() -> None:
    """No source file grows beyond 320 lines."""
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources()
        if (n := len(p.read_text().splitlines())) > 320
    }
    assert long == {}


def test_only_models_need_torch() -> None:
    """The orchestrator and services of simulated tiers import no torch, in a fresh interpreter."""
    program = (
        "import sys, orchestrator.app, draft_service.app, target_service.app, "
        "outrider.engine.simulated; "
        "sys.exit(str([m for m in ('torch', 'transformers') if m in sys.modules] or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import(package: str) -> None:
    """And so does each main package, warnings being errors."""
    importlib.import_module(package)
