"""Supervisor of child processes, and the flags that `outrider up` passes to them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outrider.cli.failures import ProgramFailed
from outrider.cli.stack import (
    Stack,
    draft_arguments,
    orchestrator_arguments,
    target_arguments,
)
from outrider.cli.stack_options import MADE_PAIR, StackOptions
from outrider.cli.supervisor import Event, State, Supervisor
from outrider.errors import ConfigError
from outrider.settings.loader import load
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig
from tests.cli.processes import ROOT, descendants, environment, is_alive, wait_until_dead
from tests.stack import eventually


async def test_a_program_that_does_not_stop_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the grace period; events report every state."""
    monkeypatch.setattr("outrider.cli.supervisor.STOP_GRACE_S", 0.1)
    events: list[Event] = []
    supervisor = Supervisor(tmp_path, events.append)
    assert await supervisor.start("stubborn", ["tests.cli.stubborn"]) == "127.0.0.1:1"
    children = descendants(os.getpid())
    assert any("stubborn" in line for line in children.values())
    await supervisor.stop()
    assert not [p for p, c in children.items() if "stubborn" in c and is_alive(p)]
    states = [event.state for event in events]
    assert states == [State.LOADING, State.READY, State.STOPPING, State.STOPPED]


async def test_one_of_several_programs_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is not reported as a death; the others run on."""
    monkeypatch.setattr("outrider.cli.supervisor.STOP_GRACE_S", 0.1)
    supervisor = Supervisor(tmp_path, lambda event: None)
    for name in ("one", "other"):
        await supervisor.start(name, ["tests.cli.stubborn"])
    await supervisor.stop_one("one")
    assert [is_alive(supervisor.pid(name)) for name in ("one", "other")] == [False, True]
    os.kill(supervisor.pid("other"), signal.SIGKILL)
    assert (await supervisor.next_death()).name == "other"
    await supervisor.stop()


async def test_cancelled_stop_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while it waits for a program, `stop` kills it."""
    monkeypatch.setattr("outrider.cli.supervisor.STOP_GRACE_S", 1_000.0)
    states: list[State] = []
    supervisor = Supervisor(tmp_path, lambda event: states.append(event.state))
    await supervisor.start("stubborn", ["tests.cli.stubborn"])
    children = {p: c for p, c in descendants(os.getpid()).items() if "stubborn" in c}
    stopping = asyncio.create_task(supervisor.stop())

    async def is_waiting() -> bool:
        return State.STOPPING in states

    await eventually(is_waiting)
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    await asyncio.to_thread(wait_until_dead, children)
    await supervisor.stop()  # nothing is left to do


async def test_a_program_that_ends_at_once(tmp_path: Path) -> None:
    """The error has its exit code and last log lines; an earlier run's log stays, unshown."""
    (tmp_path / "odd.log").write_text("earlier\n")
    supervisor = Supervisor(tmp_path, lambda event: None)
    with pytest.raises(ProgramFailed, match=r"odd did not start \(exit code 1\)") as caught:
        await supervisor.start("odd", ["tests.cli.no_such_module"])
    await supervisor.stop()
    assert "no_such_module" in caught.value.log_lines[-1]
    assert "earlier" not in caught.value.log_lines
    assert (tmp_path / "odd.log").read_text().startswith("earlier\n")


async def test_death_of_the_embedded_redis_is_reported(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, lambda event: None)
    earlier = descendants(os.getpid())
    supervisor.start_redis()
    now = descendants(os.getpid())
    (pid,) = (p for p, line in now.items() if p not in earlier and "unixsocket" in line)
    os.kill(pid, signal.SIGKILL)
    death = await asyncio.wait_for(supervisor.next_death(), 60)
    await supervisor.stop()
    assert str(death) == "redis died (killed by SIGKILL)"


