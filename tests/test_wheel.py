"""The wheel, and the commands of an installation without the engine. No network."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from contextlib import AsyncExitStack
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import orchestrator.app
import outrider
from outrider.settings.services import OrchestratorConfig
from tests import redis_fixture
from tests.cli.processes import ROOT
from tests.services.replicas import tier

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url
pytestmark = pytest.mark.slow

ENGINE = {"torch", "transformers", "accelerate", "sentencepiece", "tiktoken"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


RUNTIME = ("outrider", "orchestrator", "draft_service", "target_service")


def build(root: Path, *names: str) -> Path:
    """A wheel from links to what git has: the build leaves folders in its source."""
    source = root / "source"
    source.mkdir()
    for name in names:
        os.symlink(ROOT / name, source / Path(name).name)
    code = (
        "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])",
        str(root),
    )
    done = subprocess.run(
        [sys.executable, "-c", *code], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = root.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the programs, with folders beside them that do not belong to it."""
    others = ("outrider_bench", "tests", "scripts", "deploy", "docs")
    return build(tmp_path_factory.mktemp("wheel"), "pyproject.toml", "README.md", *RUNTIME, *others)


@pytest.fixture(scope="session")
def bench_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [f"outrider_bench/{path.name}" for path in sorted((ROOT / "outrider_bench").iterdir())
             if path.suffix in (".py", ".toml") or (path / "__init__.py").exists()]  # fmt: skip
    return build(tmp_path_factory.mktemp("bench wheel"), *names)


def needed(requirements: list[str], seen: set[str]) -> set[str]:
    """Distributions that are installed for these requirements, by name."""
    for line in requirements:
        requirement = Requirement(line)
        extras = requirement.extras or {""}
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in seen:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        seen.add(name)
        inner = [
            text
            for text in found.requires or []
            if (marker := Requirement(text).marker) is None
            or any(marker.evaluate({"extra": extra}) for extra in extras)
        ]
        needed([text.partition(";")[0] for text in inner], seen)
    return seen


def install(site: Path, *wheels: Path) -> Path:
    """A site directory with the wheels and what `pip install .` brings, no more."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    for name in needed([*PROJECT["dependencies"]], set()):
        for file in distribution(name).files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                os.symlink(distribution(name).locate_file(top), site / top)
    return site


@pytest.fixture(scope="session")
def runtime(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("runtime"), wheel)


@pytest.fixture(scope="session")
def installation(wheel: Path, bench_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("site"), wheel, bench_wheel)


def command(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`outrider` there; without this environment's own packages (-S)."""
    code = "from outrider.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *words],
        env={"PYTHONPATH": str(site), "PATH": os.environ["PATH"], "TERM": "dumb"},
        cwd=site.parent, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def test_the_wheel_has_the_programs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("/METADATA")]
        text = archive.read(metadata).decode()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {*RUNTIME, metadata.partition("/")[0]}
    assert "outrider/quickstart_pair/target/tokenizer.json" in names
    assert "outrider/py.typed" in names
    folder = ROOT / "orchestrator/http/static"
    page = {f"orchestrator/http/static/{file.name}" for file in folder.iterdir()}
    assert page <= set(names)
    assert f"\nVersion: {outrider.__version__}\n" in text
    assert PROJECT["version"] == outrider.__version__
    for name in ENGINE:
        lines = re.findall(rf"^Requires-Dist: {name}\b.*$", text, re.MULTILINE)
        assert lines
        assert all('extra == "model"' in line for line in lines), lines


def test_the_wheel_of_the_benchmarks_has_all_of_them(bench_wheel: Path) -> None:
    with zipfile.ZipFile(bench_wheel) as archive:
        names = {name for name in archive.namelist() if name.endswith(".py")}
    folder = ROOT / "outrider_bench"
    assert names == {f"outrider_bench/{path.relative_to(folder)}" for path in folder.rglob("*.py")}


def test_the_programs_do_without_the_benchmarks(runtime: Path) -> None:
    helped = command(runtime, "-h")
    assert helped.returncode == 0, helped.stderr
    assert " generate " in helped.stdout
    assert " bench " not in helped.stdout
    unknown = command(runtime, "bench")
    assert unknown.returncode == 2
    assert "No such command 'bench'" in unknown.stderr


def test_a_caller_has_no_torch(installation: Path) -> None:
    assert not any((installation / name).exists() for name in ENGINE)
    version = command(installation, "--version")
    assert version.stdout == f"outrider {outrider.__version__}\n"
    for words in (("-h",), ("session", "list", "-h"), ("bench", "serve", "--help"), ("up", "-h")):
        helped = command(installation, *words)
        assert helped.returncode == 0, helped.stderr
        assert "Usage:" in helped.stdout


@pytest.mark.parametrize(
    "words", [("up", "--port=0"), ("demo",), ("chaos", "--quick", "--out=x"),
              ("quickstart", "train", "--out=/tmp/x")]
)  # fmt: skip
def test_what_needs_the_engine_says_so(installation: Path, words: tuple[str, ...]) -> None:
    ended = command(installation, *words)
    assert ended.returncode == 2, ended
    assert "in a clone of Outrider, run: pip install '.[model]'" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr


@pytest.mark.parametrize("extras", ["model", "model,bench"])
def test_benches_say_what_they_need(installation: Path, extras: str) -> None:
    """As docs/reference/dependencies.md lists them: those with a plot need matplotlib, too."""
    text = (ROOT / "docs/reference/dependencies.md").read_text("utf-8")
    (row,) = re.findall(rf"^\| `pip install '\.\[{extras}\]'` \|(.*benches.*)$", text, re.MULTILINE)
    names = re.findall(r"`([a-z-]+)`", row.partition("benches")[2])
    assert len(names) >= 5
    for name in names:
        words = ["x"] if name == "pair" else ["--quick"] if name != "wire" else []
        ended = command(installation, "bench", name, *words)
        assert ended.returncode == 2, ended
        missing = extras.rpartition(",")[2]
        assert ended.stderr.endswith(f"run: pip install '.[{missing}]'\n"), (name, ended.stderr)


def test_no_text_names_a_package_on_an_index() -> None:
    """Outrider is not published: it is installed from a clone."""
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "*.md", "*.py", "*.toml", "Makefile", "deploy"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    named = re.compile(r"pip install ['\"`]?outrider\b")
    found = [
        name
        for name in tracked.split("\0")
        if name and named.search((ROOT / name).read_text("utf-8"))
    ]
    assert found == []


async def test_a_caller_can_call(installation: Path, redis_url: str, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(tier())
        config = OrchestratorConfig(
            target_endpoint=f"127.0.0.1:{target.server.port}",
            draft_endpoint=None,
            redis_url=redis_url,
            port=0,
        )
        server = await stack.enter_async_context(orchestrator.app.serving(config))
        endpoint = f"--endpoint=127.0.0.1:{server.port}"

        async def told(*words: str) -> str:
            ended = await asyncio.to_thread(command, installation, *words, endpoint)
            assert ended.returncode == 0, ended.stderr
            return ended.stdout

        assert "no sessions" in await told("session", "list")
        await told("generate", "--token-ids=1,2,3", "--max-tokens=4", "--session=notes")
        assert "notes" in await told("session", "list")
        assert "simulated" in await told("model")
        served = ("--requests=4", "--concurrency=2", f"--out={tmp_path}")
        await told("bench", "serve", *served)
