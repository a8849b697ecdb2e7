"""Writes deploy/built/*.yaml: what `kubectl kustomize` makes of each overlay, to be compared.

Owns which overlays there are. Each file begins with a digest of all that it was made from, so that
whoever has no kubectl can tell whether it is what the sources say. Knows no cluster.
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
    """What kubectl makes of a directory. Raises CalledProcessError with what it said."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(directory)],
        capture_output=True, text=True, check=True, timeout=BUILD_TIMEOUT_S,
    )  # fmt: skip
    return done.stdout


def digest() -> str:
    """Of every file that an overlay may be made from, and its name."""
    made = hashlib.sha256()
    for source in SOURCES:
        for path in sorted((DEPLOY / source).rglob("*")):
            if path.is_file() and path.suffix != ".md":
                made.update(f"{path.relative_to(DEPLOY)}\0".encode() + path.read_bytes() + b"\0")
    return made.hexdigest()


def header() -> str:
    return f"# Made by scripts/gen_manifests.py; sources: {digest()}\n"


def main() -> int:
    BUILT.mkdir(exist_ok=True)
    for name, directory in OVERLAYS.items():
        (BUILT / f"{name}.yaml").write_text(header() + kustomize(DEPLOY / directory), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