def test_every_flag_of_up_reaches_the_programs() -> None:
    options = StackOptions(
        target="t", draft="d", inflate="1.5M", dtype="bfloat16", device="cuda:0",
        draft_device="cuda:1", host="0.0.0.0", port=1234, gamma=3, max_gamma=7, lookahead=0,
        kv_cache_tokens=99, target_threads=5, draft_threads=2,
        draft_wait_ms=2.5, target_tokenizer="t",
    )  # fmt: skip
    shared: dict[str, Any] = {"port": 0, "dtype": "bfloat16", "kv_cache_tokens": 99, "max_gamma": 7}
    assert load(TargetConfig, "target", target_arguments(options)[1:], {}) == TargetConfig(
        model="t", device="cuda:0", num_threads=5, inflate_parameters=1_500_000, **shared
    )
    assert load(DraftConfig, "draft", draft_arguments(options, "d")[1:], {}) == DraftConfig(
        model="d", device="cuda:1", num_threads=2, target_tokenizer="t", **shared
    )
    given = orchestrator_arguments(options, "h:1", None, "redis://r", 8001)[1:]
    assert load(OrchestratorConfig, "orchestrator", given, {}) == OrchestratorConfig(
        target_endpoint="h:1", draft_endpoint=None, tokenizer="t", redis_url="redis://r",
        host="0.0.0.0", port=1234, http_port=8001, gamma=3, max_gamma=7, lookahead=0,
        draft_wait_ms=2.5,
    )  # fmt: skip


async def test_variables_of_http_are_checked_with_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's name in HTTP needs a port, which `outrider up` gives; the next error is later."""
    monkeypatch.setenv("OUTRIDER_ORCHESTRATOR_SERVED_MODEL_NAME", "name")
    for http_port, message in (("0", "--target-cpus: 'x'"), ("none", "served_model_name: needs")):
        stack = Stack(StackOptions(port=0, http_port=http_port, target_cpus="x"), print)
        with pytest.raises(ConfigError, match=message):
            await stack.start()
        await stack.stop()


def test_the_defaults_are_the_quickstart_pair() -> None:
    """The quickstart target is padded; another target is not, and has no default draft."""
    from outrider import quickstart_pair as quickstart
    from outrider_bench.models import synthetic

    assert synthetic._REPORT == MADE_PAIR
    options = StackOptions()
    assert options.draft_model == str(quickstart.DRAFT_PATH)
    assert options.inflate_parameters == 300_000_000
    assert StackOptions(target="other").draft_model is None
    assert StackOptions(target="other").inflate_parameters == 0
    assert StackOptions(draft="none").draft_model is None
    assert StackOptions(inflate="0").inflate_parameters == 0


def test_a_made_pair_has_one_vocabulary(tmp_path: Path) -> None:
    """Models of one `bench pair` are paired without tokenizers; other models need the flag."""
    target, draft = str(tmp_path / "target"), str(tmp_path / "draft")
    options = StackOptions(target=target, draft=draft)
    flag = "--assume-same-vocabulary"
    assert flag not in orchestrator_arguments(options, "h:1", "h:2", "redis://r")
    (tmp_path / MADE_PAIR).write_text("{}")
    assert flag in orchestrator_arguments(options, "h:1", "h:2", "redis://r")
    other = StackOptions(target=target, draft=str(tmp_path / "other" / "draft"))
    assert flag not in orchestrator_arguments(other, "h:1", "h:2", "redis://r")
    assumed = StackOptions(target="t", draft="d", assume_same_vocabulary=True)
    arguments = orchestrator_arguments(assumed, "h:1", "h:2", "redis://r")
    assert load(OrchestratorConfig, "orchestrator", arguments[1:], {}).assume_same_vocabulary


def modules_imported(arguments: list[str]) -> set[str]:
    """Modules that the application has imported before it runs the arguments."""
    code = f"import sys; from outrider.cli.app import app; app({arguments}); print(*sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    return set(printed.stdout.split())


def test_help_imports_nothing_heavy() -> None:
    """`outrider --help` imports no gRPC, numpy or torch: commands do when they run."""
    modules = modules_imported(["--help"])
    assert {"torch", "grpc", "numpy", "rich.live", "structlog"}.isdisjoint(modules)
    assert "outrider_bench" in modules


def test_own_commands_import_no_other_package() -> None:
    """`outrider generate` starts faster without the commands of other packages."""
    assert {"outrider_bench", "importlib.metadata"}.isdisjoint(modules_imported(["generate", "x"]))
