"""The users of scripts/redis_secret.py on a real Redis: rights suffice and are not exceeded."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from orchestrator.sessions import SessionStore, StoreOptions
from outrider.errors import OutriderError
from outrider.redis.embedded import find_server
from tests.deploy.api_server import free_ports
from tests.deploy.sources import script

secret = script("redis_secret")
# Long timeouts, so that a slow server does not count as unreachable.
OPTIONS = StoreOptions(session_ttl_s=60, socket_timeout_s=60)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Directory with the Secret's files."""
    data = json.loads(secret.secret())["data"]
    for name, text in data.items():
        (tmp_path / name).write_bytes(base64.b64decode(text))
    return tmp_path


@contextmanager
def server(folder: Path, port: int = 0) -> Iterator[Path]:
    """Starts Redis and yields the path of its socket; `port` 0: no TCP port."""
    path = folder / "redis.sock"
    process = subprocess.Popen(
        [str(find_server()), "--port", str(port), "--unixsocket", str(path), "--save", "",
         "--dir", str(folder), "--aclfile", str(folder / "users.acl")],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait(path, process)
        yield path
    finally:
        process.kill()
        process.wait()


def _wait(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Waits until the server accepts connections, shortly after its socket exists."""
    for _ in range(6000):
        with suppress(FileNotFoundError, ConnectionRefusedError):
            send_unix(path, "PING")
            return
        assert process.poll() is None, "Redis rejected the users"
        time.sleep(0.01)
    raise AssertionError("Redis does not listen")


@contextmanager
def sentinels(folder: Path, primary: int, ports: Sequence[int]) -> Iterator[None]:
    """Starts sentinels of the primary, configured like components/redis-ha/sentinel.sh."""
    processes, passwords = [], (folder / "sentinel.conf").read_text()
    try:
        for port in ports:
            config = folder / f"sentinel-{port}.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\nprotected-mode no\n"
                f"sentinel monitor outrider 127.0.0.1 {primary} 2\n{passwords}"
            )
            processes.append(
                subprocess.Popen(
                    [str(find_server()), str(config), "--sentinel"], stdout=subprocess.DEVNULL
                )
            )
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def send_tcp(port: int, *lines: str) -> list[str]:
    """Replies to each line; none if nothing listens on the port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            return _replies(client, lines)
    except ConnectionRefusedError:
        return []


def send_unix(path: Path, *lines: str) -> list[str]:
    """Replies to each line."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        return _replies(client, lines)


def _replies(client: socket.socket, lines: Sequence[str]) -> list[str]:
    replies = []
    for line in lines:
        client.sendall(line.encode() + b"\r\n")
        replies.append(client.recv(1 << 16).decode())
    return replies


async def test_services_user_can_store_sessions(files: Path) -> None:
    """The session store starts with the password, and fails with a wrong one or without."""
    password = (files / "password").read_text()
    with server(files) as path:
        url = f"unix://outrider:{password}@{path}"
        store = SessionStore(url, OPTIONS)
        await store.start()
        await store.close()
        for wrong in (f"unix://{path}", f"unix://outrider:wrong@{path}"):
            other = SessionStore(wrong, OPTIONS)
            with pytest.raises(OutriderError):
                await other.start()
            await other.close()


def test_users_have_only_their_own_rights(files: Path) -> None:
    password = (files / "password").read_text()
    replica = (files / "replication.conf").read_text().split()[-1]
    with server(files) as path:
        replies = send_unix(path, f"AUTH outrider {password}", "SET outrider:x 1", "SET other 1",
                      "CONFIG GET dir", "FLUSHALL", "ACL LIST")  # fmt: skip
        assert [reply[0] for reply in replies] == ["+", "+", "-", "-", "-", "-"]
        replies = send_unix(
            path, f"AUTH replica {replica}", "REPLCONF listening-port 1", "GET outrider:x"
        )
        assert [reply[0] for reply in replies] == ["+", "+", "-"]
        # The commands of the proxy (components/redis-ha/50-redis.cfg).
        replies = send_unix(path, "AUTH probe none", "PING", "INFO replication", "GET outrider:x")
        assert replies[1].startswith("+PONG")
        assert "role:master" in replies[2]
        assert replies[3].startswith("-NOPERM")
        assert send_unix(path, "GET outrider:x")[0].startswith("-NOAUTH")


@pytest.mark.slow
def test_sentinels_accept_only_each_other(files: Path) -> None:
    """Without the password a client can neither remove the primary nor shut a sentinel down."""
    password = (files / "sentinel.conf").read_text().split()[-1]
    primary, first, second = free_ports(3)
    with server(files, primary), sentinels(files, primary, (first, second)):
        words = (f"AUTH {password}", "SENTINEL SENTINELS outrider")
        _until(lambda: _lists_sentinel(send_tcp(first, *words)[-1:], second))
        _until(lambda: _lists_sentinel(send_tcp(second, *words)[-1:], first))
        refused = send_tcp(first, "SENTINEL REMOVE outrider", "SHUTDOWN", "SENTINEL MASTERS")
        assert [reply.partition(" ")[0] for reply in refused] == ["-NOAUTH"] * 3
        time.sleep(3.0)  # longer than the connection of a rejected sentinel lasts
        assert _lists_sentinel(send_tcp(first, *words)[-1:], second)


def _lists_sentinel(reply: list[str], port: int) -> bool:
    """Whether the reply lists a connected sentinel at this port."""
    words = reply[0].split("\r\n") if reply else []
    return str(port) in words and words[words.index("flags") + 2] == "sentinel"


def _until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("condition not met within 60 s")
