"""`python -m outrider.engine.parallel.rank`: one rank other than 0.

Started by rank 0 on its own machine, or by you on another one. Loads its part of the model and
replays rank 0's operations until rank 0 is gone.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time

from outrider.engine.loading import load, placement
from outrider.engine.parallel.group import Place, RankGroup, joined_store
from outrider.engine.parallel.operations import Replay, ReplayedStore
from outrider.engine.parallel.replica import sent_options
from outrider.errors import ConfigError
from outrider.telemetry.logs import configure_logs

_SAME_ERROR_S = 10.0


def end_on_sigterm() -> None:
    """End on SIGTERM, also as a container's first process and while a broadcast is awaited.

    Python runs a handler on the main thread only, which is in torch's code for days. But every
    signal with a handler is written to the wake-up descriptor at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda number, frame: None)

    def wait() -> None:
        os._exit(128 + os.read(reader, 1)[0])

    threading.Thread(target=wait, name="sigterm", daemon=True).start()


def main() -> None:
    """Run this rank. Never returns; an exception ends the process, and so the replica."""
    parser = argparse.ArgumentParser(prog="outrider.engine.parallel.rank")
    parser.add_argument("--host", required=True, help="host name or address of rank 0")
    parser.add_argument("--port", type=int, required=True, help="port of rank 0")
    parser.add_argument("--rank", type=int, required=True, help="1 to N - 1")
    # Only of ranks that rank 0 starts, with LOCAL_RANK, which transformers reads.
    parser.add_argument("--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.local_rank:  # rank 0 ends it, after its last pass
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    else:
        end_on_sigterm()
    configure_logs(f"rank-{given.rank}", level="warning")
    store = joined_store(given.host, given.port)
    options = sent_options(store)
    device = placement.served_device(options.device)
    size = options.tensor_parallel_size
    num_local = 1 if options.tensor_parallel_address else size
    place = Place(given.rank, size, given.local_rank, num_local)
    group = RankGroup.join(store, place, device.type)
    try:
        engine = load.load_engine(options, group)
    except ConfigError:
        time.sleep(_SAME_ERROR_S)  # rank 0 raises it too and reports it; then it ends this process
        raise
    assert isinstance(engine.store, ReplayedStore), "rank 0 does not replay"
    replay = Replay(engine.store, engine.store.copy_rows, engine.replay)
    while True:
        replay.apply(group.receive())


if __name__ == "__main__":
    main()
