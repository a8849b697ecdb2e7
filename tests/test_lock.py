"""The lock: every environment installs exact versions by hash, as pyproject.toml allows."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement

from tests.deploy.sources import script

lock = script("lock")
RENEW = "pyproject.toml and the lock disagree: run `make lock`"

MACHINES = [
    {"python_version": python, "python_full_version": f"{python}.9", "platform_machine": machine}
    for python in ("3.11", "3.12", "3.13")
    for machine in ("x86_64", "aarch64")
]


def pinned(environment: Any, machine: dict[str, str]) -> dict[str, str]:
    """Version by package name, of what one machine with Linux installs."""
    where = {**default_environment(), "sys_platform": "linux", "platform_system": "Linux"}
    where |= {"platform_python_implementation": "CPython", "os_name": "posix"} | machine
    found: dict[str, str] = {}
    for line in lock.pins(environment.path.read_text("utf-8")):
        requirement = Requirement(line)
        marker: Marker | None = requirement.marker
        if marker is None or marker.evaluate(where):
            name = lock.package(requirement.name)
            assert name not in found, f"{name} is pinned twice"
            (exact,) = requirement.specifier
            assert exact.operator == "=="
            found[name] = exact.version
    return found


@pytest.mark.parametrize("environment", [*lock.ENVIRONMENTS, lock.PROTO], ids=lambda e: e.name)
def test_the_lock_is_made_from_this_pyproject(environment: Any) -> None:
    """Any change of a dependency, or of torch's version, needs a new lock."""
    text = environment.path.read_text("utf-8")
    assert f"# source: {lock.fingerprint()}\n" in text, RENEW


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: "-".join(machine.values()))
@pytest.mark.parametrize("environment", lock.ENVIRONMENTS, ids=lambda e: e.name)
def test_every_requirement_is_pinned_within_its_range(
    environment: Any, machine: dict[str, str]
) -> None:
    versions = pinned(environment, machine)
    for line in lock.required(environment):
        requirement = Requirement(line)
        if lock.DEVICE.fullmatch(requirement.name) and not environment.has_device:
            continue  # torch: in torch.txt
        name = lock.package(requirement.name)
        assert name in versions, RENEW
        assert requirement.specifier.contains(versions[name]), f"{name} {versions[name]}: {RENEW}"


@pytest.mark.parametrize("environment", [*lock.ENVIRONMENTS, lock.PROTO], ids=lambda e: e.name)
def test_every_pin_has_a_hash(environment: Any) -> None:
    for entry in lock.entries(environment.path.read_text("utf-8")):
        assert entry.startswith("#") or re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: "-".join(machine.values()))
def test_the_images_have_the_versions_that_are_tested(machine: dict[str, str]) -> None:
    tested = pinned(lock.DEV, machine)
    for image in lock.IMAGES:
        for name, exact in pinned(image, machine).items():
            assert tested.get(name, exact) == exact, f"{image.name}: {name}"


def test_torch_has_one_version() -> None:
    """In torch.txt, in the CUDA image, and within the range of pyproject.toml."""
    pin = Requirement(lock.torch_pin())
    (cuda,) = [image for image in lock.IMAGES if image.has_device]
    assert str(pin.specifier) == f"=={pinned(cuda, MACHINES[0])['torch']}"
    (declared,) = [r for r in map(Requirement, lock.required(lock.DEV)) if r.name == "torch"]
    assert declared.specifier.contains(pinned(cuda, MACHINES[0])["torch"])


def test_the_orchestrators_image_has_no_torch() -> None:
    (image,) = [image for image in lock.IMAGES if image.name == "orchestrator"]
    assert not {"torch", "transformers", "triton", "accelerate"} & pinned(image, MACHINES[0]).keys()


@pytest.mark.parametrize("name", ["transformers", "torch", "grpcio", "protobuf", "redis"])
def test_ranges_end_at_a_tested_minor_version(name: str) -> None:
    """A release nobody has tried is not installed: each has an upper bound below the next major."""
    (declared,) = [r for r in map(Requirement, lock.required(lock.DEV)) if r.name == name]
    (upper,) = [each for each in declared.specifier if each.operator == "<"]
    assert re.fullmatch(r"\d+\.\d+", upper.version), "major.minor, not a whole major version"


@pytest.mark.skipif(".venv/" not in sys.executable, reason="not the environment of make setup")
def test_this_environment_is_the_lock() -> None:
    for name, exact in pinned(lock.DEV, {}).items():
        assert version(name) == exact, name


def test_a_newcomer_gets_the_locked_versions(tmp_path: Path) -> None:
    """scripts/newcomer_clock.py installs with the lock's versions as constraints."""
    constraints = script("newcomer_clock").locked_versions(tmp_path).read_text("utf-8").splitlines()
    names = {Requirement(line).name for line in constraints}
    assert {"torch", "openai", "grpcio", "transformers"} <= names
