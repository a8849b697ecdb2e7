"""Runs the commands of a page: those that end in bash, servers until the page ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from outrider.client import Client
from tests.cli.processes import ROOT, TIMEOUT_S, environment
from tests.deploy.api_server import free_ports
from tests.shown import plan
from tests.shown.blocks import Command

LISTENING, METRICS = "listening on ", "metrics on "
# Ports on the pages, by program; each is replaced by a free one.
DEFAULT_PORT = {"up": 50051, "orchestrator": 50051, "target_service": 50052, "draft_service": 50053}
HTTP_PORT, METRICS_PORT = 8000, 9100
_SERVER = re.compile(
    r"^(?:outrider (up)\b|python -m (orchestrator|target_service|draft_service)\b)"
)
_PORT = re.compile(r"(?<=[:= ])(8000|9100|500[56]\d)\b")


@dataclass
class Server:
    """A command that runs until SIGTERM."""

    command: Command
    process: subprocess.Popen[bytes]
    log: Path

    def wait_until_it_serves(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while LISTENING not in self.output():
            assert self.process.poll() is None, f"{self.command}\nended:\n{self.output()}"
            assert time.monotonic() < deadline, f"{self.command}\ndoes not serve:\n{self.output()}"
            time.sleep(0.1)

    def stop(self) -> None:
        """Stops it by SIGTERM, which is a success."""
        try:
            self.process.terminate()
            status = self.process.wait(TIMEOUT_S)
            assert status == 0, f"{self.command}\nended with {status}:\n{self.output()}"
        finally:
            self.process.kill()

    def output(self) -> str:
        return self.log.read_text("utf-8")


class Shell:
    """A folder, the ports that the pages' ports stand for, and running servers by port."""

    def __init__(self, folder: Path, values: dict[str, str], ports: dict[int, int]) -> None:
        self.folder = folder
        self._values = {
            "root": str(ROOT),
            "bin": str(Path(sys.executable).parent),
            **values,
        }
        self._ports = dict(ports)
        self._servers: dict[int, Server] = {}

    @property
    def ports(self) -> dict[int, int]:
        return self._ports

    def suppose(self, page: str, commands: tuple[str, ...]) -> None:
        """Runs what a page supposes."""
        for text in commands:
            self.run(Command(page, 0, text))

    def run(self, command: Command) -> None:
        """Runs a command and checks its exit status and output; a server stays until `close`."""
        if found := _SERVER.match(command.text):
            self._start(command, found[1] or found[2])
        elif command.output and (file := re.fullmatch(r"cat (\S+)", command.text)):
            (self.folder / file[1]).write_text(command.output, "utf-8")
        else:
            self._finish(command)

    def close(self) -> None:
        """Stops all servers, the last one first, and checks that they end well."""
        try:
            while self._servers:
                self._servers.popitem()[1].stop()
        finally:
            for server in self._servers.values():
                server.process.kill()

    def _start(self, command: Command, program: str) -> None:
        text = self._text(command)
        explicit = re.search(r"--port (\d+)", command.text)
        port = int(explicit[1]) if explicit else DEFAULT_PORT[program]
        if port in self._servers:  # a page shows several ways to start the same program
            self._servers.pop(port).stop()
        self._ports[port] = _free_port()
        text = re.sub(r" --port \d+", "", text) + f" --port {self._ports[port]}"
        if program == "up" or "--http-port" in text:
            self._ports[HTTP_PORT] = _free_port()
            text = re.sub(r" --http-port \d+", "", text) + f" --http-port {self._ports[HTTP_PORT]}"
        if f"--metrics-port {METRICS_PORT}" in text:
            self._ports[METRICS_PORT] = _free_port()
        log = self.folder / f"server-{port}-{self._ports[port]}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {self._with_ports(text)}"],
                cwd=self.folder, env=self._environment(),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._servers[port] = server = Server(command, process, log)
        server.wait_until_it_serves()

    def _finish(self, command: Command) -> None:
        text = self._with_ports(self._text(command))
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", text],
            cwd=self.folder, env=self._environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        output = done.stdout.decode()
        report = f"{command}\nrun as: {text}\nended with {done.returncode}:\n{output}"
        assert done.returncode in plan.statuses(command), report
        missing = _first_words(plan.compared_output(command)) - _first_words(output)
        assert not missing, f"{report}\nthe page also shows: {sorted(missing)}"

    def _text(self, command: Command) -> str:
        values = dict(self._values)
        if command.text.startswith("outrider top"):
            values["metrics"] = " ".join(self._metrics())
        if plan.REVISION in command.text:
            values["revision"] = self._newest_draft()
        return plan.replaced(command, values)

    def _with_ports(self, text: str) -> str:
        return _PORT.sub(lambda found: str(self._ports[int(found[1])]), text)

    def _environment(self) -> dict[str, str]:
        found = environment()
        path = f"{self._values['bin']}{os.pathsep}{found['PATH']}"
        endpoint = f"127.0.0.1:{self._ports.get(DEFAULT_PORT['orchestrator'])}"
        return {
            **found, "PATH": path, "HF_HUB_OFFLINE": "1", "OUTRIDER_ENDPOINT": endpoint,
            "OPENAI_BASE_URL": f"http://127.0.0.1:{self._ports.get(HTTP_PORT)}/v1",
        }  # fmt: skip

    def _metrics(self) -> list[str]:
        """Addresses that the newest server printed."""
        log = [*self._servers.values()][-1].output()
        return re.findall(rf"{METRICS}(\S+)$", log, re.MULTILINE)

    def _newest_draft(self) -> str:
        """Revision of the draft that joined the tier last; waits until there are two."""
        deadline = time.monotonic() + TIMEOUT_S
        with Client(f"127.0.0.1:{self._ports[DEFAULT_PORT['orchestrator']]}") as client:
            while (rollout := client.models().draft_rollout) is None or len(rollout.revisions) < 2:
                assert time.monotonic() < deadline, f"one draft: {rollout}"
                time.sleep(0.2)
        (new,) = [
            found for found in rollout.revisions if found.model == self._values["other_draft"]
        ]
        return new.revision


def _free_port() -> int:
    return free_ports(1)[0]


def _first_words(output: str) -> set[str]:
    """First word of each line without numbers; pages indent the rest of a line that they wrap."""
    words = (line.split()[0] for line in output.splitlines() if line[:1].strip())
    return {word for word in words if not re.search(r"\d", word)}
