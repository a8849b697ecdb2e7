"""Embedded Redis: up when start returns, ends with its parent, clear errors if it cannot start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.redis.embedded import RedisServer, answers, find_server
from tests import redis_fixture
from tests.cli.processes import is_alive, wait_until_dead
from tests.redis_fixture import redis_command

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url


def socket_path(server: RedisServer) -> Path:
    return Path(server.url.removeprefix("unix://"))


def is_up(path: Path) -> bool:
    """Whether it answers, on a slow machine too."""
    return answers(path, timeout_s=60.0)


def test_it_runs_from_start_to_stop() -> None:
    with RedisServer() as server:
        path, pid = socket_path(server), server.pid
        assert pid is not None
        assert is_up(path)
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not is_alive(pid)
    assert not path.parent.exists()
    server.stop()


def test_it_writes_no_files_and_opens_no_port(redis_url: str) -> None:
    folder = Path(redis_url.removeprefix("unix://")).parent
    assert redis_command(redis_url, "SET", "a", "b") == b"+OK"
    assert {p.name for p in folder.iterdir()} == {"redis.sock", "log"}
    assert redis_command(redis_url, "BGREWRITEAOF").startswith((b"+", b"-"))


def test_starts_again_at_the_same_address() -> None:
    with RedisServer() as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        url = server.url
        server.stop()
        server.start()
        assert server.url == url
        assert is_up(socket_path(server))


def test_a_frozen_server_is_stopped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.redis.embedded.STOP_TIMEOUT_S", 0.1)
    with RedisServer() as server:
        assert server.pid is not None
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
    assert not is_alive(pid)


PARENT = """
import os, sys
from outrider.redis.embedded import RedisServer
server = RedisServer()
server.start()
print(server.pid, server.url, flush=True)
sys.stdin.read()
if sys.argv[1] == "raise": raise SystemExit(3)
"""


@pytest.mark.parametrize("end", ["killed", "raise"])
def test_no_process_outlives_its_parent(end: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        pid, url = parent.stdout.readline().split()
        folder = Path(url.removeprefix("unix://")).parent
        assert is_alive(int(pid))
        if end == "killed":
            parent.kill()
        else:
            parent.stdin.close()
        parent.wait()
        wait_until_dead({int(pid): "redis"})
    if end == "killed":  # then nothing removes its folder
        (folder / "log").unlink()
        folder.rmdir()
    assert not folder.exists()


def test_the_error_of_a_server_that_does_not_start_has_its_output(tmp_path: Path) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho 'bad directive' >&2\nexit 7\n")
    broken.chmod(0o755)
    server = RedisServer(broken)
    with pytest.raises(ConfigError, match=r"exit status 7[^$]*bad directive"):
        server.start()
    assert server.pid is None
    assert not socket_path(server).parent.exists()


def test_a_server_on_path_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "valkey-server"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() == own


def test_the_error_without_any_server_has_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("platform.machine", lambda: "abacus")
    with pytest.raises(ConfigError, match=r"linux-abacus.*--redis-url"):
        find_server()


def test_a_temporary_folder_too_deep_for_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with RedisServer() as server:
        assert is_up(socket_path(server))


def test_start_on_another_thread_is_an_error() -> None:
    server, errors = RedisServer(), []

    def start() -> None:
        try:
            server.start()
        except AssertionError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert len(errors) == 1
