"""Launcher for child processes that end with the process that started them.

Starting, watching and stopping the child is up to its owner.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection, Sequence

# Runs in the new process before the program replaces it. A preexec_fn would run in a fork of the
# parent, with the parent's threads and locks.
_LAUNCH = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(sys.argv[3]))
if os.getppid() != int(sys.argv[1]):
    sys.exit(0)
if sys.argv[2]:
    try:
        os.sched_setaffinity(0, {int(cpu) for cpu in sys.argv[2].split(",")})
    except (AttributeError, OSError) as error:
        sys.exit(f"cpus {sys.argv[2]}: cannot be had: {error}")
os.execv(sys.argv[4], sys.argv[4:])
"""


def tied_to_this_process(
    command: Sequence[str], cpus: Collection[int] = (), end_signal: int = signal.SIGTERM
) -> list[str]:
    """Wraps the command so that it gets `end_signal` when this process ends.

    `command[0]` is a path.

    `cpus`: the cores it may use, set before its first instruction, because libraries size their
    thread pools by them. Empty: the cores of this process. The child exits with a message on
    standard error if a core does not exist.

    Linux sends the signal when the *thread* that started the child ends, so start it from the main
    thread. On other systems the child survives a killed parent; any other end is its owner's task.
    """
    # -I -S: starts in 10 ms and imports none of the user's packages.
    cores = ",".join(str(cpu) for cpu in sorted(cpus))
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), cores]
    return [*launch, str(int(end_signal)), *command]
