"""Writes deploy/built/*.yaml: the output of `kubectl kustomize` for each overlay, for review.

Each file begins with a digest of its sources, so that a test without kubectl can tell whether it
is up to date.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
BUILT = DEPLOY / "built"
SOURCES = ("base", "components", "overlays", "load-test")
OVERLAYS = {
    "local": "overlays/local",
    "prod": "overlays/prod",
    "load-test": "load-test/base",
    "load-test-prod": "load-test/prod",
}
BUILD_TIMEOUT_S = 60


def kustomize(directory: Path) -> str:
    """Output of `kubectl kustomize`. Raises CalledProcessError with its error output."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(directory)],
        capture_output=True, text=True, check=True, timeout=BUILD_TIMEOUT_S,
    )  # fmt: skip
    return done.stdout


def digest() -> str:
    """SHA-256 of the names and contents of all files that an overlay may include."""
    made = hashlib.sha256()
    for source in SOURCES:
        for path in sorted((DEPLOY / source).rglob("*")):
            if path.is_file() and path.suffix != ".md":
                made.update(f"{path.relative_to(DEPLOY)}\0".encode() + path.read_bytes() + b"\0")
    return made.hexdigest()


def header() -> str:
    """First line of a built file."""
    return f"# Made by scripts/gen_manifests.py; sources: {digest()}\n"


def main() -> int:
    BUILT.mkdir(exist_ok=True)
    for name, directory in OVERLAYS.items():
        (BUILT / f"{name}.yaml").write_text(header() + kustomize(DEPLOY / directory), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
