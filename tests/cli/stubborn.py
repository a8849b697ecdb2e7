"""A program for the supervisor's tests: serves at once, and does not stop when asked to."""

from __future__ import annotations

import signal
import time

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("listening on 127.0.0.1:1", flush=True)
    time.sleep(600)
