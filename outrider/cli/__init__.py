"""Command line: `outrider up | generate | top | session | model | keys | …`.

Runs the services as child processes and connects to them as any client does; imports neither them
nor torch. Commands import what they need when they run, which keeps `--help` fast. `bench`,
`chaos`, `demo` and `quickstart` come from `outrider_bench`, if it is installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from outrider.cli.failures import Signalled, explain
from outrider.errors import OutriderError


def main(program: Callable[[], object] | None = None) -> None:
    """Entry point of `outrider`.

    Exit status: 1 for a failed request, 2 for a wrong flag, variable or file, 128 + n for signal n.
    `program`: another typer application to run in the same way.
    """
    from outrider.cli.app import app
    from outrider.settings.loader import silence_grpc

    silence_grpc()

    try:
        (program or app(sys.argv[1:]))()
    except OutriderError as error:
        sys.exit(explain(error))
    except Signalled as error:
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `outrider generate … | head`: no error for the user
        # Otherwise Python reports it when it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
