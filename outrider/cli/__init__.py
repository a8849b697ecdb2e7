"""The command line: `outrider up | generate | top | session | model | keys | …`.

Starts the services as child processes and talks to them as any client does; imports none of them,
nor torch. Commands import what they need when they run, so that `--help` is quick. `bench`,
`chaos`, `demo` and `quickstart` come from `outrider_bench`, where it is installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from outrider.cli.failures import Signalled, explain
from outrider.errors import OutriderError


def main(program: Callable[[], object] | None = None) -> None:
    """The entry point of `outrider`. 2: a mistake of the operator; 128 + n: signal n.

    `program`: another typer application, run in the same way.
    """
    from outrider.cli.app import app
    from outrider.settings.loader import silence_grpc

    silence_grpc()

    try:
        (program or app)()
    except OutriderError as error:
        sys.exit(explain(error))
    except Signalled as error:
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `outrider generate … | head`: not worth a word
        # Else Python says so when it flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
