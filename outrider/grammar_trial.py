"""Trial compilations of formats in a process of its own, which may crash or be killed.

llguidance cannot be interrupted: some formats take it minutes, and a deep chain of references
overflows its stack, which would end the program. An orchestrator therefore compiles each new format
here first. Run as a module, this is that process: it reads sources and answers each with a byte.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO, Any, cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from outrider.errors import InternalError

# A lexer state takes 1 to 2 kB: at most about 100 MB for the worst format.
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
# CPU time of a trial, and its wall-clock time where the cores are busy.
TRIAL_CPU_S = 5.0
_WALL_S = 60.0
_MEMORY_BYTES = 1 << 30
# Less than the stack of any thread that compiles a format afterwards.
_STACK_BYTES = 1 << 20
_SIZE = struct.Struct("<I")
_DONE = b"."
_NO_PROCESS = "the process that tries formats cannot be started"


class FormatTrials:
    """Runs trials; at most one process for each thread that runs one at the time. Any thread.

    `special`: texts of the tokenizer's special tokens by id, which a grammar may name. `cpu_s`:
    limit of a trial.
    """

    def __init__(
        self,
        vocab_size: int,
        special: Mapping[int, str],
        eos_token_id: int,
        cpu_s: float = TRIAL_CPU_S,
    ) -> None:
        self._cpu_s = cpu_s
        self._settings = json.dumps(
            {"size": vocab_size, "special": special, "eos": eos_token_id, "cpu_s": cpu_s}
        ).encode()
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._is_closed = False

    def run(self, source: str) -> str | None:
        """Compiles llguidance's source. Returns why it must not be compiled here; None: it may.

        An error of the format is no reason: compiled here, it is reported. Raises InternalError if
        no process can be started.
        """
        process = self._taken()
        if _answers(process, source.encode("utf-8", "surrogatepass")):
            self._give_back(process)
            return None
        code = _ended(process)
        if -code in (signal.SIGPROF, signal.SIGALRM):
            return f"takes more than {self._cpu_s:g} s to compile; simplify it"
        return "is too deep or too large to compile; simplify it"

    def _taken(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        # It ends when its input is closed, also when this program dies. No signal of the terminal
        # reaches it.
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "outrider.grammar_trial"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise InternalError(_NO_PROCESS, str(error)) from error
        if not _answers(process, self._settings):
            raise InternalError(_NO_PROCESS, f"it ended with code {_ended(process)}")
        return process

    def _give_back(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._idle.append(process)
            is_closed = self._is_closed
        if is_closed:
            self.close()

    def close(self) -> None:
        """Ends the processes; one that runs a trial ends after it."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.kill()
            _ended(process)


def _answers(process: subprocess.Popen[bytes], content: bytes) -> bool:
    """Sends a message; whether the process answers it."""
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    try:
        process.stdin.write(_SIZE.pack(len(content)) + content)
        process.stdin.flush()
    except BrokenPipeError:
        return False
    return process.stdout.read(1) == _DONE


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Closes the pipes; returns the exit code."""
    with contextlib.suppress(BrokenPipeError), process:
        pass
    return process.wait()


def _received(stream: IO[bytes]) -> str | None:
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        return None
    return stream.read(_SIZE.unpack(head)[0]).decode("utf-8", "surrogatepass")


class _Tokens:
    """llguidance's `TokenizerWrapper` of single bytes and the special tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, size: int, special: Mapping[int, bytes], eos_token_id: int) -> None:
        plain_ids = [i for i in range(max(size, 256 + len(special))) if i not in special]
        self.tokens = [b""] * (len(plain_ids) + len(special))
        self._ids = plain_ids[:256]
        for byte, token_id in enumerate(self._ids):
            self.tokens[token_id] = bytes([byte])
        for token_id, text in special.items():
            self.tokens[token_id] = text
        self.special_token_ids = list(special)
        self.eos_token_id = eos_token_id

    def __call__(self, text: str) -> list[int]:
        return [self._ids[byte] for byte in text.encode()]


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    settings = json.loads(_received(requests) or "null")
    special = {int(i): text.encode() for i, text in settings["special"].items()}
    tokens = LLTokenizer(cast(Any, _Tokens(settings["size"], special, settings["eos"])))
    signal.setitimer(signal.ITIMER_REAL, 0)
    answers.write(_DONE)
    answers.flush()
    while (source := _received(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_s"])
        signal.setitimer(signal.ITIMER_REAL, _WALL_S)
        matcher = LLMatcher(tokens, source, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(_DONE)
        answers.flush()


def main() -> None:
    """Runs trials until the input ends. A signal of a timer ends the process at once."""
    signal.setitimer(signal.ITIMER_REAL, _WALL_S)
    with contextlib.suppress(OSError, ValueError):  # the system has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    serving = threading.Thread(target=_serve, args=(sys.stdin.buffer, sys.stdout.buffer))
    serving.start()
    serving.join()


if __name__ == "__main__":
    main()
