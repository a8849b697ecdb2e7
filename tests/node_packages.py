"""Clients of the tests that run on Node, with packages of their own package-lock.json."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_INSTALL = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0")


def installed(source: Path, folder: Path) -> Path:
    """`folder`, with the files of `source` and their packages. Skips without Node or packages."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no Node on this machine")
    for file in source.glob("*.*js*"):
        shutil.copy(file, folder)
    try:
        done = subprocess.run(
            _INSTALL, cwd=folder, capture_output=True, text=True, timeout=90, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip("npm ci timed out")
    if done.returncode:
        pytest.skip(f"npm ci failed: {done.stderr[-500:]}")
    return folder
