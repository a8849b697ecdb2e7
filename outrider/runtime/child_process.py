"""Child processes that do not outlive the process that started them, however it ends.

Owns the launcher alone: who starts, watches and stops a child is its owner's business.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence

# Runs in the new process before it becomes the program. Not a preexec_fn: that would fork the
# parent, with its threads and whatever locks they hold.
_LAUNCH = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(0)
if sys.argv[2]:
    try:
        os.sched_setaffinity(0, {int(cpu) for cpu in sys.argv[2].split(",")})
    except (AttributeError, OSError) as error:
        sys.exit(f"cpus {sys.argv[2]}: cannot be had: {error}")
os.execv(sys.argv[3], sys.argv[3:])
"""


def tied_to_this_process(command: Sequence[str], cpus: Collection[int] = ()) -> list[str]:
    """The command, made to get SIGTERM when this process ends. `command[0]` is a path.

    `cpus`: the cores it may use, from before its first instruction (libraries size their thread
    pools by them); none: this process's own. Cores that are not there end it with a word on
    standard error.

    Linux sends it when the *thread* that started the child ends: hence start it from the main
    thread. Elsewhere a killed parent leaves the child behind; any other end is its owner's work.
    """
    # -I -S: 10 ms to start, and nothing of the user's is imported.
    cores = ",".join(str(cpu) for cpu in sorted(cpus))
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), cores, *command]
