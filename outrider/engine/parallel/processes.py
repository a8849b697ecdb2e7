"""Processes of the ranks that rank 0 starts on its own machine: all others, or none.

They end with the thread that starts them, which is the one that runs the engine. A rank that ends
earlier ends the replica: nothing can be computed without its part of the weights and of the KV.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from outrider.runtime.child_process import tied_to_this_process

_log = logging.getLogger(__name__)

# Exit status of a replica that has lost a rank.
EXIT_RANK_LOST = 70
_NAMING_TIMEOUT_S = 1.0


class RankProcesses:
    """The started ranks, watched by a thread each."""

    def __init__(self, host: str, port: int, num_ranks: int) -> None:
        """`num_ranks`: with rank 0, which is this process."""
        self._num_ranks = num_ranks
        self._owner = threading.current_thread()
        self._lock = threading.Lock()
        self._is_ending = False
        self._processes = {
            # A terminal's Ctrl-C is for rank 0, which first finishes what it has begun.
            rank: subprocess.Popen(
                _command(host, port, rank), stdin=subprocess.DEVNULL, start_new_session=True
            )
            for rank in range(1, num_ranks)
        }
        for rank in self._processes:
            threading.Thread(
                target=self._watch, args=(rank,), name=f"rank-{rank}", daemon=True
            ).start()

    def end_replica(self, why: str) -> NoReturn:
        """Log which rank is lost, if one has ended, and end this process at once.

        Orchestrators see the connections break and continue the generations on another replica.
        A graceful stop would wait for passes that can never end.
        """
        with self._lock:  # never released: the first reason is the cause
            lost = [self._describe(rank) for rank in self._processes]
            known = "; ".join(text for text in lost if text)
            _log.critical("tensor parallelism: this replica ends: %s", known or why)
            self.kill()
            sys.stderr.flush()
            os._exit(EXIT_RANK_LOST)

    def kill(self) -> None:
        """Kill all ranks that still run, also a stopped one. The replica need not end then."""
        self._is_ending = True
        for process in self._processes.values():
            process.kill()

    def _watch(self, rank: int) -> None:
        self._processes[rank].wait()
        # Ranks end with the engine's thread; nothing is lost then.
        if self._owner.is_alive() and not self._is_ending:
            self.end_replica(f"rank {rank} has ended")

    def _describe(self, rank: int) -> str:
        """How the rank ended; empty if it runs."""
        process = self._processes[rank]
        try:
            status = process.wait(_NAMING_TIMEOUT_S / len(self._processes))
        except subprocess.TimeoutExpired:
            return ""
        by = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"rank {rank} of {self._num_ranks} (process {process.pid}) ended with {by}"


def _command(host: str, port: int, rank: int) -> Sequence[str]:
    program = [
        "/usr/bin/env", f"LOCAL_RANK={rank}",  # read by transformers: the device of this rank
        sys.executable, "-m", "outrider.engine.parallel.rank",
        "--host", host, "--port", str(port), "--rank", str(rank), "--local-rank", str(rank),
    ]  # fmt: skip
    return tied_to_this_process(program, end_signal=signal.SIGKILL)
