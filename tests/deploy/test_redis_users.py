"""What scripts/redis_secret.py prints, on a real server: services work, nobody does more."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.store import SessionStore, StoreOptions
from outrider.errors import OutriderError
from outrider.redis_server import find_server
from tests.deploy.sources import script

secret = script("redis_secret")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The Secret as it is mounted."""
    data = json.loads(secret.secret())["data"]
    for name, text in data.items():
        (tmp_path / name).write_bytes(base64.b64decode(text))
    return tmp_path


@contextmanager
def server(folder: Path) -> Iterator[Path]:
    """The path of its socket."""
    path = folder / "redis.sock"
    process = subprocess.Popen(
        [str(find_server()), "--port", "0", "--unixsocket", str(path), "--save", "",
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
    for _ in range(2000):
        if path.exists():
            return
        assert process.poll() is None, "it did not take the users"
        time.sleep(0.01)
    raise AssertionError("no socket")


def say(path: Path, *lines: str) -> list[str]:
    """What is answered to each line."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(path))
        answers = []
        for line in lines:
            client.sendall(line.encode() + b"\r\n")
            answers.append(client.recv(1 << 16).decode())
        return answers


async def test_the_services_user_can_keep_sessions(files: Path) -> None:
    """All of the store's scripts load and run; another password, or none, is refused."""
    password = (files / "password").read_text()
    with server(files) as path:
        url = f"unix://outrider:{password}@{path}"
        store = SessionStore(url, StoreOptions(session_ttl_s=60))
        await store.start()
        await store.close()
        for wrong in (f"unix://{path}", f"unix://outrider:wrong@{path}"):
            other = SessionStore(wrong, StoreOptions(session_ttl_s=60))
            with pytest.raises(OutriderError):
                await other.start()
            await other.close()


def test_users_may_do_their_part_and_no_more(files: Path) -> None:
    password = (files / "password").read_text()
    replica = (files / "replication.conf").read_text().split()[-1]
    with server(files) as path:
        answers = say(path, f"AUTH outrider {password}", "SET outrider:x 1", "SET other 1",
                      "CONFIG GET dir", "FLUSHALL", "ACL LIST")  # fmt: skip
        assert [answer[0] for answer in answers] == ["+", "+", "-", "-", "-", "-"]
        answers = say(
            path, f"AUTH replica {replica}", "REPLCONF listening-port 1", "GET outrider:x"
        )
        assert [answer[0] for answer in answers] == ["+", "+", "-"]
        # As the proxy asks (components/redis-ha/50-redis.cfg).
        answers = say(path, "AUTH probe none", "PING", "INFO replication", "GET outrider:x")
        assert answers[1].startswith("+PONG")
        assert "role:master" in answers[2]
        assert answers[3].startswith("-NOPERM")
        assert say(path, "GET outrider:x")[0].startswith("-NOAUTH")
