"""Times a newcomer's way from an empty environment to a streamed answer in OpenAI's client.

`python scripts/newcomer_clock.py` builds the wheel (not timed: an index would have it), installs it
with the locked versions into a fresh environment, starts `outrider up` and runs
examples/openai_client.py against it. It prints each command with its time. Packages come from
wherever pip is configured to find them; everything is deleted afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
GOAL_S = 300
HTTP, LISTENING = "http on ", "listening on "


@dataclass
class Clock:
    """Commands of the newcomer, in a folder of their own, and what each took."""

    folder: Path
    constraints: Path
    lines: list[tuple[str, float]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, command: str) -> None:
        """Times a command that ends. Raises CalledProcessError."""
        start = time.monotonic()
        subprocess.run(["bash", "-c", command], check=True, cwd=self.folder, env=self._env(),
                       stdout=subprocess.DEVNULL)  # fmt: skip
        self._note(command, start)

    def run_until(
        self, command: str, is_done: Callable[[str], bool]
    ) -> tuple[subprocess.Popen[str], str]:
        """Times a command up to the output that is waited for; the program continues."""
        start = time.monotonic()
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self._env(), text=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        output = ""
        while not is_done(output):
            if not (character := process.stdout.read(1)):
                raise SystemExit(f"{command} ended with {process.wait()}: {output}")
            output += character
        self._note(command, start)
        return process, output

    def _note(self, command: str, start: float) -> None:
        self.lines.append((command, time.monotonic() - start))
        print(f"{self.lines[-1][1]:7.1f} s  {command}", flush=True)

    def _env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("OUTRIDER_", "VIRTUAL_"))}
        given = [kept.get("PIP_CONSTRAINT", ""), str(self.constraints)]
        return {**kept, "PIP_CONSTRAINT": " ".join(given).strip(), "PYTHONUNBUFFERED": "1",
                **self.environment}  # fmt: skip


def build_wheel(folder: Path) -> Path:
    """The wheel of what git has."""
    source = folder / "source"
    source.mkdir()
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", "HEAD"], check=True, capture_output=True
    )
    subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=source,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    shutil.rmtree(source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def locked_versions(folder: Path) -> Path:
    """The lock as a constraints file: versions without hashes."""
    locks = [(ROOT / f"requirements/{name}.txt").read_text("utf-8") for name in ("dev", "torch")]
    pins = re.findall(r"^([\w.-]+==[^\\\n]+)", "\n".join(locks), re.MULTILINE)
    path = folder / "constraints.txt"
    path.write_text("\n".join(pins) + "\n", "utf-8")
    return path


def main() -> None:
    """Runs the commands; exits with 1 if they took longer than the goal."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        clock = Clock(folder, locked_versions(folder))
        shutil.copy(ROOT / "examples/openai_client.py", folder)
        clock.run("python3 -m venv env")
        clock.run(f"env/bin/pip install --quiet '{wheel.name}[model]' openai")
        up, output = clock.run_until(
            "env/bin/outrider up --port 0 --http-port 0", lambda text: LISTENING in text
        )
        try:
            address = output.partition(HTTP)[2].split()[0]
            clock.environment["OPENAI_BASE_URL"] = f"http://{address}/v1"
            client, _ = clock.run_until("env/bin/python openai_client.py", lambda text: text != "")
            rest = time.monotonic()
            client.communicate()
            print(f"{time.monotonic() - rest:7.1f} s  the rest of the answer")
        finally:
            up.terminate()
            up.wait()
    total = sum(seconds for _, seconds in clock.lines)
    print(f"{total:7.1f} s  to the first streamed text, by {len(clock.lines)} commands")
    sys.exit(total > GOAL_S)


if __name__ == "__main__":
    main()
